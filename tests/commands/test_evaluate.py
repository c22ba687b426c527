# SPDX-License-Identifier: Apache-2.0
"""``eval`` of one prompt, of several together and of the model alone, by one engine."""

import itertools
import json
import pathlib

import numpy as np
import pytest

from prompt_tuning import decoding
from prompt_tuning.checkpoints import base_models, prompt_file
from prompt_tuning.commands import evaluate
from prompt_tuning.data import answer_statistics
from prompt_tuning.data.local_task import LocalTask
from prompt_tuning.errors import UserError
from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.store import PromptStore
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.runs import task_data

CONFIG = T5Config(8192, 16, 2, 1, 1, 8, 32)
LENGTHS = {"inputs": 24, "targets": 4}
TEMPLATE = "{prompt:0:1} review: {sentence} {prompt:1:2}"
LABELS = ["good", "bad"]


@pytest.fixture(scope="module")
def source(tiny_checkpoint):
    return base_models.load(CONFIG, tiny_checkpoint)


@pytest.fixture(scope="module")
def prompts(source, tmp_path_factory):
    """Three prompts that answer differently; the last has the best metric."""
    return written(source, tmp_path_factory.mktemp("prompts"), LABELS)


@pytest.fixture(scope="module")
def free(source, tmp_path_factory):
    """The same prompts, for free text."""
    return written(source, tmp_path_factory.mktemp("free"), None)


def written(source, folder, labels):
    rng = np.random.default_rng(0)
    paths = []
    for accuracy, name in enumerate("abc"):
        card = {
            "base_model": source.identity,
            "vocabulary": "mini",
            "labels": labels,
            "template": TEMPLATE,
            "metric": {"accuracy": accuracy},
        }
        array = rng.normal(scale=5, size=(2 + accuracy, 16)).astype(np.float32)
        paths.append(str(folder / f"{name}.safetensors"))
        prompt_file.save_prompt(paths[-1], array, card)
    return paths


@pytest.fixture
def evaluated(tiny_checkpoint, reviews):
    def run(labels=LABELS, **more):
        return evaluate.evaluate(
            config=CONFIG,
            initial_checkpoint_path=str(tiny_checkpoint),
            mixture_or_task_name="evaluate_reviews",
            local_task=LocalTask(
                reviews, TEMPLATE, label_names=labels, vocabulary="mini"
            ),
            task_feature_lengths=LENGTHS,
            batch_size=8,
            **more,
        )

    return run


@pytest.fixture(scope="module")
def rows(reviews):
    lines = pathlib.Path(reviews["test"]).read_text().splitlines()[1:]
    return [line.split("\t") for line in lines]


def test_several_prompts_alone_and_together(evaluated, prompts, source, rows, tmp_path):
    """The numbers are those that come of asking the engine row by row."""
    found = evaluated(prompt_file=prompts, combine="mean", output_dir=str(tmp_path))
    store = PromptStore(source, 32)
    for path in prompts:
        store.load(path)
    engine = Engine(source, store, batch_sizes=(8,), longest=32)

    def said(prompt, **more):
        asked = [{"prompt": prompt, "sentence": text, **more} for text, _ in rows]
        return [row["answer"] for row in engine.answer(asked)]

    def accuracy(answers):
        right = [a == target for a, (_, target) in zip(answers, rows, strict=True)]
        return {"accuracy": 100 * np.mean(right)}

    alone = {name: accuracy(said(name)) for name in "abc"}
    assert found["prompts"] == alone
    values = [metrics["accuracy"] for metrics in alone.values()]
    assert found["mean"] == {"accuracy": pytest.approx(np.mean(values))}
    assert found["best"] == {"accuracy": max(values)}
    together = {
        rule: said(["a", "b", "c"], combine=rule) for rule in ("vote", "mean", "best")
    }
    assert found["combined"] == {k: accuracy(v) for k, v in together.items()}
    assert found["metrics"] == found["combined"]["mean"]
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer"] for line in lines] == together["mean"]


