# SPDX-License-Identifier: Apache-2.0
"""Soft prompt tuning of frozen T5 models in JAX.

The names below are the package's front door. Each is imported when it is first used, so
that ``import prompt_tuning`` loads neither JAX nor TensorFlow.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Beam",
    "Greedy",
    "Model",
    "Predictor",
    "Prompt",
    "PromptBank",
    "Run",
    "Sampling",
    "T5Config",
    "TrainState",
    "Transformer",
    "TunedPrompt",
    "UserError",
    "adafactor",
    "load",
    "load_prompt",
    "make_train_step",
    "tune",
    "virtual_ids",
]

if TYPE_CHECKING:
    from prompt_tuning.decoding import Beam, Greedy, Sampling
    from prompt_tuning.errors import UserError
    from prompt_tuning.library.models import load
    from prompt_tuning.library.predictor import Predictor
    from prompt_tuning.library.tuned_prompt import TunedPrompt, load_prompt
    from prompt_tuning.library.tuning import Run, tune
    from prompt_tuning.network.model import Model
    from prompt_tuning.network.prompts import Prompt, PromptBank, virtual_ids
    from prompt_tuning.network.transformer import T5Config, Transformer
    from prompt_tuning.training.optimizers import adafactor
    from prompt_tuning.training.step import TrainState, make_train_step

_HOMES = {
    "Beam": "decoding",
    "Greedy": "decoding",
    "Model": "network.model",
    "Predictor": "library.predictor",
    "Prompt": "network.prompts",
    "PromptBank": "network.prompts",
    "Run": "library.tuning",
    "Sampling": "decoding",
    "T5Config": "network.transformer",
    "TrainState": "training.step",
    "Transformer": "network.transformer",
    "TunedPrompt": "library.tuned_prompt",
    "UserError": "errors",
    "adafactor": "training.optimizers",
    "load": "library.models",
    "load_prompt": "library.tuned_prompt",
    "make_train_step": "training.step",
    "tune": "library.tuning",
    "virtual_ids": "network.prompts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
