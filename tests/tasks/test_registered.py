# SPDX-License-Identifier: Apache-2.0
"""Every registered task: its names, T5's formats, and TFDS's own feature specifications.

`pytest -m tasks` reads each of them from TFDS's mocked data.
"""

import itertools

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

import prompt_tuning.tasks  # noqa: F401  (registers the tasks)
from prompt_tuning.data import examples, lint
from prompt_tuning.runs import task_view
from prompt_tuning.tasks import (
    c4,
    features,
    generation,
    glue,
    grouped,
    labels,
    preprocessors,
    question_answering,
    super_glue,
)

pytestmark = pytest.mark.tasks
LENGTHS = {"inputs": 64, "targets": 32}
REGISTERED = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
VOCABULARIES, KINDS = ("", "mini_", "mt5_", "byt5_"), ("", "taskless_", "task_index_")
ENDS = ("", "_examples")


def test_names_that_t5x_users_type():
    """Those of google-research/prompt-tuning for the paper's tasks."""
    configs = tfds.builder_cls("glue").builder_configs
    every = [f"glue_{name}_{v}" for name in configs for v in ("v002", "v200")]
    every += [f"glue_mnli_and_dev_{v}" for v in ("v002", "v200")]
    every += [f"glue_{x}_v002" for x in ("mrpc_from_qqp", "qqp_from_mrpc")]
    every += [f"glue_{x}_zeroshot_v002" for x in ("mrpc_from_qqp", "qqp_from_mrpc")]
    superglue = {*tfds.builder_cls("super_glue").builder_configs} - {"wsc", "wsc.fixed"}
    every += [f"super_glue_{name}_v102" for name in superglue]
    every += [f"super_glue_wsc_v102_simple_{part}" for part in ("train", "eval")]
    every += ["super_glue_wsc_and_dev_v102_simple", "dpr_v001_simple"]
    names = {
        f"{vocabulary}{kind}{name}{end}"
        for vocabulary, kind, name, end in itertools.product(
            VOCABULARIES, KINDS, every, ENDS
        )
    }
    mrqa = question_answering.OUT_OF_DOMAIN + question_answering.IN_DOMAIN
    plain = ["squad_v010_allanswers", *(f"mrqa_{name}_v100" for name in mrqa)]
    plain += [
        f"squad_to_{name}" for name in (*question_answering.OUT_OF_DOMAIN, "mrqa")
    ]
    plain += ["xsum_v110", "cnn_dailymail_v310", "wmt_t2t_ende_v003"]
    names |= {
        f"{vocabulary}{name}{end}"
        for vocabulary, name, end in itertools.product(VOCABULARIES, plain, ENDS)
    }
    names |= {
        "c4_v220_bart_text_infilling",
        "c4_v220_bart_token_deletion",
        "c4_v220_span_corruption",
        "c4_v220_prefix_lm",
        "task_index_super_glue_v102_examples_proportional",
        "task_index_super_glue_with_dpr_v102_examples_proportional",
    }
    assert names <= REGISTERED


@pytest.mark.parametrize("module", [glue, super_glue], ids=["glue", "super_glue"])
def test_labels_are_those_of_tfds(module):
    configs = tfds.builder_cls(module.__name__.split(".")[-1]).builder_configs
    for name, (columns, label_names, *_) in module.CLASSIFICATION.items():
        assert tuple(configs[name].label_classes) == label_names
        assert columns
    # All configurations but those of another form are here.
    others = {"stsb", "record", "wsc", "wsc.fixed"}
    assert set(configs) - others == set(module.CLASSIFICATION)


# What the original got wrong: a mixture that lost its prefix, metrics that were given
# something else than texts, a postprocess function that was a tuple.


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_mixture_are_of_its_kind(kind):
    for name in seqio.MixtureRegistry.names():
        if not name.startswith(kind) or (kind == "" and "_" not in name):
            continue
        others = tuple(x for x in (*KINDS, *VOCABULARIES) if x)
        parts = [task.name for task in seqio.MixtureRegistry.get(name).tasks]
        begins = [any(part.startswith(x) for x in others) for part in parts]
        if kind:
            assert all(part.startswith(kind) for part in parts), name
        elif not name.startswith(others):
            assert not any(begins), name


def test_the_linter_finds_no_fault_in_any_task():
    """In names, variants and metrics of all, in the labels of those of our vocabulary."""
    faults = {}
    for name in sorted(REGISTERED):
        found = [*task_view.of_variants(name)]
        if name.startswith("mini_"):
            known = labels.label_set(name)
            found += lint.of_labels(known, features.vocabulary("mini"), LENGTHS)
        if wrong := [each for each in found if each.level == lint.FAULT]:
            faults[name] = wrong
    assert not faults


