# SPDX-License-Identifier: Apache-2.0
"""Grids of runs: which cells there are, which of them train together, what they gave.

A cell is a prompt or a tuned model with a seed. Cells share a run wherever only what is a
prompt's own differs; a tuned model has a run to itself.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prompt_tuning.checkpoints import base_models, formats
from prompt_tuning.errors import UserError
from prompt_tuning.methods import registry
from prompt_tuning.network.transformer import T5Config
from prompt_tuning.runs import member_specs
from prompt_tuning.runs.seed_summary import SEED
from prompt_tuning.runs.settings import Base, Settings, Tuning
from prompt_tuning.training import optimizers, prompt_lists

# Rows of the training split that a cell has, in place of `train_split`.
EXAMPLES = "examples"
# The base model of a cell, in place of INITIAL_CHECKPOINT_PATH, and how large it is.
BASE_MODEL, PARAMETERS = "base_model", "parameters"
# Of a base model's configuration, what is the run's and not the checkpoint's.
_OF_THE_RUN = (
    "dropout_rate",
    "dtype",
    "remat",
    "unroll",
    "attention",
    "int8_products",
)
# The longest row of a run is at most so many times as long as its shortest prompt wants:
# all rows are padded to the longest.
MOST_PADDING = 1.5

# What a grid may give its cells beside seeds.
VALUES = (EXAMPLES, "batch_size", "method", "prompt_length", "prompt_init", "placement")
VALUES += ("learning_rate", BASE_MODEL)
_WHOLE_NUMBERS = {EXAMPLES, "batch_size", "prompt_length"}


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
        base = variant.values.get(BASE_MODEL)
        for key in _WHOLE_NUMBERS & variant.values.keys():
            number = variant.values[key]
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise UserError(f"GRID: {key}={number!r} must be a number of 1 or more")
        if BASE_MODEL in variant.values and not isinstance(base, str):
            raise UserError(f"GRID: base_model={base!r} must be a path or a name")
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
    found = []
    bases = dict.fromkeys(cell.values.get(BASE_MODEL) for cell in everyone)
    prompts = [
        (base, group)
        for base in bases
        for group in _groups(everyone, base, settings, apart)
    ]
    for number, (base, group) in enumerate(prompts, 1):
        own = [{prompt_lists.NAME: c.name, **_values(c, settings)} for c in group]
        name = group[0].name if apart else f"prompts_{number}"
        run = dataclasses.replace(_on(base, settings), prompts=own)
        found.append(Run(name, tuple(group), run))
    for cell in everyone:
        if cell.is_model:
            on = _on(cell.values.get(BASE_MODEL), settings)
            found.append(Run(cell.name, (cell,), _model_run(cell, on, model)))
    return found


def _groups(
    everyone: Sequence[Cell], base: str | None, settings: Settings, apart: bool
) -> Iterator[list[Cell]]:
    """Prompts of one base model that train together."""
    own = [c for c in everyone if not c.is_model and c.values.get(BASE_MODEL) == base]
    yield from ([cell] for cell in own) if apart else _alike(own, settings)


def _on(base: str | None, settings: Settings) -> Settings:
    """The settings with another base model; None leaves it."""
    if base is None:
        return settings
    config, _ = _sizes(base)
    kept = {name: getattr(settings.base.config, name) for name in _OF_THE_RUN}
    model: Base = dataclasses.replace(
        settings.base,
        config=dataclasses.replace(config, **kept),
        initial_checkpoint_path=base,
    )
    return dataclasses.replace(settings, base=model)


@functools.cache
def _sizes(path: str) -> tuple[T5Config, int]:
    """The sizes of a checkpoint, and how many parameters it has."""
    source = base_models.open_checkpoint(path)
    count = sum(math.prod(spec.shape) for spec in source.specs.values())
    return formats.architecture(source), count


def described(cell: Cell) -> dict[str, Any]:
    """What a row says of its cell: its values, its method, how large its own model is."""
    base = cell.values.get(BASE_MODEL)
    size = {} if base is None else {PARAMETERS: _sizes(base)[1]}
    return {**cell.values, **size, "method": cell.method}


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
    own = {key: value for key, value in cell.values.items() if key != BASE_MODEL}
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
