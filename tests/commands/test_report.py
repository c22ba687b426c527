# SPDX-License-Identifier: Apache-2.0
"""`prompt-tuning report` shows what folders hold, and obeys nothing that stands in them."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from prompt_tuning import cli
from prompt_tuning.checkpoints import prompt_file
from prompt_tuning.commands import report
from prompt_tuning.errors import UserError
from prompt_tuning.runs import charts, html
from prompt_tuning.runs.charts import Line

HOSTILE = "<script>document.title='taken'</script>\"'&<img src=x onerror=alert(1)>"
ROWS = [("good", "bad", 0.6), ("good", "good", 0.9), ("bad", "good", 0.95)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def folder(tmp_path):
    """A run with its evaluation, and an experiment; every text of them is hostile."""
    run = tmp_path / "runs" / "first <b>"
    member = {
        "name": HOSTILE,
        "task": HOSTILE,
        "values": {HOSTILE: HOSTILE},
        "file": "prompt.safetensors",
        "best_step": 200,
        "last_step": 300,
        "loss": 0.25,
        "validation": {"accuracy": 73.507},
    }
    results = {
        "method": HOSTILE,
        "seed": 0,
        "cost": {"wall_seconds": 53.29, "energy": {"joules": None, "why": HOSTILE}},
        "members": [member],
    }
    write(run / "results.json", results)
    write(run / "config.gin", f"# {HOSTILE}\nBATCH_SIZE = 32\n")
    records = [
        {"split": split, "step": step, "member": HOSTILE, name: step / 4}
        for step in (100, 200, 300)
        for split, name in (("train", "loss"), ("validation", "accuracy"))
    ]
    lines = [json.dumps(record) for record in records]
    write(run / "metrics.jsonl", "\n".join([*lines, '{"cut sh']))
    card = {
        "base_model": {"name": "t5_1_1_mini"},
        "template": "{text}",
        "note": HOSTILE,
    }
    array = np.random.default_rng(0).normal(size=(3, 192)).astype(np.float32)
    prompt_file.save_prompt(run / "prompt.safetensors", array, card)
    figure = {"gap": 6.5, "interval": [-3.0, 16.0], "highest": "x", "lowest": "y"}
    evaluated = {
        "task": HOSTILE,
        "split": "test",
        "examples": 3,
        "metrics": {"accuracy": 33.33333},
        "intervals": {"accuracy": [10.0, 66.6]},
        "labels": {HOSTILE: {"precision": 1.0, "targets": 2}},
        "confusion": {HOSTILE: {HOSTILE: 1}},
        "fairness": {
            "positive": HOSTILE,
            "groups": {HOSTILE: {"rows": 3, "accuracy": 50.0, "intervals": {}}},
            "gaps": {"accuracy": figure, "true_positive_rate": None},
        },
    }
    write(run / "test" / "results.json", evaluated)
    predictions = [
        {
            "input": f"text {i} {HOSTILE}",
            "answer": answer,
            "target": target,
            "right": answer == target,
            "scores": {answer: sure},
        }
        for i, (answer, target, sure) in enumerate(ROWS)
    ]
    text = "".join(json.dumps(row) + "\n" for row in predictions)
    write(run / "test" / "predictions.jsonl", text)
    cells = [
        {
            "prompt_length": p,
            "seed": s,
            "method": HOSTILE,
            "metrics": {"accuracy": p + s},
        }
        for p in (1, 10, 100)
        for s in (0, 2)
    ]
    figure = {"x": "prompt_length", "log": True, "label": HOSTILE}
    grid = {"entries": [HOSTILE]}
    write(
        tmp_path / "length" / "experiment.json",
        {"experiment": HOSTILE, "grid": grid, "figure": figure, "rows": cells},
    )
    return tmp_path


class Page(HTMLParser):
    """What a browser would find: elements and the texts outside of scripts."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.text, self._in = [], [], "", ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self._in = tag

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        if self._in not in ("script", "style"):
            self.text += data


def test_a_page_shows_everything_and_obeys_nothing(folder, tmp_path, capsys):
    path = tmp_path / "page.html"
    assert cli.main(["report", str(folder), "--output", str(path)]) == 0
    assert "1 run, 1 evaluation, 1 experiment" in capsys.readouterr().err
    page = Page(path)
    # The page's own script and no other, no picture, nothing from elsewhere.
    assert page.tags.count("script") == 1 and "img" not in page.tags
    names = {name for name, _ in page.attributes}
    assert not {name for name in names if name.startswith("on") or name == "src"}
    hrefs = [value for name, value in page.attributes if name == "href"]
    assert hrefs and all(value.startswith("#part-") for value in hrefs)
    assert not re.search(r"(?i)https?:", path.read_text().replace("http-equiv", ""))
    # Shown as it is written.
    assert page.text.count(HOSTILE) > 20
    for shown in (
        "73.507",  # the run's metric
        "accuracy 33.333 (10 to 66.6)",
        "wall_seconds",
        "BATCH_SIZE = 32",
        "nearest tokens (cosine)",
        "6.5 (-3 to 16)",
        "3 rows, 2 of them wrong, errors first",
        "true positive rate",
        "101 ± 1.4",  # mean and spread of a cell of the experiment
    ):
        assert shown in page.text, shown
    # The error that it was most sure of, then the other, then what is right.
    order = [page.text.index(f"text {i} ") for i in (2, 0, 1)]
    assert order == sorted(order)


