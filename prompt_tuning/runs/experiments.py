# SPDX-License-Identifier: Apache-2.0
"""Grids of runs: which cells there are, which of them train together, what they gave.

A cell is a prompt or a tuned model with a seed. Cells share a run wherever only what is a
prompt's own differs; a tuned model has a run to itself.
"""

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prompt_tuning.errors import UserError
from prompt_tuning.methods import registry
from prompt_tuning.runs import member_specs
from prompt_tuning.runs.settings import Settings, Tuning
from prompt_tuning.training import optimizers, prompt_lists

FILE = "experiment.json"
# Rows of the training split that a cell has, in place of `train_split`.
EXAMPLES, SEED = "examples", "seed"
# The longest row of a run is at most so many times as long as its shortest prompt wants:
# all rows are padded to the longest.
MOST_PADDING = 1.5

# What a grid may give its cells beside seeds.
VALUES = (EXAMPLES, "batch_size", "method", "prompt_length", "prompt_init", "placement")
VALUES += ("learning_rate",)
# What a row has beside its cell's own values.
NOT_OWN = (SEED, "metrics", "run")

_WORDS = {"prompt_tuning": "prompt tuning", "model_tuning": "model tuning"}

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ModelTuning:
    """The recipe of cells that tune the whole model; that of prompts is the settings'.

    Attributes:
      learning_rate: constant, with Adafactor's parameter scaling.
      steps: how many; None is as many as prompts take.
    """

    learning_rate: float = 0.001
    steps: int | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
    """One entry of a grid with one seed.

    Attributes:
      name: within the experiment.
      method: its kind.
      values: what is its own, the seed among it.
    """

    name: str
    method: str
    values: Mapping[str, Any]

    @property
    def is_model(self) -> bool:
        """Whether it tunes the model, and so needs a run of its own."""
        return registry.named(self.method).result == "model"


@dataclasses.dataclass(frozen=True)
class Run:
    """Cells that train together.

    Attributes:
      name: of its folder.
      cells: those.
      settings: the run.
    """

    name: str
    cells: tuple[Cell, ...]
    settings: Settings


def cells(
    grid: Sequence[Mapping[str, Any]], seeds: Sequence[int], settings: Settings
) -> tuple[Cell, ...]:
    """The cells of a grid: every combination of alternatives with every seed.

    Raises:
      UserError: the grid is empty, or names what no cell may have.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"SEEDS={list(seeds)!r} must be one or more different numbers")
    if any(SEED in entry for entry in grid):
        raise UserError("GRID has no seeds: SEEDS are those of all its cells")
    found = []
    entries = [{**entry, SEED: list(seeds)} for entry in grid]
    usual = settings.tuning.method
    for variant in prompt_lists.expand(entries, (*VALUES, SEED), "GRID"):
        method = registry.named(variant.values.get("method", usual)).kind
        found.append(Cell(variant.name, method, variant.values))
    return tuple(found)


def runs(
    everyone: Sequence[Cell], settings: Settings, model: ModelTuning, apart: bool
) -> list[Run]:
    """The runs that train the cells, those of prompts first.

    Args:
      everyone: the cells.
      settings: what they have in common.
      model: the recipe of those that tune the model.
      apart: give each a run of its own, so that what it costs is known.
    """
    prompts = [cell for cell in everyone if not cell.is_model]
    groups = [[cell] for cell in prompts] if apart else list(_alike(prompts, settings))
    found = []
    for number, group in enumerate(groups, 1):
        own = [{prompt_lists.NAME: c.name, **_values(c, settings)} for c in group]
        name = group[0].name if apart else f"prompts_{number}"
        run = dataclasses.replace(settings, prompts=own)
        found.append(Run(name, tuple(group), run))
    for cell in everyone:
        if cell.is_model:
            found.append(Run(cell.name, (cell,), _model_run(cell, settings, model)))
    return found


def _alike(prompts: Sequence[Cell], settings: Settings) -> Iterator[list[Cell]]:
    """Cells by length, so that little of a run is padding."""
    text = settings.data.task_feature_lengths.get("inputs", 0)
    usual = settings.tuning.prompt_length
    length = lambda cell: cell.values.get("prompt_length", usual or 0)
    group: list[Cell] = []
    for cell in sorted(prompts, key=length):
        shortest = text + length(group[0] if group else cell)
        if text + length(cell) > MOST_PADDING * shortest:
            yield group
            group = []
        group.append(cell)
    if group:
        yield group


def _values(cell: Cell, settings: Settings) -> dict[str, Any]:
    """What is the cell's own, as PROMPTS has it."""
    own = dict(cell.values)
    if (count := own.pop(EXAMPLES, None)) is not None:
        # Other rows for each seed.
        first = count * own[SEED]
        own["train_split"] = f"{settings.data.train_split}[{first}:{first + count}]"
    return own


def _model_run(cell: Cell, settings: Settings, model: ModelTuning) -> Settings:
    own = _values(cell, settings)
    rate = own.pop("learning_rate", model.learning_rate)
    data = dataclasses.replace(
        settings.data, **{k: own.pop(k) for k in ("train_split",) if k in own}
    )
    own.pop("method", None)
    if unknown := sorted(own.keys() - {SEED, "batch_size"}):
        raise UserError(
            f"GRID gives {', '.join(unknown)} to {cell.method}, which has none: give it "
            "in an entry of its own"
        )
    schedule = settings.schedule
    if model.steps is not None:
        schedule = dataclasses.replace(schedule, steps=model.steps)
    optimizer = optimizers.adafactor(
        optimizers.learning_rate_schedule("constant", rate)
    )
    return dataclasses.replace(
        settings,
        tuning=Tuning(method=cell.method, optimizer=optimizer, prompt_length=0),
        schedule=schedule,
        data=data,
        **own,
    )


def identity(
    settings: Settings,
    grid: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    model: ModelTuning,
    split: str,
) -> dict[str, Any]:
    """What an experiment's figures follow from, as JSON."""
    schedule = settings.schedule
    (common,) = member_specs.specs(dataclasses.replace(settings, prompts=None))
    return {
        "entries": [{k: _word(v) for k, v in entry.items()} for entry in grid],
        "seeds": list(seeds),
        "split": split,
        "base_model": settings.base.initial_checkpoint_path,
        "train_steps": schedule.steps,
        "eval_period": schedule.eval_period,
        "model_tuning": dataclasses.asdict(model),
        "others": member_specs.identity(common, {}),
    }


def _word(value: Any) -> Any:
    if isinstance(value, list):
        return [member_specs.word(each) for each in value]
    return member_specs.word(value)


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
    metrics = list(groups[0].metrics) if groups else []
    lines = [[*(key.replace("_", " ") for key in own), *metrics, "seeds"]]
    for group in groups:
        values = [word(group.values.get(key)) for key in own]
        found = [_figures(*group.metrics[name]) for name in metrics]
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
