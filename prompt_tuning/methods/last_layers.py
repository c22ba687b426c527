# SPDX-License-Identifier: Apache-2.0
"""Last layers: model tuning of the top of a stack alone.

Lee et al. 2019, "What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning"
(https://arxiv.org/abs/1911.03090). Layers are stacked in one leaf each, so that those that
move are the ends of leaves. The layers below have no optimizer slots, but a scan over
layers has one backward pass for all: their gradients are computed and dropped.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from prompt_tuning import trees
from prompt_tuning.errors import UserError
from prompt_tuning.methods.method import FROZEN, HELD, TUNED, Method
from prompt_tuning.types import Params, Size


@dataclasses.dataclass(frozen=True)
class LastLayers(Method, kind="last_layers"):
    """All weights of a stack's last layers; embeddings and last norms do not move.

    Attributes:
      layers: how many.
      encoder: whether those of the encoder move, beside those of the decoder.
    """

    layers: Size = 1
    encoder: bool = False
    has_prompt: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 0.001

    def __post_init__(self):
        super().__post_init__()
        stacks = "(encoder|decoder)" if self.encoder else "decoder"
        rules = ((rf"{stacks}/layers/.*", TUNED), (r".*", FROZEN))
        object.__setattr__(self, "rules", rules)

    def split(self, params: Params) -> tuple[Params, Params]:
        """The ends of the stacked leaves, and the rest; ``HELD`` has their beginnings.

        Raises:
          UserError: there are not so many layers.
        """
        tuned, frozen = super().split(params)
        stacked = trees.flatten(tuned)
        depth = min(leaf.shape[0] for leaf in stacked.values())
        if self.layers > depth:
            raise UserError(
                f"LastLayers.layers={self.layers} is more than the {depth} layers that "
                "the model has; choose fewer"
            )
        ends = {name: leaf[-self.layers :] for name, leaf in stacked.items()}
        begins = {name: leaf[: -self.layers] for name, leaf in stacked.items()}
        return trees.unflatten(ends), {**frozen, HELD: trees.unflatten(begins)}

    def materialize(self, tuned: Params, base: Params) -> Params:
        """The stacks, whole."""
        whole = lambda name, begin, end: jnp.concatenate([begin, end])
        return trees.map_with_path(whole, base[HELD], tuned)
