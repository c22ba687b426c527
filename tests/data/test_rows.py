# SPDX-License-Identifier: Apache-2.0
"""What people's files hold: each thing works, or is refused in one line that says where."""

import json
import os

import pytest

from prompt_tuning.data import rows, splits
from prompt_tuning.data.local_task import LocalTask
from prompt_tuning.errors import UserError


@pytest.fixture
def scanned(tmp_path):
    """Writes a file and gives line, values and error of its rows."""

    def scan(name, content, **options):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        found = rows.scan(path, **options)
        return [(r.line, dict(r.values), r.error) for r in found]

    return scan


@pytest.mark.parametrize("name", ["a.tsv", "A.TSV", "a.Tsv"])
def test_a_suffix_means_the_same_in_any_case(scanned, name):
    assert scanned(name, "x\ty\n1\t2\n") == [(2, {"x": "1", "y": "2"}, None)]


@pytest.mark.parametrize("name", ["rows.json", "rows", "rows.xls", "rows.tsv.gz"])
def test_other_suffixes_are_refused(scanned, name):
    with pytest.raises(UserError, match=r"jsonl"):
        scanned(name, '{"x": 1}\n')


def test_what_has_no_end_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.tsv")
    with pytest.raises(UserError, match="no regular file"):
        list(rows.scan(tmp_path / "a.tsv"))


def test_lines_end_at_a_newline_and_nowhere_else(scanned):
    text = "a\x0b\x0c\x1c\x85\u2028\u2029b\rc"
    assert scanned("a.txt", f"{text}\r\n\nd") == [
        (1, {"text": text}, None),
        (3, {"text": "d"}, None),
    ]
    assert scanned("a.tsv", f"x\n{text}\r\n") == [(2, {"x": text}, None)]
    line = json.dumps({"x": text}, ensure_ascii=False)
    assert scanned("a.jsonl", f"{line}\n") == [(1, {"x": text}, None)]


def test_quotes_of_tables(scanned):
    tsv = 'x\ty\n"He said ""hi"""\tq\n"foo"\tb\na "b" c\td\n"e\tf\tg\n'
    found = scanned("a.tsv", tsv)
    assert [values.get("x") for _, values, _ in found] == [
        'He said "hi"',
        '"foo"',
        'a "b" c',
        None,
    ]
    assert "save it as CSV" in found[-1][2]
    csv = 'x,y\n"a\nb, ""c""",d\n"bad"x,e\nf,g\n'
    assert scanned("a.csv", csv) == [
        (2, {"x": 'a\nb, "c"', "y": "d"}, None),
        (4, {}, "it is not CSV: ',' expected after '\"'"),
        (5, {"x": "f", "y": "g"}, None),
    ]


def test_long_fields_and_lines(scanned):
    field = "a" * 200_000
    assert scanned("a.csv", f"x,y\n{field},b\n") == [(2, {"x": field, "y": "b"}, None)]
    # A line without an end does not fill the memory, and costs no other row.
    long = b'{"x": "' + b"a" * (rows.LONGEST * 2) + b'"}\n{"x": 1}\n'
    found = scanned("a.jsonl", long)
    assert found[0][2] == f"it is longer than {rows.LONGEST} bytes"
    assert found[1] == (2, {"x": 1}, None)


@pytest.mark.parametrize(
    "line, message",
    [
        ("[" * 100_000, "not JSON that can be read"),
        (
            '{"x": ' + "[" * 70 + "]" * 70 + "}",
            "more than 64 values within one another",
        ),
        ('{"x": ' + "9" * 5_000 + "}", "not JSON that can be read"),
        ('{"x": NaN}', "NaN is no value of JSON"),
        ('{"x": -Infinity}', "-Infinity is no value of JSON"),
        ('{"x": 1e999}', "too large"),
        ('{"x": 1, "x": 2}', "two values called 'x'"),
        ("[1]", "no JSON object"),
        ("{'x': 1}", "not JSON: Expecting property name"),
        ('{"x": "\0"}', "zero byte"),
    ],
)
def test_hard_lines_of_json(scanned, line, message):
    found = scanned("a.jsonl", f'{{"x": 0}}\n{line}\n{{"x": 1}}\n')
    assert [error for _, _, error in (found[0], found[2])] == [None, None]
    assert message in found[1][2]
    assert "\n" not in found[1][2]


def test_texts_of_values():
    assert rows.text_of(["café", 1, None], "x") == '["café", 1, null]'
    assert rows.text_of(True, "x") == "true"
    with pytest.raises(UserError, match="half a character"):
        rows.text_of("\ud800", "x")
    with pytest.raises(UserError, match="half a character"):
        rows.text_of(["\ud800"], "x")


def test_encodings(scanned):
    assert scanned("a.tsv", b"\xef\xbb\xbfx\n\xc3\xa9\n") == [(2, {"x": "é"}, None)]
    for name in ("a.tsv", "a.jsonl", "a.csv", "a.txt"):
        for encoding in ("utf-16", "utf-16-le"):
            with pytest.raises(UserError, match="iconv -f UTF-16"):
                scanned(name, "x\ty\n".encode(encoding))
    latin = scanned("a.csv", b"x\nfine\n\xe9\nfine\n")
    assert "not UTF-8 (byte 0)" in latin[1][2]
    assert [values for _, values, _ in latin] == [{"x": "fine"}, {}, {"x": "fine"}]
    for name in ("a.tsv", "a.csv"):
        with pytest.raises(UserError, match="a carriage return alone"):
            scanned(name, b"x\r1\r2\r")
    with pytest.raises(UserError, match=r"line 1: .* not UTF-8"):
        scanned("a.tsv", b"\xe9\n1\n")


