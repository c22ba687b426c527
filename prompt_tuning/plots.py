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
# Of a run of many tasks or metrics, so many axes are drawn, so many beside each other.
MOST_PANELS, COLUMNS = 12, 3
# What a metric's axis spans at least: points of a percentage, a share of other values.
LEAST_PERCENT, LEAST_SHARE = 20.0, 0.2
# What a record holds beside its values.
_KEYS = ("split", "step", "member")
_LOSS, _BEST = "loss", "best step"
_REFERENCES = (
    ("majority_accuracy", "most frequent label", "--"),
    ("tf_idf_accuracy", "TF-IDF and logistic regression", ":"),
)


def learning_curve(
    model_dir: files.Path, members: Sequence[Mapping[str, Any]] = ()
) -> pathlib.Path | None:
    """Draws training loss and validation metrics over steps; a line for each member.

    Args:
      model_dir: folder of the run.
      members: what its results say of each: where they say so, the best step is marked,
        and lines show what the most frequent label and TF-IDF get right.

    Returns:
      The path of the picture, or None where there is nothing to draw.
    """
    folder = pathlib.Path(model_dir)
    records = report.read_metrics(folder)
    if not any(record["split"] == "train" for record in records):
        return None
    figure = curves(records, {row["name"]: row for row in members}, folder.name)
    _save(figure, folder / CURVE_FILE)
    return folder / CURVE_FILE


