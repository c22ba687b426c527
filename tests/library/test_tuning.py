# SPDX-License-Identifier: Apache-2.0
"""Tuning and answering in Python: the numbers are those of the command line."""

import csv
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import prompt_tuning as pt
from prompt_tuning import cli, files, report
from prompt_tuning.data import vocabularies
from prompt_tuning.methods.lora import LoRA
from prompt_tuning.training import optimizers

ROOT = pathlib.Path(__file__).parents[2]
LABELS = ["good", "bad"]
SMALL = {"length": 3, "steps": 4, "batch_size": 8, "labels": LABELS, "quiet": True}


@pytest.fixture(scope="module")
def splits(reviews):
    """The local task's examples as pairs."""
    found = {}
    for split, path in reviews.items():
        with open(path) as file:
            lines = csv.DictReader(file, delimiter="\t")
            found[split] = [(row["sentence"], row["label"]) for row in lines]
    return found


@pytest.fixture(scope="module")
def run(base, splits):
    # The local task's validation rows are training rows, too.
    with pytest.warns(UserWarning, match="4 of 4 rows"):
        return pt.tune(
            base,
            splits["train"],
            validation=splits["validation"],
            learning_rate=0.3,
            init="sampled_vocab",
            label_scores="mean",
            # The gradient of tokens hardly depends on which rows a batch holds.
            label_loss=None,
            **SMALL,
        )


def test_the_prompt_is_that_of_the_command_line(run, train_words, tmp_path):
    """Each batch is as many rows as there are, so that their order decides little.

    Seqio shuffles across epochs: some are twice in its batches, and others wait.
    """
    words = train_words(
        MODEL_DIR=tmp_path,
        MIXTURE_OR_TASK_NAME="library_reviews",
        LABEL_SCORES="mean",
        LEARNING_RATE_FACTORS=optimizers.DECAYED,
        WARMUP_STEPS=None,
        DECAY_STEPS=SMALL["steps"],
    )
    words += ["--gin_file=prompts/sampled_vocab.gin"]
    assert cli.main(words) == 0
    theirs = pt.load_prompt(tmp_path)
    # Adafactor's first step is as good as a sign: the few gradients that all but vanish
    # may go either way, as sums of the same rows in another order do.
    difference = np.abs(run.prompt.array - theirs.array)
    assert np.mean(difference < 1e-5) > 0.85 and difference.max() < 0.61
    (ours,), (member,) = (
        results["members"]
        for results in (run.results, files.read_json(tmp_path / "results.json"))
    )
    (loss,), (their_loss,) = (
        [record["loss"] for record in records if record["split"] == "train"]
        for records in (run.records, report.read_metrics(tmp_path))
    )
    assert loss == pytest.approx(their_loss, rel=1e-2)
    assert ours["tokens_share"]["encoder"] == member["tokens_share"]["encoder"]
    assert run.metrics == theirs.card["metric"]
    for key in ("method", "placement", "labels", "vocabulary", "base_model", "recipe"):
        assert run.prompt.card[key] == theirs.card[key]
    assert run.prompt.card["label_scores"] == theirs.card["label_scores"] == "mean"
    assert ours["answers"] == member["answers"]
    assert member["answers"]["majority_accuracy"] == 50.0
    # Its validation rows are training rows, too.
    assert member["answers"]["tf_idf_accuracy"] == 100.0


def test_labels_are_compared_as_by_the_recipe_of_the_command_line(
    base, splits, tmp_path
):
    """The default; free answers have no labels to compare."""
    short = ROOT / "configs" / "recipes" / "short.gin"
    (loss,) = re.findall(r"^LABEL_LOSS = '(\w+)'$", short.read_text(), re.MULTILINE)
    found = {}
    for name, labels in (("labels", LABELS), ("free", None)):
        folder, given = tmp_path / name, {**SMALL, "labels": labels}
        pt.tune(base, splits["train"], learning_rate=0.3, folder=folder, **given)
        found[name] = files.read_json(folder / "run.json")["run"]["objective"]
    assert found["labels"]["label_loss"] == loss
    assert "label_loss" not in found["free"]


