# SPDX-License-Identifier: Apache-2.0
"""Runs that are stopped, killed or damaged: what they leave, and how they go on."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

from prompt_tuning import report, trees
from prompt_tuning.errors import UserError
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import Transformer
from prompt_tuning.training import loop, optimizers
from prompt_tuning.training.interruption import Interrupted
from prompt_tuning.training.members import Member
from prompt_tuning.training.schedule import Schedule

# Evaluations, records and checkpoints fall on unlike steps.
SCHEDULE = Schedule(12, eval_period=5, checkpoint_period=0, log_period=4)
NAMES = ("a", "b")


@pytest.fixture(scope="module")
def run(tiny_config, tiny_params, tiny_batch):
    """Tunes two prompts; ``at`` is done when the batch of that number is drawn."""
    ids = np.broadcast_to(np.arange(256, 259), (3, 3))
    tokens = np.asarray(tiny_batch["encoder_input_tokens"])
    model = Model(Transformer(tiny_config, tuple(Prompt(name, 3) for name in NAMES)))

    def fit(folder, schedule=SCHEDULE, at=lambda step: None):
        def evaluate(tuned, frozen):
            (prompt,) = tuned["prompts"].values()
            return {"score": -float(np.linalg.norm(prompt))}

        def batches(start):
            for number in range(start, 1000):
                at(number)
                shift = np.where(tokens > 0, (tokens + number) % 200 + 5, 0)
                rows = np.concatenate([ids, shift], axis=1).astype(np.int32)
                yield {**tiny_batch, "encoder_input_tokens": rows}

        members = [
            Member(
                name,
                {"prompts": {name: np.full((3, 32), 0.1 * place, np.float32)}},
                optimizers.adafactor(
                    optimizers.learning_rate_schedule(
                        "constant * linear_warmup", 0.2 + place, 10
                    ),
                    multiply_by_parameter_scale=False,
                ),
                batches,
                evaluate,
            )
            for place, name in enumerate(NAMES)
        ]
        folder.mkdir(exist_ok=True)
        return loop.fit(
            model,
            tiny_params,
            members,
            schedule,
            key=jax.random.key(0),
            model_dir=folder,
            quiet=True,
        )

    return fit


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """What the run that nothing disturbs ends with, and its records."""
    folder = tmp_path_factory.mktemp("whole")
    return run(folder), records(folder)


def records(folder):
    return [r for r in report.read_metrics(folder) if r["split"] != "pace"]


def assert_same(found, folder, whole):
    """To the last bit, with the same records."""
    expected, lines = whole
    for name, result in expected.items():
        assert dataclasses.replace(found[name], tuned={}, usage=None, pace={}) == (
            dataclasses.replace(result, tuned={}, usage=None, pace={})
        )
        for leaf, value in trees.flatten(result.tuned).items():
            np.testing.assert_array_equal(trees.flatten(found[name].tuned)[leaf], value)
    assert records(folder) == lines


def sends(number, step):
    """Sends this process a signal, once, while the batch of a step is drawn."""
    sent = []

    def at(drawn):
        if drawn == step and not sent:
            sent.append(drawn)
            os.kill(os.getpid(), number)

    return at


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_signal_saves_and_the_run_goes_on_to_the_last_bit(
    number, code, run, whole, tmp_path
):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"{number.name} at step") as caught:
        run(tmp_path / "run", at=sends(number, 6))
    assert caught.value.exit_code == code
    assert str(tmp_path / "run") in str(caught.value)
    (step,) = map(int, os.listdir(tmp_path / "run/checkpoints"))
    # Batches are drawn ahead of their step.
    assert 3 <= step <= 7
    assert signal.getsignal(number) is before
    assert_same(run(tmp_path / "run"), tmp_path / "run", whole)


def test_a_checkpoint_follows_when_the_last_one_is_old(run, whole, tmp_path):
    schedule = dataclasses.replace(SCHEDULE, checkpoint_seconds=1e-9)
    with pytest.raises(UserError, match="^the power is cut$"):
        run(tmp_path / "run", schedule, at=cuts_power(9))
    steps = sorted(map(int, os.listdir(tmp_path / "run/checkpoints")))
    assert len(steps) == 2 and steps[1] == steps[0] + 1 >= 6
    assert_same(run(tmp_path / "run"), tmp_path / "run", whole)


def cuts_power(step):
    """Ends the run without notice while the batch of a step is drawn."""

    def at(drawn):
        if drawn == step:
            raise UserError("the power is cut")

    return at


def damage(folder):
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 10:
            path.write_bytes(path.read_bytes()[:10])


def test_a_damaged_checkpoint_falls_back_on_the_one_before(
    run, whole, tmp_path, capsys
):
    schedule = dataclasses.replace(SCHEDULE, checkpoint_period=3)
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(folder, schedule, at=sends(signal.SIGTERM, 10))
    older, newest = sorted(map(int, os.listdir(folder / "checkpoints")))
    damage(folder / "checkpoints" / str(newest) / "state")
    capsys.readouterr()
    found = run(folder)
    shown = capsys.readouterr().err
    assert f"{newest} cannot be read" in shown and "the one before it taken" in shown
    assert f"resuming from step {older}" in shown
    assert_same(found, folder, whole)


def test_a_damaged_older_checkpoint_harms_no_newer_one(run, whole, tmp_path, capsys):
    schedule = dataclasses.replace(SCHEDULE, checkpoint_period=3)
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(folder, schedule, at=sends(signal.SIGTERM, 10))
    older, newest = sorted(map(int, os.listdir(folder / "checkpoints")))
    damage(folder / "checkpoints" / str(older) / "record")
    capsys.readouterr()
    found = run(folder, schedule)
    shown = capsys.readouterr().err
    assert f"resuming from step {newest}" in shown and "cannot be read" not in shown
    assert_same(found, folder, whole)


def test_without_another_checkpoint_nothing_begins_anew_in_silence(run, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(folder, at=sends(signal.SIGTERM, 5))
    (step,) = os.listdir(folder / "checkpoints")
    damage(folder / "checkpoints" / step / "state")
    with pytest.raises(UserError, match="cannot be read.*delete .* to begin again"):
        run(folder)
    assert os.listdir(folder / "checkpoints") == [step]


def test_best_leaves_that_an_older_checkpoint_names_are_kept(run, whole, tmp_path):
    """The norm grows, so the first evaluation stays the best; a lost one is damage."""
    folder = tmp_path / "run"
    schedule = dataclasses.replace(SCHEDULE, checkpoint_period=3, keep_last=True)
    run(folder, schedule)
    kept = {int(path.stem) for path in (folder / "best/a").iterdir()}
    named = set()
    for step in os.listdir(folder / "checkpoints"):
        path = folder / "checkpoints" / step / "record/metadata"
        named.add(json.loads(path.read_text())["members"]["a"]["best"]["step"])
    assert len(named) == 2 and kept == named


def test_the_learning_rate_of_each_is_on_record(whole):
    _, lines = whole
    rates = [
        (r["step"], r["member"], r["learning_rate"])
        for r in lines
        if r["split"] == "train"
    ]
    expected = [
        (step, name, rate * min(1.0, (step - 1) / 10))
        for step in (4, 8, 12)
        for name, rate in (("a", 0.2), ("b", 1.2))
    ]
    for found, wanted in zip(rates, expected, strict=True):
        assert found[:2] == wanted[:2]
        assert found[2] == pytest.approx(wanted[2], rel=1e-6)


@pytest.mark.parametrize(
    ("steps", "evaluated"), [(40, 4), (7, 1), (30_000, 1000), (9_990, 999)]
)
def test_periods_follow_the_steps(steps, evaluated):
    schedule = Schedule(steps)
    due = [step for step in range(1, steps + 1) if schedule.due(step, None)]
    assert due[0] == evaluated and due[-1] == steps


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"steps": 2.5}, "steps=2.5 must be a whole number from 1 to 2,147"),
        ({"steps": 0}, "steps=0"),
        ({"steps": True}, "steps=True"),
        ({"eval_period": -1}, "eval_period=-1 must be a whole number from 0 to"),
        ({"checkpoint_period": "x"}, "checkpoint_period='x'"),
        ({"patience": None}, "patience=None"),
    ],
)
def test_periods_that_are_no_numbers_are_refused(values, says):
    with pytest.raises(UserError, match=says):
        Schedule(**{"steps": 4, **values})
