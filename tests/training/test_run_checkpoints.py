# SPDX-License-Identifier: Apache-2.0
"""A run's checkpoints: exact, complete or absent, and loud where they do not fit."""

import logging
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning.errors import UserError
from prompt_tuning.training import optimizers
from prompt_tuning.training.run_checkpoints import Checkpoints
from prompt_tuning.training.step import TrainState

POSITION = {"epoch": 1, "row": 17}
BEST = {"step": 2, "accuracy": 0.75}


def make_state(length: int = 5, tx=None, seed: int = 0) -> TrainState:
    tx = tx or optimizers.adafactor(0.3, multiply_by_parameter_scale=False)
    prompt = jax.random.normal(jax.random.key(seed), (length, 32))
    tuned = {"task": {"prompts": {"task": prompt}}}
    state = TrainState.create(tuned, tx, jax.random.key(seed + 7))
    _, opt_state = tx.update(tuned, state.opt_state, tuned)
    return state.replace(step=jnp.asarray(2, jnp.int32), opt_state=opt_state)


def abstract(**kwargs) -> TrainState:
    return jax.eval_shape(lambda: make_state(**kwargs))


def raw(state: TrainState) -> list[np.ndarray]:
    state = state.replace(key=jax.random.key_data(state.key))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def test_a_state_comes_back_bit_for_bit_with_its_key_and_position(tmp_path):
    state = make_state()
    Checkpoints(tmp_path, 2).save(2, state, POSITION, BEST)
    restored, position, best = Checkpoints(tmp_path, 2).restore(abstract())
    assert (position, best) == (POSITION, BEST)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for before, after in zip(raw(state), raw(restored), strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)
    draw = lambda key: jax.random.uniform(jax.random.fold_in(key, 3), (4,))
    np.testing.assert_array_equal(draw(state.key), draw(restored.key))


def test_keys_of_another_generator_keep_it(tmp_path):
    state = make_state().replace(key=jax.random.key(1, impl="rbg"))
    Checkpoints(tmp_path, 1).save(2, state, {}, {})
    restored, _, best = Checkpoints(tmp_path, 1).restore(
        jax.eval_shape(lambda: make_state().replace(key=jax.random.key(0, impl="rbg")))
    )
    assert best == {}
    assert restored.key.dtype == state.key.dtype
    np.testing.assert_array_equal(raw(restored)[-1], raw(state)[-1])


def test_shardings_of_the_abstract_state_are_kept(tmp_path):
    state = make_state(length=8)
    Checkpoints(tmp_path, 1).save(2, state, POSITION, BEST)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    rows = jax.sharding.NamedSharding(mesh, spec("data"))
    whole = jax.sharding.NamedSharding(mesh, spec())
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=rows if leaf.shape == (8, 32) else whole
        ),
        abstract(length=8),
    )
    restored, _, _ = Checkpoints(tmp_path, 1).restore(target)
    assert restored.tuned["task"]["prompts"]["task"].sharding == rows
    assert restored.step.sharding == whole
    assert restored.key.sharding.is_equivalent_to(whole, 0)
    for before, after in zip(raw(state), raw(restored), strict=True):
        np.testing.assert_array_equal(before, after)


def test_without_shardings_arrays_are_as_free_as_fresh_ones(tmp_path):
    Checkpoints(tmp_path, 1).save(2, make_state(), POSITION, BEST)
    restored, _, _ = Checkpoints(tmp_path, 1).restore(abstract())
    assert not restored.tuned["task"]["prompts"]["task"].committed


def test_the_newest_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2)
    assert checkpoints.latest_step() is None
    for step in (1, 3, 5):
        checkpoints.save(step, make_state(seed=step), POSITION, {"accuracy": 1 / step})
    assert checkpoints.steps() == [3, 5]
    restored, _, best = checkpoints.restore(abstract(), step=3)
    assert best == {"accuracy": 1 / 3}
    np.testing.assert_array_equal(raw(restored)[1], raw(make_state(seed=3))[1])


def test_a_step_that_is_there_stays_and_an_earlier_one_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, 3)
    checkpoints.save(5, make_state(), POSITION, BEST)
    checkpoints.save(5, make_state(seed=1), {"epoch": 9}, BEST)
    assert checkpoints.restore(abstract())[1] == POSITION
    with pytest.raises(UserError, match="already holds step 5.*another MODEL_DIR"):
        checkpoints.save(4, make_state(), POSITION, BEST)


def test_half_written_folders_are_ignored(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(5, make_state(), POSITION, BEST)
    folder = tmp_path / "checkpoints"
    unfinished = folder / "9.orbax-checkpoint-tmp"
    shutil.copytree(folder / "5", unfinished)
    (folder / "8").mkdir()
    (folder / "8" / "state").mkdir()
    assert Checkpoints(tmp_path, 1).latest_step() == 5
    Checkpoints(tmp_path, 1).restore(abstract())
    (folder / "8" / "state").rmdir()
    (folder / "8").rmdir()
    Checkpoints(tmp_path, 1).save(9, make_state(), {"epoch": 2}, BEST)
    assert Checkpoints(tmp_path, 1).restore(abstract())[1] == {"epoch": 2}


def test_another_prompt_length_names_the_leaf_both_shapes_and_the_cure(tmp_path):
    Checkpoints(tmp_path, 1).save(2, make_state(length=20), POSITION, BEST)
    with pytest.raises(UserError) as caught:
        Checkpoints(tmp_path, 1).restore(abstract(length=10))
    message = str(caught.value)
    assert "\n" not in message
    assert (
        "tuned/task/prompts/task is [20, 32] in the checkpoint, [10, 32] in" in message
    )
    assert "another MODEL_DIR or the same PROMPT_LENGTH" in message


def test_another_optimizer_is_named(tmp_path):
    Checkpoints(tmp_path, 1).save(2, make_state(), POSITION, BEST)
    with pytest.raises(UserError, match="opt_state/.*the same optimizer"):
        Checkpoints(tmp_path, 1).restore(abstract(tx=optimizers.adamw(0.1)))


def test_missing_and_damaged_checkpoints_are_one_line(tmp_path):
    with pytest.raises(UserError, match="has no checkpoint.*it is empty"):
        Checkpoints(tmp_path / "none", 1).restore(abstract())
    assert not (tmp_path / "none").exists()
    Checkpoints(tmp_path, 1).save(2, make_state(), POSITION, BEST)
    with pytest.raises(UserError, match="has no checkpoint 4; it holds 2"):
        Checkpoints(tmp_path, 1).restore(abstract(), step=4)
    for path in (tmp_path / "checkpoints/2/state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(UserError, match="cannot be read") as caught:
        Checkpoints(tmp_path, 1).restore(abstract())
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="would keep no checkpoint"):
        Checkpoints(tmp_path, 0)


# Orbax leaves an event loop behind when a write fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, caplog):
    run = tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    state = make_state(length=2000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with caplog.at_level(logging.INFO), pytest.raises(UserError) as caught:
            Checkpoints(run, 1).save(2, state, POSITION, BEST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value) and "cannot write" in str(caught.value)
    assert not run.exists()
    assert not [record for record in caplog.records if record.name == "absl"]
    Checkpoints(run, 1).save(2, state, POSITION, BEST)
    assert Checkpoints(run, 1).latest_step() == 2


def test_a_model_dir_that_cannot_be_a_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write .*file/checkpoints"):
        Checkpoints(tmp_path / "file", 1).save(2, make_state(), POSITION, BEST)
