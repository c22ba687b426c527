# SPDX-License-Identifier: Apache-2.0
"""Line charts as SVG inside of a page; the page's script shows the values at the pointer."""

import dataclasses
import json
import math
from collections.abc import Sequence
from xml.etree import ElementTree

from prompt_tuning.runs.html import Element, tag

WIDTH, HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 10, 34
# Colours that people who see few of them tell apart (Okabe and Ito 2008); lines beyond
# them are dashed.
COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
    "#333333",
)
_DASHES = ("", "6 3", "2 3", "8 3 2 3")
# Points of a line; more would make the page large and no eye sees them.
MOST_POINTS = 400


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
      name: of whom.
      x: ascending: steps, say.
      y: likewise.
      marked: the x of the point that is drawn large, or None.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    marked: float | None = None


def chart(lines: Sequence[Line], *, x: str, y: str, log: bool = False) -> Element:
    """A chart with its legend.

    Args:
      lines: those with finite points are drawn, `MOST_POINTS` of each at most.
      x: what the axis is called.
      y: likewise.
      log: a logarithmic x axis; where an x is not above 0 it is linear all the same.
    """
    shown = [line for line in map(_thinned, lines) if line.x]
    if not shown:
        return tag("p", "no values")
    everyone = [value for line in shown for value in line.x]
    log = log and min(everyone) > 0
    across = _Axis.of(everyone, _LEFT, WIDTH - _RIGHT, log)
    up = _Axis.of([v for line in shown for v in line.y], HEIGHT - _BOTTOM, _TOP)
    svg = tag(
        "svg",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{y} by {x}",
        class_="chart",
        data_x=x,
    )
    for value in up.ticks:
        at = f"{up.place(value):.1f}"
        svg.append(
            tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=at, y2=at, class_="grid")
        )
        svg.append(_label(f"{value:.4g}", _LEFT - 6, up.place(value) + 4, "end"))
    for value in across.ticks:
        svg.append(_label(f"{value:.6g}", across.place(value), HEIGHT - 18, "middle"))
    svg.append(_label(x, (WIDTH + _LEFT) / 2, HEIGHT - 3, "middle"))
    legend = tag("ul", class_="legend")
    for i, line in enumerate(shown):
        colour = COLOURS[i % len(COLOURS)]
        dash = _DASHES[i // len(COLOURS) % len(_DASHES)]
        places = [
            (across.place(a), up.place(b)) for a, b in zip(line.x, line.y, strict=True)
        ]
        svg.append(
            tag(
                "polyline",
                points=" ".join(f"{a:.1f},{b:.1f}" for a, b in places),
                stroke=colour,
                stroke_dasharray=dash,
                data_name=line.name,
                data_points=json.dumps(
                    [[a, float(f"{b:.6g}")] for a, b in zip(line.x, line.y)]
                ),
            )
        )
        for (a, b), value in zip(places, line.x, strict=True):
            if len(places) == 1 or value == line.marked:
                svg.append(
                    tag("circle", cx=f"{a:.1f}", cy=f"{b:.1f}", r=4, fill=colour)
                )
        key = tag("li", tag("i", style=f"background:{colour}"), line.name)
        legend.append(key)
    return tag("figure", tag("figcaption", y), svg, legend)


def _thinned(line: Line) -> Line:
    points = [
        (a, b)
        for a, b in zip(line.x, line.y, strict=True)
        if math.isfinite(a) and math.isfinite(b)
    ]
    stride = math.ceil(len(points) / MOST_POINTS) or 1
    # The last point stays, and so does the marked one.
    kept = [
        point
        for i, point in enumerate(points)
        if i % stride == 0 or i == len(points) - 1 or point[0] == line.marked
    ]
    return Line(line.name, [a for a, _ in kept], [b for _, b in kept], line.marked)


def _label(text: str, x: float, y: float, anchor: str) -> ElementTree.Element:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


@dataclasses.dataclass(frozen=True)
class _Axis:
    """Where values lie between two ends of the picture."""

    low: float
    high: float
    first: float
    last: float
    log: bool

    @classmethod
    def of(
        cls, values: Sequence[float], first: float, last: float, log: bool = False
    ) -> "_Axis":
        low, high = min(values), max(values)
        if low == high:
            room = abs(low) / 10 or 1.0
            low, high = (low / 2, high * 2) if log else (low - room, high + room)
        return cls(low, high, first, last, log)

    def place(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(value)
        # Each term by itself, for the difference of huge numbers is not finite.
        share = (at / 2 - low / 2) / (high / 2 - low / 2)
        return self.first + share * (self.last - self.first)

    @property
    def ticks(self) -> list[float]:
        """Round numbers, some five of them."""
        if self.log:
            least = math.ceil(math.log10(self.low) - 1e-9)
            most = math.floor(math.log10(self.high) + 1e-9)
            stride = max(1, math.ceil((most - least) / 6))
            powers = [10.0**i for i in range(least, most + 1, stride)]
            return powers if len(powers) > 1 else [self.low, self.high]
        span = self.high / 5 - self.low / 5
        unit = 10.0 ** math.floor(math.log10(span))
        unit *= next(k for k in (1, 2, 5, 10) if k * unit >= span)
        first, last = math.ceil(self.low / unit), math.floor(self.high / unit)
        return [i * unit for i in range(first, last + 1)]
