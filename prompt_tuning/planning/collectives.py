# SPDX-License-Identifier: Apache-2.0
"""What chips say to each other in a step, read from the text of a compiled program."""

import math
import re

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
)

_ARRAY = re.compile(r"\b([a-z]+)(\d+)\w*\[([\d,]*)\]")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(?:body|calls|to_apply|computation)=%?([\w.\-]+)")
_TIMES = re.compile(r'known_trip_count"?:\{"n":"(\d+)"')


def read(hlo: str) -> dict[str, dict[str, int]]:
    """Communication of one step, from the text of a compiled program.

    An operation inside a loop counts as often as the loop runs.

    Returns:
      kind -> ``count``, and ``bytes`` of the results on one chip.
    """
    blocks: dict[str, list[str]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            words = line.removeprefix("ENTRY ").split()
            name = words[0].lstrip("%").partition("(")[0]
            entry = name if line.startswith("ENTRY") else entry
        blocks.setdefault(name, []).append(line)
    found: dict[str, dict[str, int]] = {}

    def visit(name: str, times: int) -> None:
        for line in blocks.get(name, ()):
            if match := _COLLECTIVE.search(line):
                sizes = [
                    math.prod(int(n) for n in shape.split(",") if n) * int(bits) // 8
                    for _, bits, shape in _ARRAY.findall(match[1])
                ]
                # What a started operation returns holds its operand, too.
                both = match[3] and match[2] != "all-reduce"
                size = max(sizes, default=0) if both else sum(sizes)
                total = found.setdefault(match[2], {"count": 0, "bytes": 0})
                total["count"] += times
                total["bytes"] += times * size
            loop = _TIMES.search(line)
            for called in _CALLED.findall(line):
                visit(called, times * (int(loop[1]) if loop else 1))

    visit(entry, 1)
    return found
