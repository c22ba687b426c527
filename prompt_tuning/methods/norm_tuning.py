# SPDX-License-Identifier: Apache-2.0
"""Norm and bias tuning: what bias tuning (BitFit, Ben Zaken et al. 2022) is for T5.

T5 has no biases in its linear maps. Its norms' scales and the biases of its relative
positions are the vectors that stay, and they are tuned here.
"""

import dataclasses
from typing import ClassVar

from prompt_tuning import trees
from prompt_tuning.methods.method import FROZEN, TUNED, Method


@dataclasses.dataclass(frozen=True)
class NormTuning(Method, kind="norm_tuning"):
    """The scales of all norms and the biases of relative positions."""

    rules: ClassVar[trees.Rules] = (
        (r".*_norm/scale", TUNED),
        (r".*/rel_embedding", TUNED),
        (r".*", FROZEN),
    )
    has_prompt: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 0.001