def test_curves_have_the_values_of_the_files(folder, tmp_path):
    path = tmp_path / "page.html"
    report.write_report([str(folder)], str(path))
    page = Page(path)
    points = [
        json.loads(value) for name, value in page.attributes if name == "data-points"
    ]
    assert [[100, 25], [200, 50], [300, 75]] in points
    assert [[1, 2], [10, 11], [100, 101]] in points  # means over the seeds
    # The best step is marked, on the validation's curve alone.
    assert page.tags.count("circle") == 1


@pytest.mark.parametrize(
    ("folders", "says"),
    [
        ([], "no folder to report on"),
        (["nowhere"], "nowhere is no folder"),
        (["empty"], "empty holds no run, evaluation or experiment"),
        (["damaged"], "results.json holds damaged JSON"),
    ],
)
def test_folders_that_hold_no_run(folders, says, tmp_path):
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    write(tmp_path / "damaged" / "results.json", '{"members": [')
    path = tmp_path / "page.html"
    with pytest.raises(UserError, match=says) as error:
        report.write_report([str(tmp_path / each) for each in folders], str(path))
    assert "\n" not in str(error.value) and not path.exists()


def test_a_base_that_is_no_model_is_an_error_and_no_page_without_words(
    folder, tmp_path
):
    path = tmp_path / "page.html"
    with pytest.raises(UserError, match="no model 'embedded:nope' is embedded"):
        report.write_report([str(folder)], str(path), base="embedded:nope")
    assert not path.exists()


def test_records_of_another_kind_are_passed_over(folder, tmp_path):
    strange = tmp_path / "strange"
    members = [3, {"name": ["x"], "validation": 7, "values": None, "file": "../../x"}]
    write(strange / "results.json", {"members": members, "cost": [1]})
    write(strange / "metrics.jsonl", '[1]\n{"step": "x"}\n{"step": 1, "loss": NaN}\n')
    write(strange / "eval" / "results.json", {"metrics": {"f1": "x"}, "split": 3})
    write(strange / "grid" / "experiment.json", {"rows": [{"metrics": 3}, None]})
    path = tmp_path / "page.html"
    report.write_report([str(strange)], str(path))
    assert '["x"]' in Page(path).text


def test_nothing_that_is_read_is_written_over(folder):
    config = folder / "runs" / "first <b>" / "config.gin"
    with pytest.raises(UserError, match="would be written over"):
        report.write_report([str(folder)], str(config))
    assert "BATCH_SIZE" in config.read_text()


def test_a_long_line_is_thinned_but_for_its_ends_and_its_mark():
    steps = list(range(1, 10_001))
    drawn = charts.chart([Line("x", steps, steps, marked=777)], x="step", y="loss")
    (line,) = drawn.iter("polyline")
    kept = [x for x, _ in json.loads(line.attrib["data-points"])]
    assert len(kept) <= charts.MOST_POINTS + 2
    assert kept[0] == 1 and kept[-1] == 10_000 and 777 in kept


@pytest.mark.parametrize(
    "values",
    [[0.0], [5.0, 5.0], [-1e308, 1e308], [math.nan, 1.0], [1e-300, 2e-300], [0, 1e15]],
)
@pytest.mark.parametrize("log", [False, True])
def test_every_finite_value_has_a_place(values, log):
    drawn = charts.chart([Line("x", values, values)], x="x", y="y", log=log)
    for each in drawn.iter("polyline"):
        for pair in each.attrib["points"].split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT


def test_texts_are_texts():
    shown = html.to_text(html.tag("p", "a", None, html.tag("br"), "<", class_='"<'))
    assert shown == '<p class="&quot;<">a<br>&lt;</p>'
    # Half a character, which JSON can spell and UTF-8 cannot.
    assert html.to_text(html.tag("p", "\ud800")).encode() == b"<p>\\ud800</p>"
    with pytest.raises(ValueError):
        html.raw("script", "</script>")
    with pytest.raises(ValueError):
        html.raw("p", "text")


def test_in_a_browser(folder, tmp_path, browser):
    """Tables sort, curves tell their values, and no file's script runs."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    path = tmp_path / "page.html"
    report.write_report([str(folder)], str(path))
    browser.get(path.as_uri())
    assert browser.title == "Runs of prompt tuning"
    tables = browser.find_elements(By.CSS_SELECTOR, "table.sortable")
    (table,) = [each for each in tables if "probability" in each.text]
    (button,) = [
        b for b in table.find_elements(By.TAG_NAME, "button") if b.text == "probability"
    ]
    shown = lambda: [
        row.find_elements(By.TAG_NAME, "td")[1].text
        for row in table.find_elements(By.CSS_SELECTOR, "tbody tr")
    ]
    assert shown() == ["0.950", "0.600", "0.900"]
    button.click()
    assert shown() == ["0.600", "0.900", "0.950"]
    button.click()
    assert shown() == ["0.950", "0.900", "0.600"]
    charts_ = browser.find_elements(By.CSS_SELECTOR, "svg.chart")
    (chart,) = [
        c for c in charts_ if c.accessible_name == "validation: accuracy by step"
    ]
    ActionChains(browser).move_to_element(chart).perform()
    tip = browser.find_element(By.ID, "tip").text
    assert tip.splitlines()[0] == "step 200" and tip.endswith(": 50")
    assert HOSTILE in tip
    errors = [e for e in browser.get_log("browser") if e["level"] == "SEVERE"]
    assert not errors
