# SPDX-License-Identifier: Apache-2.0
"""Pictures: a run by the records in ``metrics.jsonl``, a prompt by its rows."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning import files, report

CURVE_FILE = "learning_curve.png"
# More names than these would hide the lines that they belong to.
MOST_NAMES = 12
# What a record holds beside its values.
_KEYS = ("split", "step", "member")


def learning_curve(model_dir: pathlib.Path) -> pathlib.Path | None:
    """Draws training loss and validation metrics over steps; a line for each member.

    Returns:
      The path of the picture, or None where there is nothing to draw.
    """
    records = report.read_metrics(model_dir)
    train = [r for r in records if r["split"] == "train"]
    validation = [r for r in records if r["split"] == "validation"]
    if not train:
        return None
    path = pathlib.Path(model_dir) / CURVE_FILE
    if len({r["member"] for r in train}) > 1:
        _curves_of_many(path, train, validation)
        return path
    figure = _figure(8, 4.5)
    axes = figure.add_subplot()
    axes.plot([r["step"] for r in train], [r["loss"] for r in train], color="tab:blue")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss per target token", color="tab:blue")
    if validation:
        right = axes.twinx()
        names = [k for k in validation[-1] if k not in _KEYS]
        for name, color in zip(names, ("tab:orange", "tab:green", "tab:red")):
            right.plot(
                [r["step"] for r in validation],
                [r[name] for r in validation],
                "o-",
                color=color,
                label=name,
            )
        right.set_ylabel("validation")
        right.legend(loc="lower right")
    axes.set_title(pathlib.Path(model_dir).name)
    _save(figure, path)
    return path


def _curves_of_many(
    path: pathlib.Path, train: Sequence[Mapping], validation: Sequence[Mapping]
) -> None:
    """The losses of several members, and the means of each one's metrics."""
    figure = _figure(11, 4.5)
    left, right = figure.subplots(1, 2)
    names = dict.fromkeys(r["member"] for r in train)
    for axes, records, label in (
        (left, train, "training loss per target token"),
        (right, validation, "validation, mean of the metrics"),
    ):
        for name in names:
            own = [r for r in records if r["member"] == name]
            values = [
                r["loss"]
                if axes is left
                else np.mean([v for k, v in r.items() if k not in _KEYS])
                for r in own
            ]
            axes.plot([r["step"] for r in own], values, "o-", markersize=3, label=name)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
    if len(names) <= MOST_NAMES:
        left.legend(fontsize="small")
    figure.suptitle(path.parent.name)
    _save(figure, path)


def prompt(path: files.Path, norms: np.ndarray, cosines: np.ndarray) -> None:
    """Draws a prompt: the norm of every row, and how alike the rows are.

    Args:
      path: the picture, PNG.
      norms: ``[P]``.
      cosines: ``[P, P]``, of all pairs of rows.

    Raises:
      UserError: the picture cannot be written.
    """
    figure = _figure(10, 4.5)
    left, right = figure.subplots(1, 2)
    left.bar(np.arange(len(norms)), norms, width=1.0)
    left.set_xlabel("position")
    left.set_ylabel("norm of the row")
    image = right.imshow(cosines, vmin=-1.0, vmax=1.0, cmap="RdBu_r")
    right.set_xlabel("position")
    right.set_ylabel("position")
    figure.colorbar(image, ax=right, label="cosine")
    _save(figure, path)


def _figure(width: float, height: float) -> Any:
    # Imported here: it costs a second that runs without a plot need not pay.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: files.Path) -> None:
    with files.replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
