# SPDX-License-Identifier: Apache-2.0
"""What the rows of an experiment say together: mean and spread over the seeds.

Apart from the grids, so that those who only show an experiment load nothing for training.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

FILE = "experiment.json"
SEED = "seed"
# What a row has beside its cell's own values.
NOT_OWN = (SEED, "metrics", "run")

_WORDS = {"prompt_tuning": "prompt tuning", "model_tuning": "model tuning"}

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that differ in their seeds alone.

    Attributes:
      values: what they have in common.
      metrics: mean and spread of each metric; the spread is the standard deviation of a
        sample, and None of one row.
      seeds: how many rows there are.
    """

    values: Mapping[str, Any]
    metrics: Mapping[str, tuple[float, float | None]]
    seeds: int


def summary(rows: Sequence[Row], metrics: Sequence[str]) -> list[Group]:
    """Mean and spread of metrics over the seeds, in the order of the rows.

    >>> rows = [{"method": "a", "seed": s, "metrics": {"f1": 2 * s}} for s in (0, 1)]
    >>> summary(rows, ["f1"])
    [Group(values={'method': 'a'}, metrics={'f1': (1, 1.4142135623730951)}, seeds=2)]

    Args:
      rows: of an experiment; those that lack a metric (since a loss was not finite) are
        left out.
      metrics: which of their metrics.
    """
    groups: dict[str, tuple[dict[str, Any], list[Mapping[str, float]]]] = {}
    for row in rows:
        own = {k: v for k, v in row.items() if k not in NOT_OWN}
        _, known = groups.setdefault(repr(own), (own, []))
        if all(row["metrics"].get(metric) is not None for metric in metrics):
            known.append(row["metrics"])
    return [
        Group(
            own,
            {
                name: _mean_and_spread([each[name] for each in found])
                for name in metrics
            },
            len(found),
        )
        for own, found in groups.values()
        if found
    ]


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return statistics.mean(values), spread


def table(groups: Sequence[Group]) -> list[list[str]]:
    """Lines of texts, the head first: values, mean ± spread of each metric, seeds."""
    own = list(dict.fromkeys(key for group in groups for key in group.values))
    metrics = list(dict.fromkeys(name for group in groups for name in group.metrics))
    lines = [[*(key.replace("_", " ") for key in own), *metrics, "seeds"]]
    for group in groups:
        values = [word(group.values.get(key)) for key in own]
        found = [
            _figures(*group.metrics[name]) if name in group.metrics else ""
            for name in metrics
        ]
        lines.append([*values, *found, str(group.seeds)])
    return lines


def word(value: Any) -> str:
    """A value as people read it."""
    return "" if value is None else _WORDS.get(str(value), str(value))


def _figures(mean: float, spread: float | None) -> str:
    return f"{mean:.4g}" + ("" if spread is None else f" ± {spread:.2g}")


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    texts = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([texts[0], "|---" * len(lines[0]) + "|", *texts[1:]]) + "\n"