def test_columns_of_tables(scanned):
    assert scanned("a.csv", "1,2\n", columns=["x", "y"]) == [
        (1, {"x": "1", "y": "2"}, None)
    ]
    assert scanned("a.csv", "x,label:fine\n,a\n") == [
        (2, {"x": "", "label:fine": "a"}, None)
    ]
    for content, options in (("x,x\n", {}), ("1,2\n", {"columns": ["x", "x"]})):
        with pytest.raises(
            UserError, match="two columns of one name: x, x; rename one"
        ):
            scanned("a.csv", content, **options)
    with pytest.raises(UserError, match="names of columns are for tables"):
        scanned("a.jsonl", "{}\n", columns=["x"])
    with pytest.raises(UserError, match="path of a file of rows is empty: name one"):
        list(rows.scan(""))


def test_slices_of_splits():
    numbers = list(range(10))
    for split, want in [
        ("train", numbers),
        ("train[:3]", [0, 1, 2]),
        ("train[8:]", [8, 9]),
        ("train[20%:40%]", [2, 3]),
    ]:
        assert splits.name_of(split) == "train"
        assert numbers[splits.rows_of(split, 10)] == want
    for split in (
        "train[:11]",
        "train[3:3]",
        "train[-1:]",
        "train[:101%]",
        "train[a:]",
    ):
        with pytest.raises(UserError, match=r"train\["):
            splits.rows_of(split, 10)


# How such files become a task


@pytest.fixture
def task(tmp_path):
    def make(name, content, template="{x}", **options):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        options = {"label_names": ["no", "yes"], **options}
        return LocalTask({"train": str(path)}, template, **options)

    return make


def test_one_file_in_four_forms(task):
    forms = {
        "a.tsv": "x\tlabel\na b\t1\n",
        "a.csv": "x,label\na b,1\n",
        "a.jsonl": '{"x": "a b", "label": 1}\n',
    }
    for name, content in forms.items():
        assert task(name, content).read("train") == ([["a b"]], ["yes"])
    headerless = task("b.tsv", "1\ta b\n", columns=["label", "x"])
    assert headerless.read("train") == ([["a b"]], ["yes"])
    with pytest.raises(UserError, match="name a table's columns in COLUMNS"):
        task("b.tsv", "1\ta b\n2\tc\n").read("train")


def test_values_of_labels_that_are_no_texts(task):
    names = {True: "yes", False: "no"}
    for name, content in [
        ("a.jsonl", '{"x": "a", "label": true}\n'),
        ("a.tsv", "x\tlabel\na\tTrue\n"),
    ]:
        assert task(name, content, label_names=names).read("train") == (
            [["a"]],
            ["yes"],
        )


def test_columns_may_have_any_name(task):
    local = task(
        "a.tsv", "a:b\tlabel:fine\nc\tyes\n", "{a:b}", target_column="label:fine"
    )
    assert local.read("train") == ([["c"]], ["yes"])
    with pytest.raises(UserError, match="give a column of that name another"):
        task("a.tsv", "prompt\tlabel\nc\tyes\n", "{prompt}").read("train")


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"x": "\\ud800", "label": 1}', "line 1: column 'x' holds half a character"),
        ('{"x": "", "label": 1}', "line 1: the text is empty"),
        ('{"x": "a", "label": null}', "line 1: there is no column 'label'; it has x"),
        ('{"x": "a", "label": 1.0}', "line 1: label '1.0' is none of '0', '1'"),
    ],
)
def test_rows_that_no_command_takes(task, row, message):
    with pytest.raises(UserError) as caught:
        task("a.jsonl", f"{row}\n").read("train")
    assert message in str(caught.value)


def test_an_empty_free_text_target_is_refused(task):
    local = task("a.tsv", "x\tlabel\na\t\n", label_names=None)
    with pytest.raises(UserError, match="line 2: the target is empty"):
        local.read("train")


@pytest.mark.parametrize(
    "names, message",
    [
        ([1, 2, 3], "LABEL_NAMES has 1, which is no text"),
        ({0: ["no"], 1: ["yes"]}, r"LABEL_NAMES has \['no'\]"),
        (5, "give a list of texts"),
        (["a", "\ud800"], "which is no text"),
    ],
)
def test_label_names_are_texts(task, names, message):
    with pytest.raises(UserError, match=message):
        task("a.tsv", "x\tlabel\na\t1\n", label_names=names).read("train")


def test_an_index_that_is_another_name_is_refused_with_both_readings(task):
    stars = ["1", "2", "3", "4", "5"]
    local = task("a.tsv", "x\tlabel\na\t0\nb\t1\n", label_names=stars)
    with pytest.raises(UserError) as caught:
        local.read("train")
    assert "the label '1' by its name or '2' by its index" in str(caught.value)
    by_index = task(
        "a.tsv", "x\tlabel\na\t0\nb\t1\n", label_names=dict(enumerate(stars))
    )
    assert by_index.read("train")[1] == ["1", "2"]
    # Where both readings agree there is nothing to refuse.
    same = task("a.tsv", "x\tlabel\na\t0\nb\t1\n", label_names=["0", "1"])
    assert same.read("train")[1] == ["0", "1"]