def compared(task, target, prediction, **example):
    """A task's metrics of one target and one decoded answer."""
    example = {"targets_pretokenized": target.encode(), **example}
    target = task.postprocess_fn(target, example=example, is_target=True)
    answer = task.postprocess_fn(prediction, example=example, is_target=False)
    found = {}
    for metric in task.predict_metric_fns:
        found |= metric([target], [answer])
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ENDS)
def test_zero_shot_tasks_compare_texts_in_the_labels_of_the_other(kind, end):
    for asked, tuned, answers in [
        ("mrpc", "qqp", ("not_duplicate", "duplicate")),
        ("qqp", "mrpc", ("not_equivalent", "equivalent")),
    ]:
        name = f"{kind}glue_{asked}_from_{tuned}_v002{end}"
        mixture = f"{kind}glue_{asked}_from_{tuned}_zeroshot_v002{end}"
        assert labels.label_set(name) == labels.label_set(mixture) == answers
        task = seqio.TaskRegistry.get(name)
        assert set(task.splits) == {"validation"}
        right = {"f1": 100, "accuracy": 100}
        assert compared(task, answers[1], f" {answers[1]}") == right
        assert set(compared(task, *answers).values()) == {0}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ENDS)
def test_pronouns_are_compared(kind, end):
    for name, answer in [
        (f"{kind}dpr_v001_simple{end}", " the bunny"),
        (f"{kind}super_glue_wsc_v102_simple_eval{end}", "fuzzy bunny"),
    ]:
        task = seqio.TaskRegistry.get(name)
        assert compared(task, "the bunny", answer, label=1) == {"accuracy": 100}
        assert compared(task, "the bunny", "a cat", label=1) == {"accuracy": 0}


@pytest.mark.parametrize(
    "answer, referent, right",
    [
        ("fuzzy bunny", "The bunny", 1),
        ("Bob", "Bob's hat", 0),
        ("", "Bob", -1),
        ("the", "Bob", -1),
        ("tom", "Bob", 0),
    ],
)
def test_what_counts_as_the_referent(answer, referent, right):
    example = {"label": 0, "targets_pretokenized": referent.encode()}
    assert grouped.is_referent(answer, example, False) == right
    assert grouped.is_referent(answer, example, True) == 0


# T5's formats, on rows written by hand


def made(function, row, **options):
    """What a text function makes of one row: a list of rows with texts."""
    ds = tf.data.Dataset.from_tensors(row)
    rows = list(function(ds, **options).as_numpy_iterator())
    text = lambda value: value.decode() if isinstance(value, bytes) else value
    return [{key: text(value) for key, value in one.items()} for one in rows]


def test_similarity():
    row = {"sentence1": "a b", "sentence2": "c", "label": np.float32(1.87)}
    assert made(preprocessors.similarity, row, task_name="stsb") == [
        {"inputs": "stsb sentence1: a b sentence2: c", "targets": "1.8"}
    ]
    (bare,) = made(preprocessors.similarity, row)
    assert bare["inputs"] == "sentence1: a b sentence2: c"


def test_question_answering():
    row = {
        "question": "Who (exactly)?",
        "context": "It was\nBob's dog.",
        "answers": {"text": ["Bob's dog", "the dog"]},
    }
    (found,) = made(preprocessors.question_answering, row, answers=("answers", "text"))
    assert (
        found["inputs"] == "question: Who ( exactly ) ? context: It was Bob ' s dog . "
    )
    assert found["targets"] == "Bob ' s dog"
    task = seqio.TaskRegistry.get("squad_v010_allanswers")
    right = np.array([b"Bob ' s dog", b"the dog"], object)
    scores = compared(task, "Bob ' s dog", "a dog", answers=right)
    assert scores == {"em": 100, "f1": 100}


@pytest.mark.parametrize(
    "text, index, pronoun, marked",
    [
        ("Mitchell asked Tom if he could go.", 4, "he", "Tom if *he* could"),
        # Punctuation stands on the pronoun, or the index is off by one.
        ('It is "Good for him," he said.', 4, "him", 'for *him*," he said'),
        ("They might want to use it , but really", 4, "it", "use *it* , but"),
        ("he said that he would", 3, "he", "he said that *he* would"),
    ],
)
def test_winograd_schemas(text, index, pronoun, marked):
    row = {
        "text": text,
        "span1_text": "Tom",
        "span2_text": pronoun,
        "span2_index": np.int32(index),
        "label": np.int64(0),
    }
    (found,) = made(
        preprocessors.marked_pronoun, row, right_only=False, task_name="wsc:"
    )
    assert found["inputs"].startswith("wsc: ") and marked in found["inputs"]
    assert found["inputs"].replace("*", "") == f"wsc: {text}"
    assert found["targets"] == "Tom" and found["label"] == 0
    assert made(preprocessors.marked_pronoun, row, right_only=True) == []


def test_pronoun_resolution():
    row = {
        "sentence": "Bob asked Tom if he can lend, and he did.",
        "pronoun": "he",
        "candidates": ["Bob", "Tom"],
        "label": np.int64(1),
    }
    assert made(preprocessors.resolved_pronoun, row, task_name="wsc:") == [
        {
            "inputs": "wsc: Bob asked Tom if *he* can lend, and he did.",
            "targets": "Tom",
        }
    ]


