# SPDX-License-Identifier: Apache-2.0
"""ATTEMPT: attention over saved prompts (Asai et al. 2022, https://arxiv.org/abs/2205.11961).

Each text mixes prompts that were tuned on other tasks, which stay as they are, with one of
its own task: ``P + sum_j a_j P_j``, the task's own P being among the P_j. A narrow network
turns the largest values of the text's embeddings into a query; the weights a_j are a
softmax over its products with the largest values of each prompt's rows.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from prompt_tuning.errors import UserError
from prompt_tuning.methods.method import HELD, Leaves, Method, Start
from prompt_tuning.network.adapters import EMBEDDED, Slot
from prompt_tuning.network.text_slots import Mixture
from prompt_tuning.types import Array, Params, PathText, PositiveFloat, Size

# The spread of the network's weights at the start.
SPREAD = 0.01


@dataclasses.dataclass(frozen=True)
class Attempt(Method, kind="attempt"):
    """``P H`` numbers and a network of ``2 H r + 2 H``.

    Attributes:
      sources: the files of the prompts that are mixed; they must be as long as this one.
      bottleneck: r, width of the network.
      temperature: what the products are divided by.
    """

    sources: Sequence[PathText] = ()
    bottleneck: Size = 100
    temperature: PositiveFloat = 2087.0

    def __post_init__(self):
        if isinstance(self.sources, str):
            raise UserError(
                f"Attempt.sources={self.sources!r} must be a list of files, e.g. "
                f"('{self.sources}',)"
            )
        super().__post_init__()
        object.__setattr__(self, "sources", tuple(self.sources))

    def reads(self) -> Sequence[str]:
        """The prompts that are mixed."""
        return self.sources

    def held(self, start: Start) -> Params:
        """The prompts that are mixed, [M, P, H].

        Raises:
          UserError: there are none, or they have another shape.
        """
        if not self.sources:
            raise UserError(
                "attempt mixes saved prompts: give their files as ATTEMPT_SOURCES, or "
                "Attempt(sources=...)"
            )
        shape = tuple(start.rows.shape)
        for name, prompt in zip(self.sources, start.saved, strict=True):
            if tuple(prompt.shape) != shape:
                raise UserError(
                    f"{name} is a prompt of {list(prompt.shape)}, where attempt needs "
                    f"{list(shape)}: mix prompts of this model and of PROMPT_LENGTH"
                )
        return {"sources": jnp.stack([jnp.asarray(each) for each in start.saved])}

    def init(self, key: Array, start: Start) -> Leaves:
        """The rows; the network's weights small and normally distributed."""
        width = start.rows.shape[1]
        down, up = jax.random.split(key)
        return {
            "rows": start.rows,
            "down": SPREAD * jax.random.normal(down, (width, self.bottleneck)),
            "up": SPREAD * jax.random.normal(up, (self.bottleneck, width)),
            "norm": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
        }

    def rows(self, leaves: Leaves, base: Params) -> Array:
        """The task's own."""
        del base
        return leaves["rows"]

    def slots(self, leaves: Leaves, base: Params) -> Mapping[str, Slot]:
        """The mixture, added where the embedded prompt stands."""
        prompts = jnp.concatenate([base[HELD]["sources"], leaves["rows"][None]])
        norm = {name: leaf / self.temperature for name, leaf in leaves["norm"].items()}
        parts = (prompts, leaves["down"], leaves["up"], norm["scale"], norm["bias"])
        return {f"encoder/{EMBEDDED}": Mixture.of(*(part[None] for part in parts))}
