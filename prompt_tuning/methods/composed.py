# SPDX-License-Identifier: Apache-2.0
"""Several methods at once: a prompt and LoRA, deep prompts and IA3, ...

All are tuned together on the same batches. Where two would put the same kind of thing at
one place of the network, they are refused.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import jax

from prompt_tuning.errors import UserError
from prompt_tuning.methods.method import Leaves, Method, Start, named, with_own
from prompt_tuning.network.adapters import Slot
from prompt_tuning.types import Array, Params


@dataclasses.dataclass(frozen=True)
class Composed(Method, kind="composed"):
    """The leaves of all parts, of which at most one is a prompt.

    Attributes:
      parts: the methods, or their kinds.
      rates: what each part's learning rate is, as a multiple of the run's; by default
        one and the same.
    """

    parts: tuple[Method | str, ...] = ("prompt_tuning", "lora")
    rates: tuple[float, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        parts = self._parts
        kinds = [part.kind for part in parts]
        if len(parts) < 2 or len(set(kinds)) < len(kinds):
            raise UserError(
                f"Composed.parts={kinds} must be two methods or more, each once"
            )
        for part in parts:
            if part.result == "model":
                raise UserError(
                    f"Composed.parts: {part.kind!r} moves the model itself, which others "
                    "cannot share; leave it out"
                )
            if part.has_lesson:
                raise UserError(
                    f"Composed.parts: {part.describe()} learns from answers of the model "
                    "without the other parts; leave it out"
                )
        if sum(part.has_prompt for part in parts) > 1:
            raise UserError(
                f"Composed.parts={kinds}: more than one has a prompt; keep one of these"
            )
        if self.rates and (
            len(self.rates) != len(parts) or any(not rate >= 0 for rate in self.rates)
        ):
            raise UserError(
                f"Composed.rates={list(self.rates)} must be a number of 0 or more for "
                f"each of the {len(parts)} parts"
            )
        for name in ("has_prompt", "uses_rows"):
            whole = any(getattr(part, name) for part in parts if part.has_prompt)
            object.__setattr__(self, name, whole)
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "rates", tuple(self.rates))

    def rate_factors(self) -> Mapping[str, float]:
        """Those of the parts."""
        return {part.kind: rate for part, rate in zip(self._parts, self.rates)}

    def init(self, key: Array, start: Start) -> Leaves:
        """The leaves of each part by its kind."""
        return {
            part.kind: part.init(jax.random.fold_in(key, number), own)
            for number, (part, own) in enumerate(
                zip(self._parts, self._starts(start), strict=True)
            )
        }

    def rows(self, leaves: Leaves, base: Params) -> Array:
        """The prompt of the one that has one."""
        (part,) = (part for part in self._parts if part.has_prompt)
        return part.rows(leaves[part.kind], with_own(base, part.kind))

    def reads(self) -> Sequence[str]:
        """Those of the parts, one after the other."""
        return [path for part in self._parts for path in part.reads()]

    def held(self, start: Start) -> Params:
        """What each part holds, by its kind."""
        found = {
            part.kind: part.held(own)
            for part, own in zip(self._parts, self._starts(start), strict=True)
        }
        return {kind: held for kind, held in found.items() if held}

    def penalty(self, leaves: Leaves, base: Params) -> Array | float:
        """The sum of those of the parts."""
        return sum(
            part.penalty(leaves[part.kind], with_own(base, part.kind))
            for part in self._parts
        )

    @property
    def has_penalty(self) -> bool:
        """Whether a part has one."""
        return any(part.has_penalty for part in self._parts)

    def slots(self, leaves: Leaves, base: Params) -> Mapping[str, Slot]:
        """The slots of all.

        Raises:
          UserError: two want the same place.
        """
        slots: dict[str, Slot] = {}
        for part in self._parts:
            own = part.slots(leaves[part.kind], with_own(base, part.kind))
            for site, slot in own.items():
                if site in slots:
                    raise UserError(
                        f"Composed.parts: two of them change {site}; leave one out"
                    )
                slots[site] = slot
        return slots

    def _starts(self, start: Start) -> list[Start]:
        """That of each part, with the saved prompts that it reads."""
        saved = iter(start.saved)
        return [
            start._replace(saved=list(itertools.islice(saved, len(part.reads()))))
            for part in self._parts
        ]

    @property
    def _parts(self) -> tuple[Method, ...]:
        return tuple(map(named, self.parts))
