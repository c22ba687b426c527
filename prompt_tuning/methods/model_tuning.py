# SPDX-License-Identifier: Apache-2.0
"""Model tuning, also called fine-tuning: the baseline that moves every parameter."""

import dataclasses
from typing import ClassVar

from prompt_tuning import trees
from prompt_tuning.methods.method import TUNED, Method


@dataclasses.dataclass(frozen=True)
class ModelTuning(Method, kind="model_tuning"):
    """All parameters of the base model."""

    rules: ClassVar[trees.Rules] = ((r".*", TUNED),)
    has_prompt: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 0.001
