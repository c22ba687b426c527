# SPDX-License-Identifier: Apache-2.0
"""Prompt tuning with masks between the prompt and the text.

The published code of prompt tuning (Lester et al. 2021, https://arxiv.org/abs/2104.08691)
lets one choose which of the encoder's positions attend to which: text to prompt, prompt to
text, prompt to prompt, and that to earlier positions alone. A prompt that sees no text has
the same states whatever the text.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from prompt_tuning.errors import UserError
from prompt_tuning.methods.method import Leaves, Method
from prompt_tuning.network.adapters import VISIBLE, Slot
from prompt_tuning.network.text_slots import Visibility
from prompt_tuning.types import Params


@dataclasses.dataclass(frozen=True)
class MaskedPrompt(Method, kind="masked_prompt"):
    """The rows of a prompt, ``P H`` numbers, and masks, which do not move.

    Attributes:
      prompt_sees_text: whether the prompt's positions attend to the text.
      text_sees_prompt: whether the text attends to the prompt; the decoder does always.
      prompt_sees_itself: whether the prompt's positions attend to one another.
      prompt_sees_ahead: whether these are later ones, too.
    """

    prompt_sees_text: bool = False
    text_sees_prompt: bool = True
    prompt_sees_itself: bool = True
    prompt_sees_ahead: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not self.prompt_sees_text and not self.prompt_sees_itself:
            raise UserError(
                "MaskedPrompt: a prompt that sees neither text nor itself would see "
                "nothing at all: leave it one of them"
            )

    def slots(self, leaves: Leaves, base: Params) -> Mapping[str, Slot]:
        """The masks of the encoder."""
        del leaves, base
        sees = [
            [1.0, float(self.text_sees_prompt)],
            [float(self.prompt_sees_text), float(self.prompt_sees_itself)],
        ]
        ahead = [float(self.prompt_sees_ahead)]
        return {
            f"encoder/{VISIBLE}": Visibility.of(jnp.array([sees]), jnp.array([ahead]))
        }
