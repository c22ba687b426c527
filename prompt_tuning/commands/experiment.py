# SPDX-License-Identifier: Apache-2.0
"""``experiment``: a grid of runs, their table and their figure.

What is in a grid a gin file of configs/experiments/ says; each run is what
``prompt-tuning train`` does with the same values.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import rich.table
import rich.text

from prompt_tuning import files, plots, report
from prompt_tuning.checkpoints import base_models, formats, prompt_formats
from prompt_tuning.commands import evaluate, train
from prompt_tuning.data import splits
from prompt_tuning.data.local_task import LocalTask
from prompt_tuning.errors import UserError
from prompt_tuning.inference import prompt_view
from prompt_tuning.runs import experiments, identity, seed_summary, tune
from prompt_tuning.runs.experiments import Cell, ModelTuning, Run
from prompt_tuning.runs.settings import Data, Settings
from prompt_tuning.types import LearningRate, PathText, PositiveInt, Seed

TABLE, FIGURE = "table.md", "figure.png"
# What rows call the task that they were measured on, where there are several.
DOMAIN = "domain"
# What they call the rule by which several prompts answered.
COMBINE = "combine"


def experiment(
    *,
    model_dir: PathText,
    settings: Settings,
    name: str,
    grid: Sequence[Mapping[str, Any]],
    figure: Mapping[str, Any],
    seeds: Sequence[Seed] = (0, 1, 2),
    test_split: str = "test",
    other_tasks: Mapping[str, Mapping[str, Any]] | None = None,
    together: bool = False,
    apart: bool = False,
    interpret: bool = False,
    model_learning_rate: LearningRate = 0.001,
    model_steps: PositiveInt | None = None,
    on_start: files.OnStart | None = None,
) -> None:
    """Trains what a grid names, measures all on one split, and writes what it gave.

    ``model_dir`` has ``experiment.json``, ``table.md``, ``figure.png`` and the folders of
    the runs. A repeated command goes on where the last one stopped.

    Args:
      model_dir: folder of the experiment.
      settings: what all runs have in common.
      name: what the experiment is called.
      grid: what is trained: dicts of what is a cell's own; a list is a choice.
      figure: what is drawn (see `plots.experiment`).
      seeds: of every cell.
      test_split: what everything is measured on; the best step is chosen on EVAL_SPLIT.
      other_tasks: what else everything is measured on, by the name of the domain: a
        task, or files, as docs/reproduce.md has them.
      together: measure prompts of one run also as one that votes.
      apart: give each prompt a run of its own, and its cost among the metrics.
      interpret: measure how each prompt reads as words, too (see `prompt_view.reading`).
      model_learning_rate: of cells that tune the model.
      model_steps: steps of these; None is as many as prompts take.
      on_start: called with the folder before anything else is written to it.

    Raises:
      UserError: the folder holds another experiment, the figure cannot be drawn, or a
        value is wrong.
    """
    if not isinstance(settings.data, Data):
        raise UserError("an experiment reads a registered task or files")
    if settings.prompts is not None:
        raise UserError("an experiment's GRID says what is trained: leave PROMPTS out")
    if settings.rates:
        raise UserError(
            "an experiment tries no rates by itself: give LEARNING_RATE a number, or GRID "
            "a learning_rate"
        )
    if figure.get("x") == DOMAIN and not other_tasks:
        raise UserError(f"{name} measures on other domains, too: give OTHER_TASKS")
    data = settings.data
    own = (data.mixture_or_task_name, data.mixture_or_task_module, data.local_task)
    _check_split(*own, test_split)
    model = ModelTuning(model_learning_rate, model_steps)
    cells = experiments.cells(grid, seeds, settings)
    _check_figure(figure, cells, together=together, others=bool(other_tasks))
    runs = experiments.runs(cells, settings, model, apart)
    for run in runs:  # What cannot be trained is refused before anything is.
        tune.plan(run.settings)
    what = experiments.identity(settings, grid, seeds, model, test_split)
    what |= {"together": together, "apart": apart, "other_tasks": other_tasks}
    what |= {"interpret": True} if interpret else {}
    what = json.loads(json.dumps(what))  # as it is read back: a tuple becomes a list
    rows = _rows_so_far(pathlib.Path(model_dir), name, what)
    domains = _domains(data, test_split, other_tasks or {})  # They are read, too.
    folder = files.writable_folder(model_dir, on_start)
    done = {row["run"]["name"] for row in rows}
    content = {"experiment": name, "grid": what, "figure": figure, "rows": rows}
    files.write_json(folder / seed_summary.FILE, content)
    for number, run in enumerate(runs, 1):
        if run.name in done:
            continue
        report.say(
            f"\nrun {number} of {len(runs)}: {run.name}, {len(run.cells)} trained"
        )
        rows += _rows(
            run, folder, domains, together=together, apart=apart, interpret=interpret
        )
        files.write_json(folder / seed_summary.FILE, content)
    _tell(folder, name, figure, rows)


def _check_figure(
    figure: Mapping[str, Any], cells: Sequence[Cell], *, together: bool, others: bool
) -> None:
    """Refuses a figure that could not be drawn before anything is trained."""
    if unknown := sorted(map(str, figure.keys() - plots.FIGURE_KEYS)):
        raise UserError(
            f"FIGURE has no {', '.join(unknown)}: it may have "
            f"{', '.join(plots.FIGURE_KEYS)}"
        )
    known = dict.fromkeys(key for cell in cells for key in experiments.described(cell))
    known |= dict.fromkeys([DOMAIN] * others + [COMBINE] * together)
    known.pop(seed_summary.SEED, None)
    # Cells that are the same in what would tell them apart are of one colour.
    may = {"x": known, "by": {*known, *experiments.VALUES}}
    for key, value in (("x", figure.get("x")), ("by", figure.get("by", "method"))):
        if value not in may[key]:
            raise UserError(
                f"FIGURE: {key}={value!r} is no value of GRID's cells: choose one of "
                f"{', '.join(known)}"
            )


def _check_split(
    name: str, module: str | None, local: LocalTask | None, split: str
) -> None:
    """Refuses a split that does not exist before anything is trained."""
    from prompt_tuning.data import examples

    known = list(examples.find(name, module).splits if local is None else local.files)
    if splits.name_of(split) not in known:
        raise UserError(
            f"TEST_SPLIT={split!r} is no split of {name}: choose one of {', '.join(known)}"
        )


def _rows_so_far(
    folder: pathlib.Path, name: str, what: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The rows that an earlier call left in the folder.

    Raises:
      UserError: they are another experiment's, or cannot be read.
    """
    path = folder / seed_summary.FILE
    if not path.is_file():
        return []
    known = files.read_json(path)
    for key, kind in (("grid", dict), ("rows", list)):
        if not isinstance(known.get(key), kind):
            raise UserError(
                f"{path} is no record of an experiment, it has no {key}: choose another "
                "MODEL_DIR"
            )
    if known.get("rows") == [] and not any(folder.glob(f"runs/*/{identity.FILE}")):
        return []  # It was refused before it trained anything.
    if known.get("experiment") != name:
        raise UserError(
            f"{folder} holds the experiment {known.get('experiment')!r}: choose another "
            "MODEL_DIR"
        )
    if found := identity.differences(known["grid"], what):
        listed = "; ".join(
            f"{each['value']} is {each['now']!r} and was {each['was']!r}"
            for each in found
        )
        raise UserError(
            f"{folder} holds {name} with another grid: {listed}; choose another MODEL_DIR"
        )
    return known["rows"]