def test_cloze():
    row = {
        "query": "A @placeholder is a bird.",
        "passage": "It flies.\n@highlight\nIt sings\n@highlight\nEnd",
        "entities": ["penguin", "potato"],
        "answers": ["penguin", "pigeon"],
        "idx": {"passage": np.int32(3), "query": np.int32(5)},
    }
    first, second = made(preprocessors.cloze, row, task_name="record")
    assert (
        first["inputs"]
        == second["inputs"]
        == (
            "record query: A @placeholder is a bird. entities: penguin, potato passage: "
            "It flies. It sings. End"
        )
    )
    assert [first["targets"], second["targets"]] == ["penguin", "pigeon"]
    task = seqio.TaskRegistry.get("super_glue_record_v102")
    give = {key: first[key] for key in ("answers", "group")}
    assert compared(task, "penguin", "Pigeon", **give) == {"em": 100, "f1": 100}
    # Of the rows of one question the first counts.
    metric = task.predict_metric_fns[0]
    target = grouped.Member(["a"], (1, 2))
    assert metric([target, target], ["a", "b"])["em"] == 100
    (withheld,) = made(
        preprocessors.cloze, {**row, "answers": tf.constant([], tf.string)}
    )
    assert withheld["targets"] == "<unk>"


def test_questions_with_several_answers():
    """MultiRC: F1 over all answers, and the questions whose answers are all right."""
    task = seqio.TaskRegistry.get("super_glue_multirc_v102")
    targets = [grouped.Member(*x) for x in [("True", 1), ("False", 1), ("True", 2)]]
    found = {}
    for metric in task.predict_metric_fns:
        found |= metric(targets, ["True", "True", "True"])
    assert found == {"f1": pytest.approx(80), "exact_match": 50}


# Pre-training objectives


@pytest.mark.parametrize("name", c4.OBJECTIVES)
@pytest.mark.parametrize("inputs, targets", [(16, 8), (8, 16), (512, 512)])
def test_objectives_fit_and_keep_the_text(name, inputs, targets):
    ids = np.arange(100, 140)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        made_inputs, made_targets = c4.OBJECTIVES[name](ids, rng, inputs, targets, 8192)
        assert 2 <= len(made_inputs) <= inputs and 2 <= len(made_targets) <= targets
        assert made_inputs[-1] == made_targets[-1] == 1
        left = lambda x: [i for i in x[:-1].tolist() if i < 8000]
        kept = sorted({*left(made_inputs), *left(made_targets)})
        # One unbroken chunk of the text, nothing else.
        assert kept == list(range(kept[0], kept[-1] + 1))
        if name == "prefix_lm":
            assert left(made_inputs) + left(made_targets) == kept
        if name.startswith("bart"):
            assert left(made_targets) == kept


# TFDS's feature specifications


@pytest.fixture(scope="module")
def mocked_tfds():
    with tfds.testing.mock_data(num_examples=2):
        yield


# One of each text function.
QUICK = {
    "taskless_glue_mrpc_v200",
    "task_index_super_glue_multirc_v102",
    "super_glue_record_v102",
    "super_glue_wsc_v102_simple_eval",
    "dpr_v001_simple",
    "squad_v010_allanswers",
    "mrqa_bio_asq_v100",
    "gsm8k_v100",
    "wmt16_enro_v003",
    "c4_v220_span_corruption",
}


def read_by_tfds():
    """One task of each data set and kind, in the embedded model's vocabulary."""
    for name in sorted(seqio.TaskRegistry.names()):
        task = seqio.TaskRegistry.get(name)
        source = task.source
        if (
            not isinstance(source, seqio.TfdsDataSource)
            or not name.startswith("mini_")
            # The latter's version is none that today's TFDS knows.
            or name.endswith(("_examples", "cnn_dailymail_v310"))
        ):
            continue
        slow = name.removeprefix("mini_") not in QUICK
        yield pytest.param(name, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize("name", read_by_tfds())
def test_every_task_reads_its_data_set(name, mocked_tfds):
    task = seqio.TaskRegistry.get(name)
    split = next(iter(task.splits))
    ds = examples.examples(task, split, LENGTHS)
    rows = list(ds.take(2).as_numpy_iterator())
    answers = labels.label_set(name)
    vocabulary = features.vocabulary("mini")
    for row in rows:
        assert row["inputs"][-1] == row["targets"][-1] == 1
        if answers is not None:
            assert row["targets_pretokenized"].decode() in (*answers, "<unk>")
        if name.startswith("mini_task_index_"):
            assert vocabulary.vocab_size - 20 < row["inputs"][0] < vocabulary.vocab_size
        text = row.get("inputs_pretokenized", b"").decode()
        if name.startswith("mini_taskless_glue"):
            bare = name.removeprefix("mini_taskless_glue_").split("_")[0]
            assert not text.startswith(f"{bare} ")
    # Mocked labels of WSC may leave no row whose referent is right.
    assert rows or "wsc" in name


@pytest.mark.parametrize("name", generation.TASKS)
def test_free_answers_name_their_metric(name):
    task = seqio.TaskRegistry.get(name)
    (metric,) = task.predict_metric_fns
    text = "the answer of it is 1"
    found = metric([text], [text]).values()
    assert list(found) == pytest.approx([100] * len(found))