def test_answers_of_a_saved_prompt_are_those_that_were_measured(
    base, splits, run, tmp_path
):
    path = run.save(tmp_path / "reviews.safetensors")
    texts, targets = zip(*splits["validation"], strict=True)
    answers = pt.Predictor(base, [path])(texts)
    right = [row["answer"] == target for row, target in zip(answers, targets)]
    assert run.metrics == {"accuracy": pytest.approx(100 * np.mean(right))}
    assert [row["input"] for row in answers] == list(texts)
    assert sum(answers[0]["scores"].values()) == pytest.approx(1)
    again = pt.Predictor(base, run.prompt)([{"text": texts[0]}])
    assert again[0]["scores"] == pytest.approx(answers[0]["scores"], rel=1e-4)


def test_the_curve_is_a_picture(run, tmp_path):
    picture = run.plot(tmp_path / "curve.png")
    assert picture._repr_png_().startswith(b"\x89PNG")
    assert (tmp_path / "curve.png").read_bytes() == picture
    assert {record["split"] for record in run.records} >= {"train", "validation"}


def test_several_prompts_a_trial_of_rates_and_a_second_call(
    base, splits, tmp_path, capsys
):
    """Without validation the loss chooses the rate; the folder keeps run and trial."""
    tune = lambda **values: pt.tune(
        base,
        splits["train"],
        **{**SMALL, "learning_rate": [1e-6, 0.3], "folder": tmp_path / "run", **values},
        prompts=[{"seed": [0, 1]}],
    )
    found = tune()
    assert found.learning_rate == 0.3 and found.metrics == {}
    assert set(found.prompts) == {"seed_0", "seed_1"}
    assert "trying the learning rates 1e-06, 0.3 side" in capsys.readouterr().err
    assert found.results["learning_rate"]["share_of_run"] == 1.0
    again = tune()
    for name, prompt in found.prompts.items():
        np.testing.assert_array_equal(again.prompts[name].array, prompt.array)
    with pytest.raises(
        pt.UserError,
        match=r"another run.*batch_size.*another folder, or set allow_changes=True",
    ):
        tune(batch_size=16, learning_rate=0.3)
    predict = pt.Predictor(base, list(found.prompts.values()), combine="mean")
    (answer,) = predict(["a fine film"])
    assert answer["answer"] in LABELS and len(answer["answers"]) == 2


def test_what_metrics_give(base, splits):
    """Numbers by name; those that are none are no reason to show nothing."""
    given = {**SMALL, "steps": 1, "learning_rate": 0.3}
    tune = lambda metric: pt.tune(
        base, splits["train"], validation=[("so", "bad")], metrics=[metric], **given
    )
    with pytest.raises(pt.UserError, match="a metric gave 'x' .*numbers by name"):
        tune(lambda targets, answers: "x")
    found = tune(lambda targets, answers: {"odd": float("nan")})
    assert "labels good, bad)" in repr(found)


def test_free_text_by_an_adapter(base, tmp_path):
    train = [("the capital of France", "Paris"), ("the capital of Italy", "Rome")]
    small = {**SMALL, "labels": None, "steps": 2, "learning_rate": 0.3}
    small |= {"method": "deep_prompt", "name": "capitals", "folder": tmp_path}
    seen = []

    def compared(targets, answers):
        seen.append((list(targets), len(answers)))
        return {"accuracy": 0.0}

    found = pt.tune(
        base, train, validation=[("the capital", "~{Rome")], metrics=[compared], **small
    )
    assert found.prompt.card["labels"] is None and "accuracy" in found.metrics
    # As it was given, not as the vocabulary, which lacks two letters, would write it.
    assert seen[0] == (["~{Rome"], 1)
    prompt = pt.load_prompt(tmp_path)
    assert found.prompt.name == "capitals" and prompt.card == found.prompt.card
    (answer,) = pt.Predictor(base, prompt, max_answer_length=4)(["the capital"])
    assert set(answer) == {"input", "answer"}


