# SPDX-License-Identifier: Apache-2.0
"""One page of HTML that needs nothing else: runs, evaluations and experiments side by side.

All that files say is put in as texts (see `html`); the page's own script is the only one
that its policy lets a browser run.
"""

import base64
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prompt_tuning.runs import charts, seed_summary
from prompt_tuning.runs.charts import Line
from prompt_tuning.runs.gathered import (
    Evaluation,
    Experiment,
    Facts,
    Found,
    Run,
    mapping,
    number,
)
from prompt_tuning.runs.html import Element, facts, folded, raw, table, tag, to_text

# Rows of a table of predictions, and characters of a text.
MOST_PREDICTIONS = 200
LONGEST = 1_000
# Records that are no curves of a member.
_NO_CURVES = ("split", "step", "member")
# Makes the section of a run's prompts, which needs more than its JSON.
Prompts = Callable[[Run], Sequence[Element]]


def page(found: Sequence[Found], prompts: Prompts) -> str:
    """The page as text.

    Args:
      found: what `gathered.gather` gave.
      prompts: shows the prompts of a run.
    """
    here = pathlib.Path(__file__).parent
    script = (here / "report.js").read_text(encoding="utf-8")
    style = (here / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )
    sections = [_section(i, each, prompts) for i, each in enumerate(found)]
    body = tag(
        "body",
        tag("h1", "Runs of prompt tuning"),
        tag(
            "p", "A column is sorted by a click on its head; curves tell their values."
        ),
        _overview(found),
        *sections,
        raw("script", script),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name_="viewport", content="width=device-width"),
        tag("title", "Runs of prompt tuning"),
        raw("style", style),
    )
    return "<!doctype html>\n" + to_text(tag("html", head, body, lang="en")) + "\n"


def _overview(found: Sequence[Found]) -> Element:
    """Every member of every run, and every evaluation, a line each."""
    lines = []
    for i, each in enumerate(found):
        where = i, each.name
        if isinstance(each, Run):
            cost = mapping(each.results.get("cost"))
            seconds = _figure(cost.get("wall_seconds"))
            for member in each.members:
                what = f"{_said(member, 'name')} on {_said(member, 'task')}"
                told = _metrics(member.get("validation"), {})
                kind = _said(each.results, "method")
                best = _figure(member.get("best_step"))
                lines.append([where, kind, what, told, best, seconds])
        elif isinstance(each, Evaluation):
            results = each.results
            what = f"{_said(results, 'task')}, {_said(results, 'split')}"
            told = _metrics(results.get("metrics"), results.get("intervals"))
            lines.append([where, "evaluation", what, told, "", ""])
        else:
            what = _said(each.results, "experiment")
            cells = len(each.rows) if isinstance(each, Experiment) else 0
            lines.append([where, "experiment", what, f"{cells} cells", "", ""])
    head = ["where", "kind", "of", "metrics", "best step", "seconds"]
    linked = [
        [tag("a", name, href=f"#part-{i}"), *cells] for (i, name), *cells in lines
    ]
    return table(head, linked)


def _section(i: int, found: Found, prompts: Prompts) -> Element:
    make: Callable[..., Iterator[Element]]
    if isinstance(found, Run):
        make, more = _run, (prompts,)
    elif isinstance(found, Evaluation):
        make, more = _evaluation, ()
    else:
        make, more = _experiment, ()
    return tag("section", tag("h2", found.name, id=f"part-{i}"), *make(found, *more))


def _run(run: Run, prompts: Prompts) -> Iterator[Element]:
    shown = ("method", "base_model", "seed", "versions", "pace")
    yield facts(flat({k: run.results[k] for k in shown if k in run.results}))
    yield tag("div", *_curves(run), class_="charts")
    yield tag("h3", "Members")
    head = ["name", "task", "values", "validation", "best step", "last step", "loss"]
    lines = [
        [
            _said(member, "name"),
            _said(member, "task"),
            _words(mapping(member.get("values"))),
            _metrics(member.get("validation"), {}),
            _figure(member.get("best_step")),
            _figure(member.get("last_step")),
            "diverged" if member.get("diverged") else _figure(member.get("loss")),
        ]
        for member in run.members
    ]
    answers = [
        _said(mapping(member.get("answers")), "answers") for member in run.members
    ]
    if any(answers):
        head.append("answers")
        lines = [[*line, given] for line, given in zip(lines, answers, strict=True)]
    yield table(head, lines)
    if cost := mapping(run.results.get("cost")):
        yield tag("h3", "Cost")
        yield facts(flat(cost))
    yield from prompts(run)
    if run.config is not None:
        yield folded("Configuration", tag("pre", run.config.expandtabs(4)))


