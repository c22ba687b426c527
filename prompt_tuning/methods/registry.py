# SPDX-License-Identifier: Apache-2.0
"""Which parameters a tuning method moves: ordered path rules, as data.

The labels of these rules are the only place that decides what is differentiated, what
the optimizer sees, what is saved and what stays in full precision.
"""

from prompt_tuning import dtypes, trees
from prompt_tuning.errors import UserError
from prompt_tuning.types import Params

TUNED, FROZEN = "tuned", "frozen"

RULES: dict[str, trees.Rules] = {
    # Lester et al. (2021): only the soft prompts move.
    "prompt_tuning": ((r"prompts/.*", TUNED), (r".*", FROZEN)),
    # The baseline that moves everything, also called fine-tuning.
    "model_tuning": ((r".*", TUNED),),
}


def rules_of(method: str) -> trees.Rules:
    """The rules of a method by its name.

    Raises:
      UserError: no method has this name.
    """
    if method not in RULES:
        raise UserError(f"no method is called {method!r}; choose {', '.join(RULES)}")
    return RULES[method]


def weights_dtype(method: str, frozen_dtype: str) -> str:
    """What a method keeps the base model's weights in.

    Args:
      method: a key of `RULES`.
      frozen_dtype: what is asked for frozen weights.

    Returns:
      ``frozen_dtype``, or 'float32' where the method tunes the weights themselves.

    Raises:
      UserError: weights that are tuned are asked for in int8.
    """
    if trees.first_match(rules_of(method), "token_embedder/embedding") == FROZEN:
        return frozen_dtype
    if frozen_dtype == dtypes.INT8:
        raise UserError(
            f"method {method!r} tunes the weights themselves, which int8 cannot hold; "
            "set FROZEN_DTYPE to 'auto'"
        )
    return "float32"


def split(params: Params, rules: trees.Rules) -> tuple[dict, dict]:
    """Parts ``params`` into the (tuned, frozen) trees.

    Raises:
      ValueError: a leaf has no rule, or nothing is tuned.
    """
    label_tree = trees.labels(params, rules)
    tuned = trees.select(params, label_tree, TUNED)
    if not tuned:
        raise ValueError("no parameter is tuned: the method's rules match no leaf")
    return tuned, trees.select(params, label_tree, FROZEN)
