# SPDX-License-Identifier: Apache-2.0
"""The loop: resuming, choosing the best, stopping early, guarding the frozen part."""

import itertools
import json
import threading
import time

import jax
import numpy as np
import pytest

from prompt_tuning import report, trees
from prompt_tuning.devices import sharding
from prompt_tuning.devices.partitioner import Partitioner
from prompt_tuning.errors import UserError
from prompt_tuning.methods import registry
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import Transformer
from prompt_tuning.training import loop, optimizers
from prompt_tuning.training.members import Member
from prompt_tuning.training.schedule import Schedule


@pytest.fixture(scope="module")
def prompted(tiny_config, tiny_batch):
    """A model with a prompt of three, its parameters, and batches that differ."""
    model = Model(Transformer(tiny_config, (Prompt("task", 3),)))
    params = jax.jit(model.init)(jax.random.key(0))
    ids = np.broadcast_to(np.arange(256, 259), (3, 3))
    tokens = np.asarray(tiny_batch["encoder_input_tokens"])

    def batches(start):
        while True:
            shift = np.where(tokens > 0, (tokens + start) % 200 + 5, 0)
            rows = np.concatenate([ids, shift], axis=1).astype(np.int32)
            yield {**tiny_batch, "encoder_input_tokens": rows}
            start += 1

    return model, params, batches


def run(prompted, schedule, model_dir=None, evaluate=None, rate=0.3):
    model, params, batches = prompted
    tx = optimizers.adafactor(rate, multiply_by_parameter_scale=False)
    tuned, frozen = registry.split(params, registry.rules_of("prompt_tuning"))
    return loop.fit(
        model,
        frozen,
        [Member("task", tuned, tx, batches, evaluate)],
        schedule,
        key=jax.random.key(1),
        model_dir=model_dir,
        quiet=True,
    )["task"]


def test_the_step_is_traced_once_on_many_devices(prompted):
    """What a step leaves is of the types that the first one was compiled for."""
    model, params, batches = prompted
    partitioner = Partitioner()
    assert partitioner.mesh.size == 8
    tuned, frozen = registry.split(params, registry.rules_of("prompt_tuning"))
    frozen = sharding.replicate(frozen, partitioner.mesh)
    tx = optimizers.adafactor(0.3, multiply_by_parameter_scale=False)
    traced = []

    def materialize(leaves, frozen):
        traced.append(leaves)
        return leaves

    def rows_of_eight(start):
        for batch in batches(start):
            yield {key: np.resize(x, (8, *x.shape[1:])) for key, x in batch.items()}

    member = Member("task", tuned, tx, rows_of_eight, materialize=materialize)
    counts = []
    for steps in (1, 3):
        loop.fit(
            model,
            frozen,
            [member],
            Schedule(steps),
            key=jax.random.key(1),
            partitioner=partitioner,
            quiet=True,
        )
        counts.append(len(traced))
    assert counts[0] > 0 and counts[1] == 2 * counts[0]


def falling_norm(tuned, frozen):
    """A metric that depends on the prompt alone."""
    return {"score": -float(np.linalg.norm(tuned["prompts"]["task"]))}


