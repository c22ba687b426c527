# SPDX-License-Identifier: Apache-2.0
"""``prompt-tuning inspect PATH``: what a prompt, a model or a run's folder holds."""

import os
import pathlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import rich.console
import rich.table
import rich.text

from prompt_tuning import base, trees
from prompt_tuning.checkpoints import layout, model_file, prompt_file, state
from prompt_tuning.errors import UserError

# Positions of a prompt that are shown with their nearest tokens, and tokens for each.
NEIGHBOURS = 3
# Lists that are longer, e.g. arrays within a record, are shown by their length.
LONG = 8


def show(path: str | os.PathLike[str], base_model: str | None = None) -> None:
    """Prints `inspect` to standard output."""
    rich.console.Console(highlight=False, markup=False).print(inspect(path, base_model))


def inspect(
    path: str | os.PathLike[str], base_model: str | None = None
) -> rich.console.Group:
    """Describes a prompt file, a model's folder or a run's MODEL_DIR.

    Args:
      path: the file or folder; ``embedded:NAME`` is a model inside the package.
      base_model: folder of the base model, to name the tokens nearest to a prompt.

    Raises:
      UserError: the path is none of these, or is damaged.
    """
    if str(path).startswith(base.EMBEDDED):
        path = base.checkpoint_folder(str(path))
    path = pathlib.Path(path)
    if path.name == model_file.FILE:
        path = path.parent
    if path.is_file():
        return _prompt(path, base_model)
    runs = state.Checkpoints(path)
    parts = []
    if (path / model_file.FILE).is_file():
        parts.append(_model(path))
    if runs.steps():
        parts.append(_run(runs))
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else ():
        if file.name != model_file.FILE:
            parts.append(_prompt(file, base_model))
    if not parts:
        raise UserError(
            f"{path} is no prompt file, model folder or MODEL_DIR with checkpoints; "
            "give the path of one"
        )
    return rich.console.Group(*parts)


def _prompt(path: pathlib.Path, base_model: str | None) -> rich.console.Group:
    prompt, card = prompt_file.load_prompt(path)
    norms = np.linalg.norm(prompt, axis=1)
    rows = {
        **_plain(card),
        "norm of rows": f"{norms.mean():.4g} ({norms.min():.4g} to {norms.max():.4g})",
        "values": f"{prompt.min():.4g} to {prompt.max():.4g}",
    }
    parts = [_table(f"prompt {path}", rows)]
    if base_model is not None:
        parts.append(_neighbours(prompt, base.checkpoint_folder(base_model)))
    return rich.console.Group(*parts)


def nearest_tokens(
    prompt: np.ndarray, table: np.ndarray, count: int = NEIGHBOURS
) -> tuple[np.ndarray, np.ndarray]:  # [P, count], [P, count]
    """Ids and cosines of the tokens nearest to every position, the nearest first.

    Args:
      prompt: ``[P, H]``.
      table: embedding table ``[V, H]``.
      count: tokens for each position.
    """
    unit = lambda rows: (
        rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    )
    cosines = unit(prompt) @ unit(table.astype(np.float32)).T
    ids = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
    return ids, np.take_along_axis(cosines, ids, axis=1)


def _neighbours(prompt: np.ndarray, folder: pathlib.Path) -> rich.table.Table:
    table = model_file.read_tensor(folder, "token_embedder/embedding")
    if table.shape[1] != prompt.shape[1]:
        raise UserError(
            f"the prompt has width {prompt.shape[1]}, the model {folder} has width "
            f"{table.shape[1]}; give the model it was tuned on"
        )
    name = _pieces(folder)
    view = rich.table.Table("position", "nearest tokens (cosine)")
    for position, (ids, cosines) in enumerate(
        zip(*nearest_tokens(prompt, table), strict=True)
    ):
        pairs = zip(ids, cosines, strict=True)
        view.add_row(
            str(position),
            rich.text.Text(", ".join(f"{name(int(i))} {c:.2f}" for i, c in pairs)),
        )
    return view


def _pieces(folder: pathlib.Path):
    """Names ids by the SentencePiece vocabulary beside the model, if there is one."""
    files = sorted(folder.glob("*.model"))
    if not files:
        return str
    import sentencepiece

    vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(files[0]))
    size = vocabulary.get_piece_size()
    return lambda i: repr(vocabulary.id_to_piece(i)) if i < size else f"<{i}>"


def _model(folder: pathlib.Path) -> rich.console.Group:
    specs = model_file.read_specs(folder)
    dtypes = Counter(str(spec.dtype) for spec in specs.values())
    rows = {
        "parameters": f"{trees.count(specs):,} in {len(specs)} tensors",
        "dtypes": ", ".join(f"{dtype} ({n})" for dtype, n in dtypes.items()),
        "bytes": f"{trees.num_bytes(specs):,}",
        **layout.sizes({name: spec.shape for name, spec in specs.items()}),
        **_plain(model_file.read_metadata(folder)),
    }
    return _table(f"model {folder}", rows)


def _run(runs: state.Checkpoints) -> rich.console.Group:
    steps = runs.steps()
    rows = {"steps": ", ".join(map(str, steps))}
    best = runs.read_best(steps[-1])
    rows.update(_plain({"best": best if best else "no evaluation yet"}))
    return _table(f"checkpoints {runs.folder}", rows)


def _plain(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested records as ``{'a.b': text}``."""
    rows = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows.update(_plain(value, f"{prefix}{key}."))
        elif isinstance(value, list) and len(value) > LONG:
            rows[f"{prefix}{key}"] = f"{len(value)} values"
        else:
            rows[f"{prefix}{key}"] = str(value)
    return rows


def _table(title: str, rows: Mapping[str, Any]) -> rich.console.Group:
    table = rich.table.Table(show_header=False)
    for key, value in rows.items():
        # As text, for names in brackets are not markup.
        table.add_row(rich.text.Text(key), rich.text.Text(str(value)))
    return rich.console.Group(rich.text.Text(title), table)
