# SPDX-License-Identifier: Apache-2.0
"""``prompt-tuning inspect PATH``: what a prompt, a model or a run's folder holds."""

import os
import pathlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import rich.console
import rich.table
import rich.text

from prompt_tuning import files, trees
from prompt_tuning.checkpoints import (
    base_models,
    formats,
    layout,
    model_file,
    prompt_file,
    prompt_formats,
)
from prompt_tuning.checkpoints.prompt_formats import Saved
from prompt_tuning.checkpoints.source import Source
from prompt_tuning.errors import UserError, printable
from prompt_tuning.inference import prompt_view
from prompt_tuning.runs import run_view

# Lists that are longer, e.g. arrays within a record, are shown by their length.
LONG = 8
# Characters of a value that are shown.
LONGEST = 500


def show(path: str, base: str | None = None, plot: str | None = None) -> None:
    """Prints `inspect` to standard output.

    Args:
      path: a prompt or a model of any format, a MODEL_DIR, or a file of a run or task.
      base: the base model, for a prompt's nearest tokens.
      plot: a PNG to draw a prompt's norms and cosines to.
    """
    console = rich.console.Console(highlight=False, markup=False)
    console.print(inspect(path, base, plot))


def inspect(
    path: files.Path, base_model: str | None = None, plot: str | None = None
) -> rich.console.Group:
    """Describes a prompt or a model of any format, a run's MODEL_DIR, or a file of it.

    Args:
      path: what `prompt_formats.detect`, `formats.open_model` or `run_view.describe`
        takes; ``embedded:NAME`` is a model inside the package.
      base_model: the base model, to name the tokens nearest to a prompt.
      plot: a PNG to draw a prompt to.

    Raises:
      UserError: the path is none of these, or is damaged.
    """
    where = os.fspath(path)
    if not where.strip():
        raise UserError("an empty path names nothing: give a prompt, a model or a run")
    views = run_view.describe(pathlib.Path(where)) if os.path.exists(where) else {}
    parts: list[rich.console.RenderableType] = [
        _table(title, _plain(facts)) for title, facts in views.items()
    ]
    prompts = [] if os.path.isfile(where) and views else _prompts(where)
    if (model := _model_path(where)) is not None:
        parts.append(_model(base_models.open_checkpoint(model)))
    if os.path.isdir(where):
        parts += _run(where)
    loaded = {path: prompt_formats.load_with_slots(path) for path in prompts}
    parts += [_prompt(path, found, base_model) for path, found in loaded.items()]
    if not parts:
        raise UserError(
            f"{where} is no prompt, model or MODEL_DIR with checkpoints, nor a file of "
            "a run; give the path of one"
        )
    if plot is not None:
        if len(prompts) != 1:
            raise UserError(
                f"--plot draws one prompt, {where} holds {len(prompts)}; give the file "
                "of one"
            )
        if not len(loaded[prompts[0]].array):
            raise UserError(f"{where} has no prompt: --plot draws the rows of one")
        files.refuse_same([where], [plot])
        prompt_view.draw(loaded[prompts[0]].array, plot)
        parts.append(rich.text.Text(f"wrote {plot}"))
    return rich.console.Group(*parts)


def _prompts(where: str) -> list[str]:
    """Paths of the prompts at or in ``where``."""
    if not os.path.exists(where):
        return []
    if os.path.basename(where) == model_file.FILE:
        return []
    if os.path.isfile(where):
        return [where]
    if prompt_formats.detect(where) is not None:
        return [where]
    folder = pathlib.Path(where)
    found = [
        path
        for inside in (folder, folder / prompt_file.FOLDER)
        for path in sorted(inside.glob("*.safetensors"))
    ]
    return [str(file) for file in found if prompt_formats.detect(file) == "native"]


def _model_path(where: str) -> str | None:
    """Where the model at ``where`` is, if one is there."""
    if os.path.basename(where) == model_file.FILE:
        return os.path.dirname(where) or "."
    if os.path.exists(where):
        return where if os.path.isdir(where) and formats.is_model(where) else None
    # Embedded, in the cloud, or a name of the hub.
    return where


def _prompt(path: str, saved: Saved, base_model: str | None) -> rich.console.Group:
    rows = {"format": prompt_formats.detect(path), **_plain(saved.card)}
    if saved.slots:
        rows["in the layers"] = (
            f"{trees.count(dict(saved.slots)):,} numbers at {len(saved.slots)} sites"
        )
        rows["sites"] = ", ".join(saved.slots)
    if len(saved.array):
        rows |= prompt_view.facts(saved.array)
    parts = [_table(f"{'adapter' if saved.slots else 'prompt'} {path}", rows)]
    if base_model is not None and len(saved.array):
        parts.append(prompt_view.neighbours(saved.array, base_model))
    return rich.console.Group(*parts)


def _model(source: Source) -> rich.console.Group:
    dtypes = Counter(str(spec.dtype) for spec in source.specs.values())
    shapes = {name: tuple(spec.shape) for name, spec in source.specs.items()}
    rows = {
        "format": source.format,
        "parameters": f"{trees.count(source.specs):,} in {len(source.specs)} tensors",
        "dtypes": ", ".join(f"{dtype} ({n})" for dtype, n in dtypes.items()),
        "bytes": f"{trees.num_bytes(source.specs):,}",
        **layout.sizes(shapes),
        **source.sizes,
        **_plain(source.metadata),
    }
    if source.prompts:
        rows["prompts"] = ", ".join(source.prompts)
    if source.unknown:
        rows["no part of a T5"] = ", ".join(layout.collapse(source.unknown))
    return _table(f"model {source.path}", rows)


def _run(folder: str) -> list[rich.console.Group]:
    """The checkpoints of a run, if the folder holds any."""
    # Imported late: it brings Orbax, which a prompt does without.
    from prompt_tuning.training.run_checkpoints import Checkpoints

    runs = Checkpoints(folder)
    if not (steps := runs.steps()):
        return []
    rows = {"steps": ", ".join(map(str, steps))}
    for name, standing in runs.read_record(steps[-1])["members"].items():
        best = standing["best"] or "no evaluation yet"
        rows.update(_plain({f"{name}.best": best}))
    return [_table(f"checkpoints {runs.folder}", rows)]


def _plain(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested records as ``{'a.b': text}``."""
    rows = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and prefix.count(".") < LONG:
            rows.update(_plain(value, f"{prefix}{key}."))
        elif isinstance(value, list) and len(value) > LONG:
            rows[f"{prefix}{key}"] = f"{len(value)} values"
        else:
            rows[f"{prefix}{key}"] = _short(value)
    return rows


def _short(value: Any) -> str:
    """A value in a few lines at most."""
    try:
        text = str(value)
    except RecursionError:
        return "values within one another without end"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _table(title: str, rows: Mapping[str, Any]) -> rich.console.Group:
    table = rich.table.Table(show_header=False)
    for key, value in rows.items():
        # As text, for names in brackets are not markup.
        table.add_row(_text(key), _text(str(value)))
    return rich.console.Group(_text(title), table)


def _text(value: str) -> rich.text.Text:
    return rich.text.Text(printable(value))