def _curves(run: Run) -> Iterator[Element]:
    """A chart for each value that was recorded, with a line for each member."""
    lines: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for record in run.records:
        step, split = number(record.get("step")), str(record.get("split"))
        for name, value in record.items():
            known = number(value)
            if step is not None and known is not None and name not in _NO_CURVES:
                of = lines.setdefault((split, name), {})
                of.setdefault(str(record.get("member", "run")), []).append(
                    (step, known)
                )
    best = {str(m.get("name")): number(m.get("best_step")) for m in run.members}
    # Validation is what people look for first.
    for split, name in sorted(lines, key=lambda key: (key[0] != "validation", key)):
        drawn = [
            Line(
                member,
                [x for x, _ in points],
                [y for _, y in points],
                best.get(member) if split == "validation" else None,
            )
            for member, points in lines[split, name].items()
        ]
        yield charts.chart(drawn, x="step", y=f"{split}: {name}")


def _evaluation(found: Evaluation) -> Iterator[Element]:
    results = found.results
    shown = ("task", "split", "examples", "prompt", "calibration_error")
    shown += ("illegal_answers", "combine", "mean", "best", "versions")
    yield facts(flat({k: results[k] for k in shown if k in results}))
    ends = mapping(results.get("intervals"))
    lines = [
        [name, _figure(value), *_interval(ends.get(name))]
        for name, value in mapping(results.get("metrics")).items()
    ]
    yield table(["metric", "value", "95 % from", "to"], lines)
    if several := mapping(results.get("prompts")):
        lines = [[name, _metrics(own, {})] for name, own in several.items()]
        yield table(["prompt", "metrics"], lines)
    if labels := mapping(results.get("labels")):
        yield tag("h3", "Labels")
        names = ["precision", "recall", "f1", "targets", "answers"]
        lines = [
            [label, *(_figure(mapping(own).get(name)) for name in names)]
            for label, own in labels.items()
        ]
        yield table(["label", *names], lines)
    if confusion := mapping(results.get("confusion")):
        answers = list(
            dict.fromkeys(a for row in confusion.values() for a in mapping(row))
        )
        head = ["target \\ answer", *(answer or "(no label)" for answer in answers)]
        lines = [
            [target, *(_figure(mapping(row).get(answer)) for answer in answers)]
            for target, row in confusion.items()
        ]
        yield table(head, lines)
    if fairness := mapping(results.get("fairness")):
        yield from _fairness(fairness)
    if found.predictions:
        yield from _predictions(found.predictions)


def _fairness(found: Facts) -> Iterator[Element]:
    yield tag("h3", "Groups")
    figures = list(mapping(found.get("gaps")))
    lines = []
    for group, values in mapping(found.get("groups")).items():
        own = mapping(values)
        cells = [_metrics_of(own, own.get("intervals"), name) for name in figures]
        lines.append([group, _figure(own.get("rows")), *cells])
    gaps = [mapping(gap) for gap in mapping(found.get("gaps")).values()]
    between = [_metrics_of(gap, {"gap": gap.get("interval")}, "gap") for gap in gaps]
    lines.append(["largest gap", "", *between])
    head = ["group", "rows", *(name.replace("_", " ") for name in figures)]
    yield table(head, lines, sortable=False)
    yield tag("p", f"In percent; the positive label is {_said(found, 'positive')}.")


def _predictions(rows: Sequence[Facts]) -> Iterator[Element]:
    """Errors first, those of which the model was most sure before the others."""

    def sure(row: Facts) -> float:
        return number(mapping(row.get("scores")).get(str(row.get("answer")))) or 0.0

    wrong = [row for row in rows if row.get("right") is False]
    others = [row for row in rows if row.get("right") is not False]
    wrong.sort(key=sure, reverse=True)
    shown = [*wrong, *others][:MOST_PREDICTIONS]
    yield tag("h3", "Predictions")
    told = f"{len(rows)} rows"
    if any("right" in row for row in rows):
        told += f", {len(wrong)} of them wrong, errors first"
    if len(shown) < len(rows):
        told += f"; the first {len(shown)} are shown"
    yield tag("p", told)
    lines = []
    for row in shown:
        judged = row.get("right")
        right = ("right" if judged else "wrong") if isinstance(judged, bool) else ""
        mark = tag("span", right, class_="wrong") if right == "wrong" else right
        text = row.get("input", row.get("columns"))
        cells = [_text(row.get("target")), _text(row.get("answer")), _text(text)]
        lines.append([mark, f"{sure(row):.3f}" if row.get("scores") else "", *cells])
    yield table(["", "probability", "target", "answer", "input"], lines)


