# SPDX-License-Identifier: Apache-2.0
"""Metrics give what the reference packages give; queries are run on a leash."""

import importlib.util
import random
import sqlite3
import time

import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer
from scipy import stats
from sklearn import metrics as sklearn_metrics

from prompt_tuning.data import answer_statistics, metrics, sql_metrics, text_metrics
from prompt_tuning.errors import UserError

WORDS = ["the", "a", "cat", "sat", "on", "mat", ".", ",", "U.S.", "3.5", "don't"]


def texts(seed, least=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(least, 12))) for _ in range(60)]


TARGETS, OTHERS, PREDICTIONS = texts(1, least=1), texts(2, least=1), texts(3)
# One or two references of each row.
SEVERAL = [[a, b] if i % 2 else [a] for i, (a, b) in enumerate(zip(TARGETS, OTHERS))]


def test_rouge_is_that_of_rouge_score():
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"])
    lines = lambda text: text.replace(" . ", " .\n")
    rows = [
        scorer.score(lines(target), lines(answer))
        for target, answer in zip(TARGETS, PREDICTIONS)
    ]
    want = {
        name: 100 * np.mean([row[name].fmeasure for row in rows]) for name in rows[0]
    }
    assert text_metrics.rouge(TARGETS, PREDICTIONS) == pytest.approx(want, rel=1e-12)
    # The target that fits best counts.
    assert text_metrics.rouge([["x", "a cat"]], ["a cat"])["rouge2"] == 100


def test_bleu_and_chrf_are_those_of_sacrebleu():
    second = [row[1] if len(row) > 1 else None for row in SEVERAL]
    for targets, references in [
        (TARGETS, [TARGETS]),
        (SEVERAL, [TARGETS, second]),
    ]:
        bleu = sacrebleu.corpus_bleu(PREDICTIONS, references).score
        assert text_metrics.bleu(targets, PREDICTIONS)["bleu"] == pytest.approx(bleu)
        chrf = sacrebleu.corpus_chrf(PREDICTIONS, references).score
        assert text_metrics.chrf(targets, PREDICTIONS) == {"chrf": chrf}
    assert bleu > 1


def test_correlations_are_those_of_scipy():
    draw = np.random.default_rng(0)
    targets = draw.normal(size=50).round(1)
    answers = targets + draw.normal(size=50).round(1)
    as_text = lambda numbers: [str(x) for x in numbers]
    for name, reference in [("pearson", stats.pearsonr), ("spearman", stats.spearmanr)]:
        (metric,) = metrics.by_name([name])
        want = 100 * reference(targets, answers).statistic
        found = metric(as_text(targets), as_text(answers))
        assert found == {name: pytest.approx(want)}
        # An answer that is no number is -1, one answer for all says nothing.
        found = metric(as_text(targets), ["none", "nan", *as_text(answers[2:])])
        want = 100 * reference(targets, [-1, -1, *answers[2:]]).statistic
        assert found == {name: pytest.approx(want)}
        assert metric(as_text(targets), ["1.0"] * 50) == {name: 0}


@pytest.mark.parametrize(
    "target, answer, em, f1",
    [
        # By the official evaluation of SQuAD 1.1.
        ("the Norman dynasty", "Norman Dynasty.", 1, 1),
        ("10th century", "in the 10th century", 0, 0.8),
        ("a b b", "b b b", 0, 0.8),
        ("Denmark", "Iceland", 0, 0),
        (["Denmark", "Iceland and Norway"], "Norway", 0, 0.5),
        ("the", "a", 1, 1),
        ("the", "Norway", 0, 0),
    ],
)
def test_squad(target, answer, em, f1):
    found = text_metrics.squad([target], [answer])
    assert found == {"em": pytest.approx(100 * em), "f1": pytest.approx(100 * f1)}
    assert text_metrics.em([target], [answer]) == {"em": found["em"]}


@pytest.mark.parametrize(
    "target, answer, right",
    [
        ("#### 1,024", "1024", True),
        ("#### 72", "3 + 69 = 72.00 clips", True),
        ("#### 72", "72 of 80", False),
        ("#### -5", "it fell by -5", True),
        ("#### 0.5", ".5", True),
        ("#### 5", "five", False),
    ],
)
def test_math_accuracy(target, answer, right):
    found = text_metrics.math_accuracy([target], [answer])
    assert found == {"math_accuracy": 100.0 * right}


