# SPDX-License-Identifier: Apache-2.0
"""Which parameters a tuning method moves: ordered path rules, as data.

The labels of these rules are the only place that decides what is differentiated, what
the optimizer sees, what is saved and what stays in full precision.
"""

from prompt_tuning import trees
from prompt_tuning.types import Params

TUNED, FROZEN = "tuned", "frozen"

RULES: dict[str, trees.Rules] = {
    # Lester et al. (2021): only the soft prompts move.
    "prompt_tuning": ((r"prompts/.*", TUNED), (r".*", FROZEN)),
    # The baseline that moves everything, also called fine-tuning.
    "model_tuning": ((r".*", TUNED),),
}


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