@pytest.mark.parametrize("labels", [LABELS, None], ids=["ranked", "decoded"])
def test_one_prompt_is_answered_as_in_training(
    evaluated, prompts, free, source, reviews, rows, labels, tmp_path
):
    prompts = prompts if labels else free
    found = evaluated(labels, prompt_file=prompts[2], output_dir=str(tmp_path))
    assert "combined" not in found and found["prompt"] == prompts[2]
    array, _ = prompt_file.load_prompt(prompts[2])
    bank = (Prompt("task", len(array)),)
    local = LocalTask(reviews, TEMPLATE, label_names=labels, vocabulary="mini")
    task = task_data.TaskData("evaluate_alike", None, local, LENGTHS, bank, 8192)
    evaluator = task.evaluator("test", Model(Transformer(source.config)), None, 8)
    want = evaluator({**source.params, "prompts": {"task": array}})
    assert found["metrics"] == want.metrics
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    pairs = list(zip(want.answers, want.targets, strict=True))
    assert [(row["answer"], row["target"]) for row in kept] == pairs
    low, high = found["intervals"]["accuracy"]
    assert low <= found["metrics"]["accuracy"] <= high
    assert found["intervals"] == want.intervals(1000)
    texts = [text for text, _ in rows]
    # One of the template's own words is there, the prompt's positions are not.
    assert [row["input"] for row in kept] == [f"review: {text}" for text in texts]
    assert [row["columns"]["sentence"] for row in kept] == texts
    assert [row["columns"]["label"] for row in kept] == [row["target"] for row in kept]
    assert [row["right"] for row in kept] == [a == t for a, t in pairs]
    first = ["input", "columns", "answer", "target", "right"]
    if labels is None:
        assert all(list(row) == first for row in kept)
        assert "confusion" not in found
        return
    assert all(max(r["scores"], key=r["scores"].get) == r["answer"] for r in kept)
    for one, other in itertools.product(labels, labels):
        assert found["confusion"][one][other] == pairs.count((other, one))
    assert found["illegal_answers"] == 0
    assert found["calibration_error"] == answer_statistics.calibration_error(
        [row["scores"] for row in kept], [row["target"] for row in kept]
    )


def test_a_slice_keeps_the_columns_of_its_rows(evaluated, prompts, rows, tmp_path):
    evaluated(prompt_file=prompts[0], split="test[1:3]", output_dir=str(tmp_path))
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    assert [list(row["columns"].values()) for row in kept] == rows[1:3]


def test_labels_are_those_of_the_card(evaluated, prompts):
    assert evaluated(None, prompt_file=prompts[0]) == evaluated(prompt_file=prompts[0])
    with pytest.raises(UserError, match="LABEL_NAMES are .*the prompt's labels good"):
        evaluated(["good", "worse"], prompt_file=prompts[0])


def test_the_model_alone(evaluated):
    found = evaluated()
    assert found["prompt"] is None and set(found["metrics"]) == {"accuracy"}


def test_what_is_refused_writes_nothing(evaluated, prompts, tmp_path):
    told = []
    options = {"prompt_file": prompts[0], "output_dir": str(tmp_path / "new")}
    with pytest.raises(UserError, match="GROUP_COLUMN='gender' is no column"):
        evaluated(**options, group_column="gender", on_start=told.append)
    assert told == [] and list((tmp_path / "new").iterdir()) == []
    evaluated(**options, on_start=told.append)
    assert told == [tmp_path / "new"]


def test_a_search_among_labels_gives_labels(evaluated, prompts, tmp_path):
    evaluated(
        prompt_file=prompts[0],
        strategy=lambda **how: decoding.Beam(num_decodes=2, **how),
        output_dir=str(tmp_path),
    )
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert {json.loads(line)["answer"] for line in lines} <= set(LABELS)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"combine": "median"}, "COMBINE='median' must be one of vote, mean, best"),
        ({"prompts": [0, 0]}, "two of the prompts are called 'a'"),
        ({"prompts": [0], "combine": "mean"}, "and here is one: leave it out"),
        ({"prompts": []}, "PROMPT_FILE lists no prompt"),
        ({"labels": None, "combine": "mean"}, "choose one of vote, best"),
        ({"strategy": decoding.Beam}, "several prompts cannot search among labels"),
    ],
)
def test_refused(change, says, evaluated, prompts, free):
    of_kind = prompts if change.get("labels", LABELS) else free
    chosen = [of_kind[i] for i in change.pop("prompts", [0, 1])]
    with pytest.raises(UserError, match=says):
        evaluated(prompt_file=chosen, **change)