def _domains(
    data: Data, split: str, others: Mapping[str, Mapping[str, Any]]
) -> dict[str | None, dict[str, Any]]:
    """Arguments of ``eval`` by domain; None is the task itself.

    Raises:
      UserError: a domain cannot be measured on, or is called like the task.
    """
    own = {
        "mixture_or_task_name": data.mixture_or_task_name,
        "mixture_or_task_module": data.mixture_or_task_module,
        "local_task": data.local_task,
        "task_feature_lengths": data.task_feature_lengths,
        "split": split,
    }
    if not others:
        return {None: own}
    found: dict[str | None, dict[str, Any]] = {data.mixture_or_task_name: own}
    fields = {field.name for field in dataclasses.fields(LocalTask)}
    for name, values in others.items():
        if name in found:
            raise UserError(
                f"OTHER_TASKS: {name!r} is what the task itself is called: choose another "
                "name"
            )
        files_of = {key: value for key, value in values.items() if key in fields}
        rest = {key: value for key, value in values.items() if key not in fields}
        if unknown := rest.keys() - own.keys():
            raise UserError(
                f"OTHER_TASKS: {name!r} has no {', '.join(sorted(unknown))}"
            )
        task = {"mixture_or_task_name": name, "local_task": None, **rest}
        try:
            if files_of:
                task["local_task"] = _files(files_of, data)
            other = {**own, **task}
            local = other["local_task"]
            where = (other["mixture_or_task_name"], other["mixture_or_task_module"])
            _check_split(*where, local, other["split"])
            if local is not None and local.template is not None:
                local.read(splits.name_of(other["split"]))
        except UserError as error:
            raise UserError(f"OTHER_TASKS: {name!r}: {error}") from error
        found[name] = other
    return found


def _files(values: Mapping[str, Any], data: Data) -> LocalTask:
    """The task of another domain's files; template and labels are those tuned."""
    if "files" not in values:
        raise UserError("it has no files: give the path of each split")
    local = LocalTask(**{"template": None, **values})
    tuned = data.local_task
    if tuned is None:
        return local
    return local.as_tuned({"template": tuned.template, "labels": tuned.labels})