@pytest.mark.parametrize(
    "names, labels, says",
    [
        (["rouge2"], None, "no metric is called 'rouge2': choose from accuracy"),
        (["accuracy:x"], None, "no metric is called 'accuracy:x'"),
        ([3], None, "no metric is called 3"),
        (["f1"], None, "second of two labels .* squad for the F1 of words"),
        (["f1"], ["a", "b", "c"], "second of two labels"),
        (["rouge"], ["a", "b"], "compares free texts.* one of 2 labels"),
        (["squad"], ["a", "b"], "compares free texts"),
        (["pearson"], ["1", "two"], "LABEL_NAMES: the metric pearson is of numbers"),
        (["sql_execution"], ["a", "b"], "compares free texts"),
    ],
)
def test_a_metric_that_the_answers_cannot_have(names, labels, says):
    with pytest.raises(UserError, match=says):
        metrics.by_name(names, labels)


def test_targets_that_are_no_numbers():
    metrics.check_targets(["pearson"], ["1", "-2.5e3"], "x.tsv")
    metrics.check_targets(["accuracy"], ["one"], "x.tsv")
    with pytest.raises(UserError, match="x.tsv: .*spearman is of numbers, and 'one'"):
        metrics.check_targets(["accuracy", "spearman"], ["1", "one"], "x.tsv")


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, package in [("rouge", "rouge-score"), ("bleu", "sacrebleu")]:
        with pytest.raises(UserError, match=f"needs {package}: pip install"):
            metrics.by_name([name])


# SQL


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    path = tmp_path_factory.mktemp("sql") / "cities.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE city (name TEXT, people INT)")
        rows = [("Ghent", 265), ("Bruges", 118), ("Antwerp", 530)] * 60
        connection.executemany("INSERT INTO city VALUES (?, ?)", rows)
    return path


TARGET = "SELECT DISTINCT name FROM city WHERE people > 200"