def test_a_saved_prompt_says_how_long_what_starts_from_it_is(
    base, run, splits, tmp_path
):
    """Of one prompt and of one of several; another length than its own is refused."""
    saved = f"saved:{run.save(tmp_path / 'start.safetensors')}"
    few = {**SMALL, "steps": 1, "learning_rate": 0.1, "length": None}
    found = pt.tune(base, splits["train"], init=saved, **few)
    assert len(found.prompt.array) == 3
    starts = [{"prompt_init": saved}, {"prompt_init": "random", "prompt_length": 2}]
    both = pt.tune(base, splits["train"], prompts=starts, **few)
    assert sorted(len(each.array) for each in both.prompts.values()) == [2, 3]
    with pytest.raises(pt.UserError, match="set length=3"):
        pt.tune(base, splits["train"], init=saved, **few | {"length": 5})


def test_a_method_without_a_prompt_needs_no_length(base, splits):
    small = {**SMALL, "steps": 1, "learning_rate": 0.01, "method": LoRA(rank=2)}
    with pytest.raises(pt.UserError, match="lora has no prompt, so length=3"):
        pt.tune(base, splits["train"], **small)
    del small["length"]
    found = pt.tune(base, splits["train"], **small)
    assert "lora(rank=2) at 6 sites" in repr(found.prompt)


@pytest.mark.slow
def test_every_method_saves_loads_and_answers_in_the_same_way(base, splits, tmp_path):
    methods = ["prompt_tuning", "p_tuning", "prefix_tuning", LoRA(rank=2), "ia3"]
    found = pt.tune(
        base,
        splits["train"],
        prompts=[{"method": methods}],
        **{**SMALL, "steps": 2, "learning_rate": 0.03},
    )
    assert len(found.prompts) == len(methods)
    lora = next(p for p in found.prompts.values() if p.card["method"] == "lora(rank=2)")
    assert "lora(rank=2) at 6 sites" in repr(lora)
    paths = [
        prompt.save(tmp_path / f"{number}.safetensors")
        for number, prompt in enumerate(found.prompts.values())
    ]
    scores = [
        [
            list(row["scores"].values())
            for answer in pt.Predictor(base, prompts)(["a fine film", "a dull film"])
            for row in answer["answers"]
        ]
        for prompts in (list(found.prompts.values()), paths)
    ]
    np.testing.assert_array_equal(*scores)
    again = pt.load_prompt(lora.save(tmp_path / "peft", "peft"))
    assert again.card == lora.card and again.slots.keys() == lora.slots.keys()
    with pytest.raises(pt.UserError, match="the format 'npy' is for prompts"):
        lora.save(tmp_path / "npy", "npy")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"method": "lorra"}, "no method is called 'lorra'; choose "),
        ({"method": None}, "method=None must be the kind of a method"),
        ({"method": "model_tuning"}, "tunes the model itself, which is no prompt"),
        ({"method": "lora", "init": "random"}, "lora has a start of its own"),
        ({"prompts": [{"method": "none"}]}, "no method is called 'none'"),
        ({"length": 0}, "length=0 must be a whole number"),
        ({"length": True}, "length=True must be a whole number"),
        ({"batch_size": 2.5}, "batch_size=2.5 must be a whole number"),
        ({"steps": 0}, "steps=0 must be a whole number from 1"),
        ({"seed": "1"}, "seed='1' must be a whole number"),
        ({"seed": 2**40}, "must be 4294967295 or less"),
        ({"length": 10**7}, "must be 65536 or less"),
        ({"learning_rate": float("inf")}, "must be a number above 0"),
        ({"name": ".."}, "must be a word"),
        ({"learning_rate": 0}, "learning_rate=0 must be a number above 0"),
        ({"learning_rate": []}, "must list different rates"),
        ({"label_scores": "max"}, "label_scores='max' must be 'sum'"),
        ({"label_loss": "max"}, "^label_loss='max' must be None or one of"),
        ({"label_loss": "max", "labels": None}, "^label_loss='max' must be None"),
        ({"validation": None, "patience": 2}, "^patience=2 waits for evaluations"),
        ({"metrics": ["bleu"]}, "metric bleu compares free texts"),
        ({"metrics": "accuracy"}, "metrics='accuracy' must be a list"),
        ({"name": ""}, "name='' must be a word"),
        ({"init": "nowhere"}, "no prompt_init is called 'nowhere'"),
        ({"placement": "behind"}, "behind"),
        ({"prompts": [{"task": 1}]}, "prompts cannot set 'task'"),
        ({"prompts": [{"name": "a"}, {"name": "a"}]}, "called 'a'"),
        ({"prompts": {"seed": 1}}, "must be a list of dicts"),
        ({"input_length": 0}, "input_length=0 must be 1 or more"),
        ({"labels": ["good", "bad", "fair"]}, "no row of train has the label 'fair'"),
        ({"validation": []}, "validation is empty"),
    ],
)
def test_values_that_are_refused(base, splits, values, message):
    given = {**SMALL, "learning_rate": 0.3, **values}
    with pytest.raises(pt.UserError, match=message) as said:
        pt.tune(base, splits["train"], **given)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    "rows, message",
    [
        ("a text", "give a list of texts"),
        ([], "there is no text to answer"),
        (["a", None], "text 2: it is None: leave it out"),
        (["a", 3], "text 2: it is 3"),
        ([{"sentence": "a"}], "text 1: there is no column 'text'"),
        ([" "], "text 1: the text is empty"),
    ],
)
def test_texts_that_are_refused(base, run, rows, message):
    predict = pt.Predictor(base, run.prompt)
    with pytest.raises(pt.UserError, match=message):
        predict(rows)


