# SPDX-License-Identifier: Apache-2.0
"""A prompt that is distilled from the answers of others: packed, in int8, planned, refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning import cli
from prompt_tuning.checkpoints import prompt_file
from prompt_tuning.methods.multitask_prompt import MultitaskPrompt
from prompt_tuning.network.comparison import comparer
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.planning import flops
from prompt_tuning.planning.workload import Workload
from prompt_tuning.training import optimizers

CONFIG = T5Config(64, 16, 2, 1, 1, 8, 32)
LENGTH = 3


def examples():
    """Two of unlike length, prompt first, as rows of their own."""
    rng = np.random.default_rng(0)
    for text, targets in ((5, 3), (2, 4)):
        target = rng.integers(2, 64, targets)
        yield {
            "encoder_input_tokens": np.r_[64 : 64 + LENGTH, rng.integers(2, 64, text)],
            "decoder_input_tokens": np.r_[0, target[:-1]],
            "decoder_target_tokens": target,
        }


def batch_of(rows, segments=None):
    """Rows of whole examples, padded; packed where segments are given."""
    batch = {}
    for name in rows[0]:
        longest = max(len(row[name]) for row in rows)
        own = [np.pad(row[name], (0, longest - len(row[name]))) for row in rows]
        batch[name] = np.stack(own).astype(np.int32)
    weights = batch["decoder_target_tokens"] > 0
    return {**batch, "decoder_loss_weights": weights.astype(np.float32)} | (
        segments or {}
    )


def test_answers_on_packed_rows_are_as_far_apart_as_on_separate_ones():
    one, two = examples()
    packed = [{name: np.r_[one[name], two[name]] for name in one}]
    segments = {
        f"{side}_segment_ids": np.repeat([1, 2], [len(one[name]), len(two[name])])[None]
        for side, name in (
            ("encoder", "encoder_input_tokens"),
            ("decoder", "decoder_input_tokens"),
        )
    }
    model = Model(Transformer(CONFIG, (Prompt("p", LENGTH),)))
    params = jax.jit(model.init)(jax.random.key(0))
    pupil, teacher = jax.random.normal(jax.random.key(1), (2, LENGTH, 16))

    @jax.jit
    def apart(pupil, batch):
        return comparer(model, params, batch)("p", pupil, teacher)

    separate, together = (
        apart(pupil, batch)
        for batch in (batch_of([one, two]), batch_of(packed, segments))
    )
    assert separate > 0.01
    np.testing.assert_allclose(together, separate, rtol=1e-5)


def test_each_teacher_costs_a_pass_of_the_pupil_and_a_forward_pass():
    def cost(method, others=()):
        optimizer = optimizers.adafactor(0.3)
        work = Workload(
            config=CONFIG,
            batch_size=8,
            inputs=16,
            targets=4,
            optimizer=optimizer,
            method=method,
            prompt_length=4,
            others=others,
        )
        return flops.count(work)

    plain = cost(MultitaskPrompt())
    assert cost(MultitaskPrompt(("a", "b"))) == plain
    taught = MultitaskPrompt(("a", "b"), answers=0.9)
    # Frozen weights cost 4 in a step and 2 forward, attention 3 and 1 of its products.
    found = cost(taught)
    assert found["weights"] == plain["weights"] * (4 + 2 * 6) // 4
    assert found["attention"] == plain["attention"] * (3 + 2 * 4) // 3
    assert cost(MultitaskPrompt(), ((taught, 4),)) == found


@pytest.mark.slow
def test_a_run_of_it_is_planned(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["plan", "--gin_file=models/tiny.gin", "--topology=v5e:1x1"]
    words += ["--gin_file=methods/multitask_prompt.gin", "--prompt_length=4"]
    words += ["--task_feature_lengths={'inputs': 12, 'targets': 4}", "--compile=False"]
    found = []
    for answers in (0.0, 0.9):
        path = tmp_path / f"{answers}.json"
        own = ["--teachers=('a.safetensors', 'b.safetensors')", f"--answers={answers}"]
        assert cli.main([*words, *own, f"--output_file={path}", "--batch_size=64"]) == 0
        found.append(json.loads(path.read_text()))
    capsys.readouterr()
    assert found[1]["flops"]["total"] > 3 * found[0]["flops"]["total"]


@pytest.mark.parametrize(
    ("shape", "base", "says"),
    [
        ((4, 16), None, "is a prompt of [4, 16], where this one is [3, 16]: take"),
        ((3, 16), "f" * 64, "was tuned on other (fingerprint ffffffffffff), not on"),
        (None, None, "there is no prompt at"),
    ],
    ids=["length", "model", "missing"],
)
def test_teachers_that_do_not_fit_are_one_line(
    shape, base, says, train_words, tmp_path, capsys
):
    path = tmp_path / "teacher.safetensors"
    if shape is not None:
        of = {"base_model": {"name": "other", "fingerprint": base}} if base else {}
        card = {"method": "prompt_tuning", **of}
        prompt_file.save_prompt(path, np.ones(shape, np.float32), card)
    words = train_words(
        MODEL_DIR=tmp_path / "run", MIXTURE_OR_TASK_NAME="taught_reviews"
    )
    words[words.index("--gin_file=methods/prompt_tuning.gin")] = (
        "--gin_file=methods/multitask_prompt.gin"
    )
    words += [f"--teachers=('{path}',)", "--answers=0.9", "--learning_rate=0.3"]
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert says in line
    assert not (tmp_path / "run" / "prompt.safetensors").exists()


@pytest.mark.slow
def test_a_student_of_the_embedded_model_learns_from_tuned_teachers(reviews, tmp_path):
    """Two teachers in one run; students of them as it is, packed, and on int8 weights."""

    def train(folder, *words):
        fixed = ["--gin_file=models/t5_1_1_mini.gin", "--gin_file=tasks/local_file.gin"]
        values = {
            "mixture_or_task_name": "embedded_reviews",
            "task_files": reviews,
            "template": "{sentence}",
            "label_names": ["good", "bad"],
            "task_feature_lengths": {"inputs": 16, "targets": 4},
            "train_steps": 3,
            "batch_size": 8,
            "eval_batch_size": 8,
            "prompt_length": 4,
            "learning_rate": 0.3,
            "model_dir": tmp_path / folder,
        }
        own = [f"--{name}={value}" for name, value in values.items()]
        assert cli.main(["train", *fixed, *own, *words]) == 0
        return tmp_path / folder

    teachers = train(
        "teachers",
        "--gin_file=methods/prompt_tuning.gin",
        "--prompts=[{'seed': [1, 2]}]",
    )
    paths = sorted(map(str, (teachers / "prompts").iterdir()))
    assert len(paths) == 2
    taught = ["--gin_file=methods/multitask_prompt.gin", f"--teachers={paths}"]
    rows, costs = {}, {}
    for name, words in {
        "untaught": [],
        "taught": ["--answers=0.9"],
        "packed": ["--answers=0.9", "--pack=True"],
        "int8": ["--answers=0.9", "--frozen_dtype=int8"],
    }.items():
        folder = train(name, *taught, *words)
        rows[name], card = prompt_file.load_prompt(folder / "prompt.safetensors")
        assert rows[name].shape == (4, 192) and np.isfinite(rows[name]).all()
        assert ("answers=0.9" in card["method"]) == bool(words)
        costs[name] = json.loads((folder / "results.json").read_text())["cost"]["flops"]
    apart = lambda name: np.abs(rows[name] - rows["taught"]).max()
    assert apart("untaught") > 1e-3 and 0 < apart("int8")
    assert costs["int8"] == costs["taught"] > 3 * costs["untaught"]
    assert jnp.any(rows["packed"] != rows["taught"])