@pytest.mark.parametrize(
    "query, target, right",
    [
        ("select distinct NAME from CITY where 200 < people;", TARGET, True),
        (f"{TARGET} order by name desc", TARGET, True),
        ("select name from city where people > 200", TARGET, False),
        (f"{TARGET} ORDER BY people", f"{TARGET} ORDER BY people", True),
        (f"{TARGET} ORDER BY people DESC", f"{TARGET} ORDER BY people", False),
        ("SELECT 2.0", "SELECT 2", True),
        ("SELECT 'x'", "SELECT 'X'", False),
        ("SELECT nothing", "SELECT nothing", False),
    ],
)
def test_execution(query, target, right, database):
    (metric,) = metrics.by_name([f"sql_execution:{database}"])
    assert metric([target], [query]) == {"sql_execution": 100.0 * right}


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM city",
        "DROP TABLE city",
        "SELECT 1; DROP TABLE city",
        "INSERT INTO city VALUES ('x', 1)",
        "PRAGMA writable_schema = 1",
        "ATTACH '/etc/passwd' AS other",
        "VACUUM INTO 'copy.sqlite'",
        "SELECT load_extension('evil')",
        "SELECT readfile('/etc/passwd')",
        "SELECT zeroblob(2000000000)",
        "SELECT * FROM city a, city b, city c",
        "SELECT 1\0",
        "SELECT '\ud800'",
        "",
    ],
)
def test_queries_that_are_not_run(query, database, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = database.read_bytes()
    found = sql_metrics.sql_execution(["SELECT 1"], [query], database=str(database))
    assert found == {"sql_execution": 0.0}
    assert database.read_bytes() == before and not list(tmp_path.iterdir())


def test_a_query_without_end_is_stopped(database, monkeypatch):
    monkeypatch.setattr(sql_metrics, "SECONDS", 0.1)
    endless = (
        "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) "
        "SELECT count(*) FROM n"
    )
    start = time.monotonic()
    found = sql_metrics.sql_execution([TARGET], [endless], database=str(database))
    assert found == {"sql_execution": 0.0} and time.monotonic() - start < 5


def test_no_database(tmp_path):
    for name, says in [("", "'none' is none"), (str(tmp_path), "is none: write")]:
        with pytest.raises(UserError, match=says):
            sql_metrics.sql_execution([TARGET], [TARGET], database=name)
    path = tmp_path / "text.sqlite"
    path.write_text("no database, but a text of some length" * 9)
    with pytest.raises(UserError, match="is no SQLite database"):
        sql_metrics.sql_execution([TARGET], [TARGET], database=str(path))


def test_exact_match_of_queries():
    match = lambda a, b: sql_metrics.sql_exact_match([a], [b])["sql_exact_match"]
    assert match("SELECT a , b FROM t", "select a,b  from T ;") == 100
    assert match("SELECT 'A b'", "SELECT 'a b'") == 0
    assert match("SELECT a b", "SELECT ab") == 0


# What metrics leave out


def test_statistics_of_labels_are_those_of_sklearn():
    draw, labels = random.Random(0), ["no", "yes", "may be"]
    targets = draw.choices(labels, k=80)
    answers = draw.choices([*labels, "never"], k=80)
    found = answer_statistics.of_labels(answers, targets, labels)
    table = sklearn_metrics.confusion_matrix(
        targets, answers, labels=[*labels, "never"]
    )
    assert found["illegal_answers"] == answers.count("never") > 0
    rows = [list(row.values()) for row in found["confusion"].values()]
    assert rows == table[:3].tolist()
    scores = sklearn_metrics.classification_report(
        targets, answers, labels=labels, output_dict=True, zero_division=0
    )
    for label in labels:
        one = found["labels"][label]
        assert one["f1"] == pytest.approx(100 * scores[label]["f1-score"])
        assert one["precision"] == pytest.approx(100 * scores[label]["precision"])
        assert one["recall"] == pytest.approx(100 * scores[label]["recall"])
        assert one["targets"] == scores[label]["support"]
        assert one["answers"] == answers.count(label)


def test_calibration_error():
    # Of answers that are sure by 0.9 all are right, by 0.6 one of two.
    rows = [{"a": 0.9, "b": 0.1}] * 2 + [{"a": 0.4, "b": 0.6}] * 2
    found = answer_statistics.calibration_error(rows, ["a", "a", "b", "a"])
    assert found == pytest.approx(100 * (0.5 * 0.1 + 0.5 * 0.1))
    assert answer_statistics.calibration_error([{"a": 1.0, "b": 0.0}], ["a"]) == 0


def test_intervals_are_those_of_scipy():
    draw = np.random.default_rng(1)
    right = draw.random(200) < 0.7
    targets, answers = ["a"] * 200, np.where(right, "a", "b").tolist()
    low, high = answer_statistics.intervals(metrics.accuracy, targets, answers)[
        "accuracy"
    ]
    want = stats.bootstrap(
        (right,), np.mean, n_resamples=5000, method="percentile", rng=draw
    ).confidence_interval
    assert low == pytest.approx(100 * want.low, abs=1)
    assert high == pytest.approx(100 * want.high, abs=1)
    # Pairs stay pairs, and each figure of a metric has its own.
    found = answer_statistics.intervals(text_metrics.squad, TARGETS, TARGETS, 20)
    assert found == {"em": (100, 100), "f1": (100, 100)}
    for metric in (text_metrics.bleu, text_metrics.chrf):
        ((name, value),) = metric(TARGETS, PREDICTIONS).items()
        low, high = answer_statistics.intervals(metric, TARGETS, PREDICTIONS, 100)[name]
        assert low < value < high
        none = answer_statistics.intervals(metric, ["a cat"] * 3, ["", "", ""], 5)
        assert none == {name: (0, 0)}


def test_which_answers_are_right():
    targets, answers = ["4", "a cat", "5"], ["it is 4", "cat", "6"]
    every = [metrics.METRICS[name] for name in ("rouge", "squad", "math_accuracy")]
    # Texts are graded by the first; articles are no words to the second.
    assert metrics.right(every, targets, answers) == [False, True, False]
    assert metrics.right(every[2:], targets, answers) == [True, False, False]
    assert metrics.right(every[:1], targets, answers) is None
    assert metrics.right(every, [], []) is None
