# SPDX-License-Identifier: Apache-2.0
"""All methods by name, and the parting of parameters that each of them asks for.

The labels of a method's rules are the only place that decides what of the network's own
parameters is differentiated, what the optimizer sees, what is saved and what stays in
full precision.
"""

import importlib
import pkgutil

from prompt_tuning import dtypes, methods, trees
from prompt_tuning.errors import UserError
from prompt_tuning.methods.method import FROZEN, METHODS, TUNED, Method, named, split

__all__ = ["FROZEN", "METHODS", "TUNED", "named", "rules_of", "split", "weights_dtype"]

for _module in pkgutil.iter_modules(methods.__path__):
    if _module.name != "registry":
        importlib.import_module(f"{methods.__name__}.{_module.name}")


def rules_of(method: Method | str) -> trees.Rules:
    """The rules of a method.

    Raises:
      UserError: no method is of this kind.
    """
    return named(method).rules


def weights_dtype(method: Method | str, frozen_dtype: str) -> str:
    """What a method keeps the base model's weights in.

    Args:
      method: it, or its kind.
      frozen_dtype: what is asked for frozen weights.

    Returns:
      ``frozen_dtype``, or 'float32' where the method tunes the weights themselves: a
      model is written, and what did not move in it is what was read.

    Raises:
      UserError: weights that are tuned are asked for in int8.
    """
    method = named(method)
    if method.result != "model":
        return frozen_dtype
    if frozen_dtype == dtypes.INT8:
        raise UserError(
            f"method {method.kind!r} tunes the weights themselves, which int8 cannot "
            "hold; set FROZEN_DTYPE to 'auto'"
        )
    return "float32"