def _experiment(found: Found) -> Iterator[Element]:
    rows = found.rows if isinstance(found, Experiment) else []
    figure = mapping(found.results.get("figure"))
    x = str(figure.get("x"))
    names = list(dict.fromkeys(k for row in rows for k in mapping(row.get("metrics"))))
    yield facts([("experiment", _said(found.results, "experiment"))])
    plots = [_over(rows, x, name, figure) for name in names]
    yield tag("div", *(each for each in plots if each is not None), class_="charts")
    head, *lines = seed_summary.table(_groups(rows, names))
    if lines:
        yield tag("h3", "Mean ± standard deviation over the seeds")
        yield table(head, lines)
    yield tag("h3", "Cells")
    own = list(
        dict.fromkeys(k for row in rows for k in row if k not in ("metrics", "run"))
    )
    lines = [
        [
            *(_text(row.get(key)) for key in own),
            *(_figure(mapping(row.get("metrics")).get(name)) for name in names),
        ]
        for row in rows
    ]
    yield table([*(key.replace("_", " ") for key in own), *names], lines)
    grid = json.dumps(found.results.get("grid"), indent=2, ensure_ascii=False)
    yield folded("Grid", tag("pre", grid))


def _groups(rows: Sequence[Facts], metrics: Sequence[str]) -> list[seed_summary.Group]:
    """Cells that differ in their seeds alone, those apart that lack some metric."""
    plain: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        known = {m: number(mapping(row.get("metrics")).get(m)) for m in metrics}
        own = {k: _text(v) for k, v in row.items() if k not in seed_summary.NOT_OWN}
        has = tuple(name for name, value in known.items() if value is not None)
        plain.setdefault(has, []).append({**own, "metrics": known})
    return [
        group
        for has, those in plain.items()
        if has
        for group in seed_summary.summary(those, has)
    ]


def _over(rows: Sequence[Facts], x: str, metric: str, figure: Facts) -> Element | None:
    """Means over the seeds by ``x``, with a line for each choice of the other values."""
    lines: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        at = number(row.get(x))
        value = number(mapping(row.get("metrics")).get(metric))
        if at is not None and value is not None:
            rest = {
                k: v for k, v in row.items() if k not in ("metrics", "run", "seed", x)
            }
            lines.setdefault(_words(rest) or metric, {}).setdefault(at, []).append(
                value
            )
    if not lines:
        return None
    drawn = [
        Line(name, sorted(by), [sum(by[at]) / len(by[at]) for at in sorted(by)])
        for name, by in lines.items()
    ]
    called = str(figure.get("label") or x)
    log = figure.get("log") is True
    return charts.chart(drawn, x=called, y=f"{metric}, mean over seeds", log=log)


def flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Nested records as names with dots, and texts."""
    for key, value in values.items():
        if isinstance(value, dict) and before.count(".") < 3:
            yield from flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", _text(value)


def _text(value: Any) -> str:
    """A value as people read it, of `LONGEST` characters at most."""
    if value is None:
        return ""
    if number(value) is not None:
        return _figure(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _figure(value: Any) -> str:
    known = number(value)
    if known is None:
        return _text(value) if isinstance(value, str) else ""
    return (
        f"{known:,.0f}" if known.is_integer() and abs(known) < 1e15 else f"{known:.5g}"
    )


def _said(values: Facts, key: str) -> str:
    value = values.get(key)
    return _words(value) if isinstance(value, dict) else _text(value)


def _words(values: Facts) -> str:
    return ", ".join(f"{key} {_text(value)}" for key, value in values.items())


def _metrics(values: Any, intervals: Any) -> str:
    told = (
        f"{name} {_metrics_of(mapping(values), intervals, name)}"
        for name in mapping(values)
    )
    return ", ".join(told)


def _metrics_of(values: Facts, intervals: Any, name: str) -> str:
    ends = [end for end in _interval(mapping(intervals).get(name)) if end]
    return _figure(values.get(name)) + (f" ({' to '.join(ends)})" if ends else "")


def _interval(ends: Any) -> tuple[str, str]:
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        return "", ""
    return _figure(ends[0]), _figure(ends[1])