def test_prompts_that_are_refused(base, run, tmp_path):
    for prompts, message in (
        ([], "give a list of prompts"),
        ([run], "one of the prompts is .*Run"),
        ([run.prompt, run.prompt], "there is a prompt 'prompt' already"),
        ([tmp_path / "none"], "there is no prompt at"),
    ):
        with pytest.raises(pt.UserError, match=message):
            pt.Predictor(base, prompts)
    with pytest.raises(pt.UserError, match="combine='most' must be one of vote"):
        pt.Predictor(base, run.prompt, combine="most")
    with pytest.raises(pt.UserError, match="base is str, not a model"):
        pt.Predictor("embedded:t5_1_1_mini", run.prompt)


def test_a_model_without_a_vocabulary(tiny_checkpoint, tmp_path):
    weights = (tiny_checkpoint / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(pt.UserError, match=r"vocabulary: give load\(\.\.\., vocab"):
        pt.load(tmp_path)
    found = pt.load(tmp_path, vocabulary="mini")
    assert found.vocabulary.fingerprint == vocabularies.load("mini").fingerprint
    with pytest.raises(pt.UserError, match="there is no folder .*nowhere"):
        pt.load(tmp_path / "nowhere")
    with pytest.raises(pt.UserError, match="a vocabulary of its own, .*leave vocab"):
        pt.load(tiny_checkpoint, vocabulary="byt5")


def test_the_readmes_program(tiny_checkpoint, tmp_path):
    """As printed, but for the sizes of model and run; it loads no TensorFlow."""
    text = (ROOT / "README.md").read_text()
    (program,) = re.findall(
        r"```python\n(import prompt_tuning as pt\n.*?)```", text, re.DOTALL
    )
    assert len(program.strip().splitlines()) <= 12
    program = program.replace("steps=100", "steps=4, length=4")
    program = program.replace("embedded:t5_1_1_mini", str(tiny_checkpoint))
    end = "\nimport sys\nprint(answers[0]['answer'], 'tensorflow' in sys.modules)\n"
    # One device.
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", program + end],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    answer, loaded = done.stdout.split()
    assert answer in ("negative", "positive") and loaded == "False"
    assert "trying the learning rates 0.03, 0.1, 0.3, 1, 3 side" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        "sentiment.safetensors",
        "learning_curve.png",
    }
