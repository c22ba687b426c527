# SPDX-License-Identifier: Apache-2.0
"""The learning curve: what is marked, and what the axes and the legend may not do."""

import json

import pytest

from prompt_tuning import plots


def records(name, values, metric="accuracy"):
    found = []
    for step, value in enumerate(values, 1):
        whose = {"step": 10 * step, "member": name}
        found.append({"split": "train", **whose, "loss": 1 / step, "grad_norm": 1.0})
        found.append({"split": "validation", **whose, metric: value})
    return found


def row(name, task, best_step, **answers):
    return {
        "name": name,
        "task": task,
        "best_step": best_step,
        "answers": {"majority_accuracy": 50.5, **answers},
    }


@pytest.fixture(scope="module")
def figure():
    members = {
        "a": row("a", "films", 20, tf_idf_accuracy=61.0),
        "b": row("b", "films", 30),
        "c": row("c", "titles", 10),
    }
    made = [
        *records("a", [51.0, 52.5, 52.0]),
        *records("b", [50.0, 51.0, 51.5]),
        *records("c", [20.0, 19.0, 18.0], "f1"),
        {"split": "pace", "step": 30, "steps_per_second": 2.0},
    ]
    found = plots.curves(made, members, "run")
    found.canvas.draw()
    return found


def lines(axes, label):
    return [line for line in axes.lines if line.get_label() == label]


def test_every_metric_of_a_task_has_axes_of_its_own(figure):
    names = [axes.get_ylabel() for axes in figure.axes]
    assert names == ["training loss per target token", "accuracy, films", "f1, titles"]
    assert len(lines(figure.axes[2], "a")) == 0


def test_the_best_step_is_marked_in_all_axes(figure):
    points = {
        (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
        for axes in figure.axes
        for line in lines(axes, "best step")
    }
    assert points == {
        (20, 0.5),
        (30, 1 / 3),
        (10, 1.0),
        (20, 52.5),
        (30, 51.5),
        (10, 20),
    }


def test_baselines_are_lines_where_they_are_accuracies(figure):
    loss, accuracy, f1 = figure.axes
    (majority,) = lines(accuracy, "most frequent label")
    (words,) = lines(accuracy, "TF-IDF and logistic regression")
    assert set(majority.get_ydata()) == {50.5} and set(words.get_ydata()) == {61.0}
    assert not lines(loss, "most frequent label") + lines(f1, "most frequent label")


def test_axes_do_not_blow_up_noise(figure):
    loss, accuracy, f1 = figure.axes
    assert loss.get_ylim()[0] == 0
    for axes in accuracy, f1:
        low, high = axes.get_ylim()
        assert high - low == pytest.approx(20)
    flat = plots.curves(records("a", [100.0, 99.5]), {}, "run").axes[1]
    assert flat.get_ylim() == pytest.approx((81, 101))
    steep = plots.curves(records("a", [10.0, 90.0]), {}, "run").axes[1]
    assert steep.get_ylim() == pytest.approx((6, 94))
    log = plots.curves(records("a", [-0.70, -0.69], "log_likelihood"), {}, "run").axes[
        1
    ]
    assert log.get_ylim()[1] - log.get_ylim()[0] == pytest.approx(0.14)


def test_the_legend_covers_no_axes(figure):
    (legend,) = figure.legends
    texts = {text.get_text() for text in legend.get_texts()}
    assert {"a", "b", "c", "best step", "most frequent label"} <= texts
    box = legend.get_window_extent()
    assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_the_picture_of_a_run(tmp_path):
    assert plots.learning_curve(tmp_path) is None
    text = "".join(json.dumps(record) + "\n" for record in records("a", [1.0, 2.0]))
    (tmp_path / "metrics.jsonl").write_text(text)
    path = plots.learning_curve(
        tmp_path, [{"name": "a", "task": "t", "diverged": True}]
    )
    assert path.read_bytes().startswith(b"\x89PNG")