def curves(
    records: Sequence[Mapping[str, Any]],
    members: Mapping[str, Mapping[str, Any]],
    title: str,
) -> Any:
    """The figure of `learning_curve`: the loss, and axes for each metric of each task.

    Args:
      records: those of ``metrics.jsonl``.
      members: see `learning_curve`, by name.
      title: above all.
    """
    panels: dict[tuple[str, str], list[Mapping[str, Any]]] = {("", _LOSS): []}
    for record in records:
        name = record.get("member", "")
        if record["split"] == "train":
            panels["", _LOSS].append(record)
        elif record["split"] == "validation":
            task = members.get(name, {}).get("task", "")
            for metric in record.keys() - set(_KEYS):
                panels.setdefault((task, metric), []).append(record)
    drawn = sorted(panels, key=lambda key: (key[1] != _LOSS, key))[:MOST_PANELS]
    tasks = {task for task, metric in drawn if metric != _LOSS}
    columns = min(len(drawn), COLUMNS)
    rows = -(-len(drawn) // columns)
    figure = _figure(2 + 4.5 * columns, 1 + 3.2 * rows)
    names = list(dict.fromkeys(r["member"] for r in panels["", _LOSS]))
    for number, (task, metric) in enumerate(drawn, 1):
        axes = figure.add_subplot(rows, columns, number)
        for name in names:
            own = [r for r in panels[task, metric] if r["member"] == name]
            if own:
                _line(axes, own, metric, members.get(name, {}), f"C{names.index(name)}")
        if metric == _LOSS:
            axes.set_ylabel("training loss per target token")
            axes.set_ylim(bottom=0)
        else:
            of_task = [row for row in members.values() if row.get("task") == task]
            _references(axes, metric, of_task)
            axes.set_ylabel(f"{metric}, {task}" if len(tasks) > 1 else metric)
            axes.set_ylim(_limits(axes))
        axes.set_xlabel("step")
    figure.suptitle(title)
    _legend(figure, names)
    return figure


def _line(
    axes: Any,
    records: Sequence[Mapping[str, Any]],
    metric: str,
    row: Mapping[str, Any],
    color: str,
) -> None:
    """A member's values, a star where it was best."""
    values = {record["step"]: record[metric] for record in records}
    marker = "" if metric == _LOSS else "o"
    label = records[0]["member"]
    axes.plot(
        values.keys(),
        values.values(),
        color=color,
        marker=marker,
        markersize=3,
        label=label,
    )
    if (best := row.get("best_step")) in values:
        axes.plot(
            best,
            values[best],
            linestyle="",
            marker="*",
            markersize=13,
            markerfacecolor=color,
            markeredgecolor="black",
            label=_BEST,
        )


def _references(axes: Any, metric: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """What knowing nothing, and words alone, would give."""
    answers = next((row["answers"] for row in rows if row.get("answers")), {})
    if metric != "accuracy":
        return
    for key, label, style in _REFERENCES:
        if (value := answers.get(key)) is not None:
            axes.axhline(value, color="gray", linestyle=style, label=label)


def _limits(axes: Any) -> tuple[float, float]:
    """Of a metric's axis, so wide that noise does not look like progress."""
    values = np.concatenate([np.asarray(x.get_ydata(), float) for x in axes.lines])
    low, high = float(values.min()), float(values.max())
    is_percent = low >= 0 and high <= 100
    least = (
        LEAST_PERCENT if is_percent else LEAST_SHARE * max(abs(low), abs(high), 1e-9)
    )
    more = max(least - (high - low), 0.1 * (high - low)) / 2
    low, high = low - more, high + more
    if is_percent:
        # Moved rather than cut, and a little beyond so that lines at the ends are seen.
        shift = max(-1 - low, 0) - max(high - 101, 0)
        low, high = max(low + shift, -1), min(high + shift, 101)
    return low, high


def _legend(figure: Any, names: Sequence[str]) -> None:
    """Below the axes, where it covers nothing."""
    found = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if not 1 < len(names) <= MOST_NAMES:
        found = {k: v for k, v in found.items() if k not in names}
    if found:
        figure.legend(
            found.values(),
            found.keys(),
            loc="outside lower center",
            ncols=min(len(found), 4),
            fontsize="small",
        )


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


# What an experiment's figure may say (see `experiment`).
FIGURE_KEYS = ("x", "by", "log", "label", "metrics")


def experiment(
    path: files.Path,
    groups: Sequence[Any],
    figure: Mapping[str, Any],
    title: str,
) -> None:
    """Draws what an experiment gave: means over the seeds, and bars of their spread.

    Args:
      path: the picture, PNG.
      groups: `runs.experiments.Group` of each cell.
      figure: ``x``, the value along the axis; ``by``, the value that lines or colours
        stand for (the method by default); ``log``, whether the axis is logarithmic. Where
        all x are numbers there are lines, else bars.
      title: above all.

    Raises:
      UserError: the picture cannot be written.
    """
    x, by = figure["x"], figure.get("by", "method")
    metrics = list(groups[0].metrics) if groups else []
    drawn = _figure(1.5 + 5 * max(len(metrics), 1), 4.2)
    places = list(dict.fromkeys(g.values[x] for g in groups if x in g.values))
    numeric = all(isinstance(place, int | float) for place in places)
    names = list(dict.fromkeys(str(group.values.get(by, "")) for group in groups))
    for number, metric in enumerate(metrics, 1):
        axes = drawn.add_subplot(1, len(metrics), number)
        for i, name in enumerate(names):
            own = [g for g in groups if str(g.values.get(by, "")) == name]
            own = [g for g in own if x in g.values]
            at = [g.values[x] if numeric else places.index(g.values[x]) for g in own]
            means = [g.metrics[metric][0] for g in own]
            spreads = [g.metrics[metric][1] or 0.0 for g in own]
            label, color = name.replace("_", " "), f"C{i}"
            if numeric:
                axes.errorbar(
                    at, means, spreads, marker="o", capsize=3, label=label, color=color
                )
            else:
                width = 0.8 / len(names)
                at = [place + (i - (len(names) - 1) / 2) * width for place in at]
                axes.bar(at, means, width, yerr=spreads, capsize=3, label=label)
        if numeric and figure.get("log"):
            axes.set_xscale("log")
        if numeric:
            axes.set_xticks(places, [str(place) for place in places])
            axes.minorticks_off()
        else:
            axes.set_xticks(range(len(places)), [str(place) for place in places])
        axes.set_xlabel(figure.get("label", x.replace("_", " ")))
        axes.set_ylabel(metric)
        if len(names) > 1:
            axes.legend(fontsize="small")
    drawn.suptitle(title)
    _save(drawn, path)


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
