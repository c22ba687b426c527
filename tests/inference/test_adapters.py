# SPDX-License-Identifier: Apache-2.0
"""Adapters from training to answers: saved, evaluated, mixed in a batch, refused."""

import json

import numpy as np
import pytest

from prompt_tuning import cli
from prompt_tuning.checkpoints import adapter_file, base_models, prompt_file
from prompt_tuning.errors import UserError
from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.store import PromptStore
from prompt_tuning.network.transformer import T5Config

KINDS = ["lora", "ia3", "deep_prompt", "prefix_tuning", "prompt_tuning", "p_tuning"]
OTHERS = ["decoder_prefix", "dept", "instruction_aware_prompt", "composed", "lora"]
TEXTS = ("a fine film", "so dull a story that nobody wants", "what is this", "very")


@pytest.fixture(scope="module")
def source(tiny_checkpoint):
    return base_models.load(
        T5Config(8192, 16, 2, 1, 1, 8, 32), tiny_checkpoint, activation_dtype="float32"
    )


def train(train_words, folder, kinds):
    """One run of a member of every kind: its folder and its results."""
    words = train_words(
        MODEL_DIR=folder,
        MIXTURE_OR_TASK_NAME="adapter_reviews",
        LEARNING_RATE=0.3,
        EVAL_PERIOD=2,
        PROMPTS=[{"method": kinds}],
    )
    # Its usual rank is above so small a width.
    words = [word.replace("'dept'", "@DePT()") for word in words]
    assert cli.main([*words, "--gin.DePT.rank=7"]) == 0
    return folder, json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def trained(train_words, tmp_path_factory):
    return train(train_words, tmp_path_factory.mktemp("adapters") / "run", KINDS)


def path_of(trained, kind):
    return trained[0] / "prompts" / f"method_{kind}.safetensors"


def answers(engine, rows):
    return [row["scores"] for row in engine.answer(rows)]


def mixed_and_alone(trained, kinds, source):
    """An engine of all kinds, rows of each, and their scores, which are as alone."""
    together = PromptStore(source, 64)
    for kind in kinds:
        together.load(path_of(trained, kind), kind)
    rows = [{"prompt": kind, "text": text} for text in TEXTS for kind in kinds]
    engine = Engine(source, together, batch_sizes=(len(rows),), longest=32)
    mixed = answers(engine, rows)
    given = {}
    for kind in kinds:
        store = PromptStore(source, 8)
        store.load(path_of(trained, kind), kind)
        own = [row for row in rows if row["prompt"] == kind]
        alone = answers(Engine(source, store, batch_sizes=(4,), longest=32), own)
        found = [scores for row, scores in zip(rows, mixed) if row["prompt"] == kind]
        given[kind] = [list(scores.values()) for scores in alone]
        np.testing.assert_allclose(
            [list(scores.values()) for scores in found], given[kind], rtol=1e-4
        )
    return engine, rows, mixed, given


def assert_all_differ(given):
    assert len({str(np.round(value, 6)) for value in given.values()}) == len(given)


def test_rows_of_all_kinds_in_one_batch_are_answered_as_alone(trained, source):
    engine, rows, mixed, given = mixed_and_alone(trained, KINDS, source)
    # In an encoder of one layer deep prompts are prompts.
    np.testing.assert_allclose(
        given.pop("deep_prompt"), given["prompt_tuning"], rtol=1e-4
    )
    assert_all_differ(given)
    # One that is removed still answers the rows that were prepared before.
    waiting = [engine.prepare(row) for row in rows]
    engine.store.remove("lora")
    late = [result["scores"] for result in engine.run(waiting)]
    np.testing.assert_allclose(
        [list(s.values()) for s in late], [list(s.values()) for s in mixed], rtol=1e-4
    )


@pytest.mark.slow
def test_so_are_those_of_the_other_kinds(train_words, source, tmp_path):
    trained = train(train_words, tmp_path / "run", OTHERS)
    assert_all_differ(mixed_and_alone(trained, OTHERS, source)[-1])


@pytest.mark.parametrize("kind", ["lora", "deep_prompt"])
def test_eval_of_the_file_gives_the_runs_own_metric(
    kind, trained, reviews, tiny_checkpoint, tmp_path
):
    values = {
        "MIXTURE_OR_TASK_NAME": "adapter_reviews",
        "TASK_FEATURE_LENGTHS": {"inputs": 8, "targets": 4},
        "TASK_FILES": reviews,
        "TEMPLATE": "{sentence}",
        "LABEL_NAMES": ["good", "bad"],
        "INITIAL_CHECKPOINT_PATH": tiny_checkpoint,
        "PROMPT_FILE": path_of(trained, kind),
        "EVAL_SPLIT": "validation",
        "EVAL_OUTPUT_DIR": tmp_path,
    }
    words = ["--gin_file=models/tiny.gin", "--gin_file=tasks/local_file.gin"]
    words += [f"--gin.{name}={value}" for name, value in values.items()]
    assert cli.main(["eval", *words]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    (row,) = (r for r in trained[1]["members"] if r["name"] == f"method_{kind}")
    name, value = next(iter(row["validation"].items()))
    assert found["metrics"][name] == pytest.approx(value)


def test_a_file_holds_what_the_layers_hold(trained):
    rows, slots, card = adapter_file.load(path_of(trained, "lora"))
    assert rows.shape == (0, 16) and card["method"] == "lora"
    assert len(slots) == 6 and all(s.endswith("/output") for s in slots)
    assert any(np.abs(slot.b).max() > 0 for slot in slots.values())
    rows, slots, card = adapter_file.load(path_of(trained, "deep_prompt"))
    (site,) = slots
    assert site == "encoder/layers/hidden" and card["length"] == 3
    np.testing.assert_array_equal(slots[site].table[0], rows)
    # What only makes rows is saved as the prompt that it made.
    rows, card = prompt_file.load_prompt(path_of(trained, "p_tuning"))
    assert rows.shape == (3, 16) and card["method"] == "p_tuning"


def test_what_cannot_carry_an_adapter_refuses_it(trained, source, tmp_path, capsys):
    path = path_of(trained, "ia3")
    assert cli.main(["convert", str(path), str(tmp_path / "out.npy"), "--to=npy"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "an adapter changes the model's layers" in line
    assert not (tmp_path / "out.npy").exists()
    # A template on its card makes no prompt in words of it.
    adapter = path_of(trained, "lora")
    assert adapter_file.load(adapter)[2]["template"]
    assert cli.main(["convert", str(adapter), str(tmp_path / "lora"), "--to=peft"]) == 0
    assert (tmp_path / "lora/adapter_model.safetensors").is_file()
    capsys.readouterr()
    assert cli.main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("adapter ") and "numbers at 8 sites" in shown
    damaged = tmp_path / "damaged.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(UserError, match="is damaged: its numbers"):
        adapter_file.load(damaged)
    rows, slots, card = adapter_file.load(path)
    wide = {site: type(slot).of(np.ones((1, 48))) for site, slot in slots.items()}
    with pytest.raises(UserError, match=r"adapter has \[1, 48\] at .*this model has"):
        PromptStore(source).add("wide", rows, card, slots=wide)
    elsewhere = {"decoder/layers/self_attention/key_rows": next(iter(slots.values()))}
    with pytest.raises(UserError, match="where this model has nothing"):
        PromptStore(source).add("elsewhere", rows, card, slots=elsewhere)
