# SPDX-License-Identifier: Apache-2.0
"""How many bytes a program needs at once, from the lifetimes of its arrays.

A stand-in for the compiler's own assignment of buffers, which is known only after it has
optimised the whole program. The rules that it rests on:

- what comes out of a matrix product, a reduction, a gather or a loop is written to
  memory, and so is what is rounded to fewer bits; other operations are fused into what
  reads them;
- an array lives from the operation that writes it to the last that reads it, also
  through fused operations in between;
- on a chip with vector memory an array occupies whole tiles, and inside a loop the
  arrays of a moment are kept in the vector memory while it has room, large ones first.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn, Literal

_WRITES = re.compile(
    "dot_general|conv_.*|reduce_.*|arg.*|gather|scatter.*|sort|cum.*|dynamic_.*|top_k"
)
_ROWS, _LANES = 8, 128  # of a tile


def peak(jaxpr: Jaxpr, vmem: int) -> int:
    """Most bytes alive at once inside a program, its arguments not counted.

    Args:
      jaxpr: the program.
      vmem: bytes of vector memory that arrays may take; 0 for devices without, whose
        arrays are not tiled.
    """
    return _peak(jaxpr, vmem, looped=False)


@dataclasses.dataclass(frozen=True)
class _Operation:
    """What writes to memory: the arrays it reads and makes, and what it needs inside."""

    reads: frozenset[int]
    sizes: dict[int, int]
    within: int


def _peak(jaxpr: Jaxpr, vmem: int, looped: bool) -> int:
    trace = _Trace(vmem)
    kept = frozenset().union(*trace.walk(jaxpr, [frozenset()] * len(jaxpr.invars)))
    last = {key: i for i, each in enumerate(trace.operations) for key in each.reads}
    alive: dict[int, int] = {}
    most = 0
    for i, each in enumerate(trace.operations):
        alive |= each.sizes
        near = _fill(alive.values(), vmem) if looped else 0
        most = max(most, sum(alive.values()) - near + each.within)
        for key in list(alive):
            if last.get(key, i) <= i and key not in kept:
                del alive[key]
    return most


def _fill(sizes: Iterable[int], room: int) -> int:
    """How much of a room arrays fill, large ones first."""
    filled = 0
    for size in sorted(sizes, reverse=True):
        if filled + size <= room:
            filled += size
    return filled


class _Trace:
    """The operations of a program that write to memory, calls inlined."""

    def __init__(self, vmem: int):
        self.operations: list[_Operation] = []
        self._sizes: dict[int, int] = {}
        self._vmem = vmem

    def walk(
        self, jaxpr: Jaxpr, inputs: Sequence[frozenset[int]]
    ) -> list[frozenset[int]]:
        """Appends the operations; a variable is the set of stored arrays it needs."""
        needs = dict(zip(jaxpr.invars, inputs, strict=True))
        look_up = lambda v: (
            frozenset() if isinstance(v, Literal) else needs.get(v, frozenset())
        )
        for eqn in jaxpr.eqns:
            reads = [look_up(v) for v in eqn.invars]
            name, bodies = eqn.primitive.name, list(_bodies(eqn))
            looped = name in ("scan", "while")
            if len(bodies) == 1 and not looped:
                outs = self.walk(bodies[0], reads)
            elif bodies:
                within = max(_peak(body, self._vmem, looped) for body in bodies)
                outs = self._write(eqn, reads, within, _carried(eqn))
            elif _WRITES.fullmatch(name) or _narrows(eqn):
                outs = self._write(eqn, reads)
            else:
                outs = [frozenset().union(*reads)] * len(eqn.outvars)
            needs.update(zip(eqn.outvars, outs, strict=True))
        return [look_up(v) for v in jaxpr.outvars]

    def _write(
        self,
        eqn: JaxprEqn,
        reads: Sequence[frozenset[int]],
        within: int = 0,
        carried: slice = slice(0),
    ) -> list[frozenset[int]]:
        """Adds an operation; what a loop carries takes the place of what it was."""
        starts = reads[carried]
        outs, made = [], {}
        for i, var in enumerate(eqn.outvars):
            size = _stored_bytes(var.aval, self._vmem > 0)
            start = starts[i] if i < len(starts) else frozenset()
            if len(start) == 1 and all(self._sizes[key] == size for key in start):
                outs.append(start)
                continue
            key = len(self._sizes)
            self._sizes[key] = made[key] = size
            outs.append(frozenset([key]))
        self.operations.append(_Operation(frozenset().union(*reads), made, within))
        return outs


def _bodies(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """The programs inside an operation."""
    for name in ("jaxpr", "call_jaxpr", "body_jaxpr"):
        if name in eqn.params:
            yield getattr(eqn.params[name], "jaxpr", eqn.params[name])
    for branch in eqn.params.get("branches", ()):
        yield branch.jaxpr


def _carried(eqn: JaxprEqn) -> slice:
    """Which inputs a loop carries from one iteration to the next."""
    if eqn.primitive.name == "scan":
        # JAX's versions keep their numbers under different names. What is scanned over
        # has an axis more outside of the body than inside; what is carried has not.
        (body,) = _bodies(eqn)
        whole = lambda outer, inner: sum(
            a.aval.shape == b.aval.shape for a, b in zip(outer, inner, strict=True)
        )
        end = whole(eqn.invars, body.invars)
        return slice(end - whole(eqn.outvars, body.outvars), end)
    if eqn.primitive.name == "while":
        return slice(eqn.params["cond_nconsts"] + eqn.params["body_nconsts"], None)
    return slice(0)


def _stored_bytes(aval: Any, tiled: bool) -> int:
    """Bytes of an array; tiled, those of the layout that wastes least on padding."""
    shape, itemsize = aval.shape, aval.dtype.itemsize
    size = math.prod(shape) * itemsize
    if not tiled or len(shape) < 2 or not size:
        return size
    whole = lambda n, tile: -(-n // tile) * tile / n
    return round(
        size
        * min(
            whole(rows, _ROWS) * whole(lanes, _LANES)
            for rows, lanes in itertools.permutations(shape, 2)
        )
    )


def _narrows(eqn: JaxprEqn) -> bool:
    """Whether an operation ends a float32 interlude inside a bfloat16 network.

    What softmax, norms and their gradients compute in float32 is fused; its rounded
    result is read by matrix products and written.
    """
    if eqn.primitive.name != "convert_element_type":
        return False
    (before,), (after,) = eqn.invars, eqn.outvars
    return after.aval.dtype.itemsize < before.aval.dtype.itemsize
