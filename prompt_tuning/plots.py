# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run, made of the records in ``metrics.jsonl``."""

import os
import pathlib

from prompt_tuning import report

CURVE_FILE = "learning_curve.png"


def learning_curve(model_dir: pathlib.Path) -> pathlib.Path | None:
    """Draws training loss and validation metrics over steps.

    Returns:
      The path of the picture, or None where there is nothing to draw.
    """
    # Imported here: it costs a second that runs without a plot need not pay.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = report.read_metrics(model_dir)
    train = [r for r in records if r["split"] == "train"]
    validation = [r for r in records if r["split"] == "validation"]
    if not train:
        return None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([r["step"] for r in train], [r["loss"] for r in train], color="tab:blue")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss per target token", color="tab:blue")
    if validation:
        right = axes.twinx()
        names = [k for k in validation[-1] if k not in ("split", "step")]
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
    path = pathlib.Path(model_dir) / CURVE_FILE
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=120)
    os.replace(partial, path)
    return path
