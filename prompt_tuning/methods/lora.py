# SPDX-License-Identifier: Apache-2.0
"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): kernels with a low-rank sum.

``y = x W + x A B alpha / r`` at every kernel that is named. A starts as PEFT starts it and
B at zero, so that the start is the base model.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from prompt_tuning import trees
from prompt_tuning.errors import UserError
from prompt_tuning.methods import kernels
from prompt_tuning.methods.method import Leaves, Method, Start, torch_uniform
from prompt_tuning.network.adapters import OUTPUT, Slot
from prompt_tuning.network.slots import LowRank
from prompt_tuning.types import Array, Params, PositiveFloat, Size


@dataclasses.dataclass(frozen=True)
class LoRA(Method, kind="lora"):
    """A sum of low rank beside kernels of all layers.

    Attributes:
      rank: r.
      alpha: scales the sum by ``alpha / r``.
      targets: the kernels: 'query', 'key', 'value', 'out' of every attention, 'wi' (or
        'wi_0', 'wi_1') and 'wo' of the MLPs.
    """

    rank: Size = 8
    alpha: PositiveFloat = 8.0
    targets: tuple[str, ...] = ("query", "value")
    has_prompt: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 0.003

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "targets", tuple(self.targets))

    def init(self, key: Array, start: Start) -> Leaves:
        """A uniform within ``1 / sqrt(in)``, B zero.

        Raises:
          UserError: a target that the model does not have, or too large a rank.
        """
        leaves = {}
        for number, (path, shape) in enumerate(
            kernels.find(start.base, self.targets).items()
        ):
            layers, inputs, outputs = shape
            if self.rank > min(inputs, outputs):
                raise UserError(
                    f"LoRA.rank={self.rank} is more than {path} has "
                    f"({min(inputs, outputs)}); lower it"
                )
            own = jax.random.fold_in(key, number)
            leaves[f"{path}/a"] = torch_uniform(
                own, (layers, inputs, self.rank), inputs
            )
            leaves[f"{path}/b"] = jnp.zeros((layers, self.rank, outputs))
        return trees.unflatten(leaves)

    def slots(self, leaves: Leaves, base: Params) -> Mapping[str, Slot]:
        """A low-rank sum at the output of each kernel."""
        del base
        scale, flat = self.alpha / self.rank, trees.flatten(leaves)
        paths = [name.removesuffix("/a") for name in flat if name.endswith("/a")]
        return {
            f"{path}/{OUTPUT}": LowRank.of(flat[f"{path}/a"], flat[f"{path}/b"] * scale)
            for path in paths
        }
