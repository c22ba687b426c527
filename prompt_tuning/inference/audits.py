# SPDX-License-Identifier: Apache-2.0
"""How a prompt answers groups of rows, and rows in which words were exchanged.

The exchange is a counterfactual test (Kusner et al. 2017,
https://arxiv.org/abs/1703.06856, in the form that Garg et al. 2019 gave it for texts,
https://arxiv.org/abs/1809.10610): an answer that changes with a name or a pronoun hangs
on it.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from prompt_tuning.data import answer_statistics, fairness
from prompt_tuning.data.word_swaps import Swaps
from prompt_tuning.errors import UserError
from prompt_tuning.inference.encoding import TEXT
from prompt_tuning.inference.engine import Engine

# The figure of the counterfactual test: percent of the answers that changed.
CHANGED = "changed"
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Sides:
    """What answers are compared by (see `fairness.of_groups`).

    Attributes:
      targets: the right label of each row.
      groups: the group of each row.
      positive: the label that counts as positive.
    """

    targets: Sequence[str]
    groups: Sequence[str]
    positive: str


def audit(
    engine: Engine,
    name: str,
    rows: Sequence[Row],
    *,
    sides: Sides | None,
    swaps: Swaps | None,
    samples: int = 1000,
) -> dict[str, Any]:
    """What there is to say of one prompt.

    Args:
      engine: holds the prompt.
      name: of the prompt.
      rows: with the columns of its template, whatever else they have.
      sides: groups and targets of the rows; None leaves groups out.
      swaps: words to exchange; None leaves the counterfactual test out.
      samples: how often rows are drawn for the 95 % intervals; 0 gives none.

    Returns:
      ``rows``, their number; what `fairness.of_groups` says; ``counterfactual``: the
      ``rows`` that hold such a word, how many answers ``changed``, in ``percent`` with
      the ``interval``, ``from_to`` (answer -> answer after the exchange -> rows), and
      ``changes``, each with its row's number (from 1), texts and answers.

    Raises:
      UserError: a row cannot be answered, or none holds a word of ``swaps``.
    """
    asked = [_columns(engine, name, row) for row in rows]
    answers = _answers(engine, name, asked)
    found: dict[str, Any] = {"rows": len(rows)}
    if sides is not None:
        found |= fairness.of_groups(
            answers, sides.targets, sides.groups, sides.positive, samples
        )
    if swaps is None:
        return found
    changed_rows = {
        number: swapped
        for number, row in enumerate(asked)
        if (swapped := _swapped(row, swaps)) != row
    }
    if not changed_rows:
        raise UserError(
            "no row holds a word of SWAP_FILE in the columns of the template "
            f"({', '.join(engine.store.get(name).encoding.columns)}): give other words"
        )
    after = _answers(engine, name, list(changed_rows.values()))
    before = [answers[number] for number in changed_rows]
    differs = [one != other for one, other in zip(before, after, strict=True)]
    found["counterfactual"] = {
        "rows": len(differs),
        CHANGED: sum(differs),
        "percent": 100 * sum(differs) / len(differs),
        **_interval(differs, samples),
        "from_to": _counted(before, after),
        "changes": [
            {
                "row": number + 1,
                "before": asked[number],
                "after": changed_rows[number],
                "answers": [one, other],
            }
            for number, one, other in zip(changed_rows, before, after, strict=True)
            if one != other
        ],
    }
    return found


def _columns(engine: Engine, name: str, row: Row) -> dict[str, Any]:
    """What the prompt is given of a row; the rest might mean something to the engine."""
    columns = engine.store.get(name).encoding.columns
    return {key: row[key] for key in (*columns, TEXT) if key in row}


def _answers(engine: Engine, name: str, rows: Sequence[Row]) -> list[str]:
    return [
        row["answer"] for row in engine.answer({**row, "prompt": name} for row in rows)
    ]


def _swapped(row: Row, swaps: Swaps) -> dict[str, Any]:
    return {
        key: swaps.apply(value) if isinstance(value, str) else value
        for key, value in row.items()
    }


def _interval(differs: Sequence[bool], samples: int) -> dict[str, Any]:
    if not samples:
        return {}

    def percent(targets: Sequence[bool], predictions: Sequence[bool]):
        del predictions
        return {CHANGED: 100 * sum(targets) / len(targets)}

    ends = answer_statistics.intervals(percent, differs, differs, samples)
    return {"interval": ends[CHANGED]}


def _counted(before: Sequence[str], after: Sequence[str]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    pairs = collections.Counter(zip(before, after, strict=True))
    for (one, other), count in sorted(pairs.items()):
        found.setdefault(one, {})[other] = count
    return found