def test_resumed_equals_uninterrupted_to_the_last_bit(prompted, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    schedule = Schedule(6, eval_period=2, checkpoint_period=3, log_period=1)
    expected = run(prompted, schedule, whole, falling_norm)
    first = Schedule(3, eval_period=2, checkpoint_period=3, log_period=1)
    run(prompted, first, parts, falling_norm)
    resumed = run(prompted, schedule, parts, falling_norm)
    assert resumed.last_step == expected.last_step == 6
    # What the steps before the resumption took is not forgotten, nor counted twice.
    assert resumed.usage.shapes == expected.usage.shapes and resumed.usage.steps == 6
    assert resumed.usage.first_step == 0
    again = run(prompted, schedule, parts, falling_norm).usage
    assert again.steps == 6 and again.wall_seconds > again.device_seconds > 0
    for name, leaf in trees.flatten(expected.tuned).items():
        np.testing.assert_array_equal(leaf, trees.flatten(resumed.tuned)[name])

    def training(folder):
        return [r for r in report.read_metrics(folder) if r["split"] == "train"]

    assert training(whole) == training(parts) and len(training(whole)) == 6


def test_late_data_are_on_record(prompted, tmp_path):
    model, params, batches = prompted

    def slow(start):
        for batch in batches(start):
            time.sleep(0.4)
            yield batch

    schedule = Schedule(8, checkpoint_period=0, log_period=4)
    quick = run(prompted, schedule)
    late = run((model, params, slow), schedule, tmp_path)
    assert 0 <= quick.pace["input_idle"] < 1
    # Two batches are drawn while the first step is compiled, five in the 7 steps after.
    assert 0.1 < late.pace["input_idle"] < 1
    assert late.pace["steps_per_second"] < 7 / (5 * 0.4)
    for name, leaf in trees.flatten(quick.tuned).items():
        np.testing.assert_array_equal(leaf, trees.flatten(late.tuned)[name])
    records = [r for r in report.read_metrics(tmp_path) if r["split"] == "pace"]
    assert [r["step"] for r in records] == [4, 8]
    # What was drawn while compiling may last for the first steps, not for the others.
    assert 0 <= records[0]["input_idle"] < 1 and 0 < records[1]["input_idle"] < 1


def test_broken_data_end_the_run_as_they_are(prompted):
    model, params, batches = prompted

    def broken(start):
        yield from itertools.islice(batches(start), 2)
        raise UserError("row 3 is broken")

    with pytest.raises(UserError, match="^row 3 is broken$"):
        run((model, params, broken), Schedule(4))
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]


def test_the_best_step_is_kept_not_the_last(prompted, tmp_path):
    scores = iter([1.0, 3.0, 2.0])
    seen = []

    def evaluate(tuned, frozen):
        seen.append(np.array(tuned["prompts"]["task"]))
        return {"score": next(scores)}

    result = run(prompted, Schedule(6, 2, 2, log_period=2), tmp_path, evaluate)
    assert (result.step, result.last_step) == (4, 6)
    losses = {
        r["step"]: r["loss"]
        for r in report.read_metrics(tmp_path)
        if r["split"] == "train"
    }
    assert result.loss == losses[4] != losses[6]
    np.testing.assert_array_equal(result.tuned["prompts"]["task"], seen[1])


def test_patience_ends_the_run(prompted):
    scores = iter([2.0, 1.0, 1.0, 5.0])
    schedule = Schedule(8, eval_period=2, patience=2)
    result = run(prompted, schedule, None, lambda *_: {"score": next(scores)})
    assert (result.step, result.last_step) == (2, 6)


def test_a_stopped_run_stays_stopped(prompted, tmp_path):
    scores = iter([2.0, 1.0, 1.0])
    schedule = Schedule(8, eval_period=2, patience=2, log_period=2)
    run(prompted, schedule, tmp_path, lambda *_: {"score": next(scores)})
    again = run(prompted, schedule, tmp_path, lambda *_: {"score": next(scores)})
    assert (again.step, again.last_step) == (2, 6)


def test_files_of_a_run(prompted, tmp_path):
    run(prompted, Schedule(4, 2, 2, log_period=2), tmp_path, falling_norm)
    records = [json.loads(x) for x in (tmp_path / "metrics.jsonl").open()]
    assert [r["step"] for r in records if r["split"] == "validation"] == [2, 4]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_an_unknown_metric_is_named(prompted):
    schedule = Schedule(2, eval_period=2, metric="f1")
    with pytest.raises(UserError, match="no metric is called 'f1'.*score"):
        run(prompted, schedule, None, falling_norm)


def test_a_diverging_loss_stops_the_run(prompted):
    with pytest.raises(UserError, match="lower the learning rate"):
        run(prompted, Schedule(4, log_period=1), rate=float("nan"))


def test_another_prompt_length_does_not_resume(prompted, tiny_config, tmp_path):
    run(prompted, Schedule(2, checkpoint_period=2), tmp_path)
    model = Model(Transformer(tiny_config, (Prompt("task", 2),)))
    other = (model, jax.jit(model.init)(jax.random.key(0)), prompted[2])
    with pytest.raises(UserError, match="prompts/task"):
        run(other, Schedule(4, checkpoint_period=2), tmp_path)