def _rows(
    run: Run,
    folder: pathlib.Path,
    domains: Mapping[str | None, Mapping[str, Any]],
    *,
    together: bool,
    apart: bool,
    interpret: bool,
) -> list[dict[str, Any]]:
    """Trains a run and measures it: a row for each cell and domain."""
    place = folder / "runs" / run.name
    results = train.train(model_dir=str(place), settings=run.settings)
    members = {member["name"]: member for member in results["members"]}
    found = []
    for domain, arguments in domains.items():
        where = {} if domain is None else {DOMAIN: domain}
        measured, combined = _measured(run, place, members, arguments)
        for cell in run.cells:
            member = members[_member(run, cell.name)]
            details = {
                key: member.get(key) for key in ("validation", "best_step", "bytes")
            }
            metrics = dict(measured.get(cell.name, {}))
            if apart:
                cost = results["cost"]
                metrics |= {"seconds": cost["wall_seconds"], "flops": cost["flops"]}
                metrics |= {"bytes": member.get("bytes")}
            if interpret:
                base = run.settings.base.initial_checkpoint_path
                metrics |= _reading(place / member["file"], base)
            alone = {COMBINE: "alone"} if together else {}
            row = {**experiments.described(cell), **alone, **where}
            row["metrics"] = metrics
            row["run"] = {"name": run.name, **details, "cost": results["cost"]}
            found.append(json.loads(json.dumps(row, default=str)))
        for rule, metrics in combined.items() if together else ():
            row = {"method": run.cells[0].method, COMBINE: rule, **where, "seed": None}
            found.append({**row, "metrics": metrics, "run": {"name": run.name}})
    return found


def _reading(file: pathlib.Path, base_model: str) -> dict[str, float]:
    """How a prompt reads as words; nothing of what is no prompt."""
    if prompt_formats.detect(file) is None:
        return {}
    prompt, card = prompt_formats.load(file)
    if not len(prompt):
        return {}
    return prompt_view.reading(prompt, base_model, card.get("labels") or ())


def _member(run: Run, cell: str) -> str:
    """What a run calls a cell."""
    return "model" if run.cells[0].is_model else cell


def _measured(
    run: Run,
    place: pathlib.Path,
    members: Mapping[str, Mapping[str, Any]],
    arguments: Mapping[str, Any],
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Metrics of each cell, and of the rules that make one answer of those of several."""
    base, is_model = run.settings.base, run.cells[0].is_model
    there = {
        cell.name: str(place / members[_member(run, cell.name)]["file"])
        for cell in run.cells
        if "file" in members[_member(run, cell.name)]
    }
    if not there:
        return {}, {}
    paths, arguments = list(there.values()), dict(arguments)
    local = arguments["local_task"]
    if is_model and local is not None and local.vocabulary is None:
        # The base model's lies beside that, and what was tuned has none of its own.
        source = base_models.open_checkpoint(base.initial_checkpoint_path)
        if pieces := formats.find_vocabulary(source.path):
            arguments["local_task"] = dataclasses.replace(local, vocabulary=str(pieces))
    found = evaluate.evaluate(
        config=base.config,
        initial_checkpoint_path=paths[0] if is_model else base.initial_checkpoint_path,
        prompt_file=None if is_model else paths,
        batch_size=run.settings.eval_batch_size,
        frozen_dtype=base.frozen_dtype,
        activation_dtype=base.activation_dtype,
        partitioner=run.settings.partitioner,
        bootstrap_samples=0,
        **arguments,
    )
    if len(paths) == 1:
        return {next(iter(there)): found["metrics"]}, {}
    return found["prompts"], found["combined"]


def _tell(
    folder: pathlib.Path,
    name: str,
    figure: Mapping[str, Any],
    rows: Sequence[seed_summary.Row],
) -> None:
    """Writes table and figure, prints the table and where things lie."""
    known = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    metrics = figure.get("metrics", known[:1])
    if wrong := [each for each in metrics if known and each not in known]:
        raise UserError(
            f"FIGURE: no metric is called {wrong[0]!r}: choose from {', '.join(known)}, "
            "and repeat the command; nothing is trained again"
        )
    groups = seed_summary.summary(rows, metrics)
    head, *lines = seed_summary.table(groups)
    files.write_text(folder / TABLE, seed_summary.markdown([head, *lines]))
    plots.experiment(folder / FIGURE, groups, figure, name)
    shown = rich.table.Table(title=name)
    for column in head:
        shown.add_column(rich.text.Text(column))
    for line in lines:
        shown.add_row(*map(rich.text.Text, line))
    report.console.print(shown)
    written = (seed_summary.FILE, TABLE, FIGURE)
    report.say(f"wrote {', '.join(str(folder / each) for each in written)}")
