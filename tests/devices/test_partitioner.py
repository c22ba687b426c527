# SPDX-License-Identifier: Apache-2.0
"""One object says how a run is spread; what cannot be spread is refused in time."""

import collections

import jax
import numpy as np
import pytest

from prompt_tuning import cli
from prompt_tuning.checkpoints import base_models
from prompt_tuning.devices import sharding, topologies
from prompt_tuning.devices.partitioner import Partitioner
from prompt_tuning.errors import UserError
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.training import loop, optimizers
from prompt_tuning.training.members import Member, Result
from prompt_tuning.training.schedule import Schedule


@pytest.fixture(scope="module")
def slices():
    """From the name of a TPU slice to its chips, by libtpu without a TPU."""
    pytest.importorskip("libtpu")
    return lambda name: tuple(topologies.parse(name).devices())


def neighbours(mesh) -> list[set[tuple[int, ...]]]:
    """The coordinates of the chips that hold each copy of the model."""
    return [{tuple(d.coords) for d in copy} for copy in mesh.devices]


def span(chips: set[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(int(side) for side in np.ptp(np.array(sorted(chips)), axis=0) + 1)


def test_the_model_axis_lies_on_the_submesh(slices):
    chips = slices("v5e:4x4")
    square = Partitioner(model_parallel_submesh=(2, 2, 1, 1), devices=chips).mesh
    assert dict(square.shape) == {"data": 4, "model": 4}
    assert [span(copy) for copy in neighbours(square)] == [(2, 2, 1)] * 4
    assert {d.id for d in square.devices.flat} == {d.id for d in chips}
    line = Partitioner(model_parallel_submesh=(1, 4, 1, 1), devices=chips).mesh
    assert [span(copy) for copy in neighbours(line)] == [(1, 4, 1)] * 4
    # What it is for: four chips in a square are one host's, so that no process has to
    # give rows to others; four in a line, JAX's own choice here, are two hosts'.
    assert not sharding.shares_rows(square)
    assert sharding.shares_rows(Partitioner(4, devices=chips).mesh)


def test_a_submesh_of_three_dimensions(slices):
    mesh = Partitioner(
        model_parallel_submesh=(2, 2, 2, 1), devices=slices("v5p:2x2x4")
    ).mesh
    assert dict(mesh.shape) == {"data": 2, "model": 8}
    assert [span(copy) for copy in neighbours(mesh)] == [(2, 2, 2)] * 2


def test_an_axis_of_the_torus_may_be_cut(slices):
    """Eight of 4x4x4 chips are no whole axes, which `jax.make_mesh` refuses."""
    mesh = sharding.make_mesh(8, slices("v5p:4x4x4"))
    assert dict(mesh.shape) == {"data": 8, "model": 8}
    assert all(len(copy) == 8 for copy in neighbours(mesh))


@pytest.mark.parametrize("submesh", [None, (2, 1, 1, 1)])
def test_slices_share_batches_not_models(slices, submesh):
    slices("v5e:2x2")  # Makes libtpu content with a machine that is no TPU VM.
    chips = tuple(
        jax.experimental.topologies.get_topology_desc(
            topology_name="v5e:2x2", platform="tpu", num_slices=2
        ).devices
    )
    parts = 1 if submesh else 2
    mesh = Partitioner(parts, submesh, devices=chips).mesh
    assert dict(mesh.shape) == {"data": 4, "model": 2}
    holders = [{d.slice_index for d in copy} for copy in mesh.devices]
    assert collections.Counter(map(tuple, holders)) == {(0,): 2, (1,): 2}


@pytest.mark.parametrize(
    ("submesh", "message"),
    [
        ((3, 1, 1, 1), r"\(3, 1, 1, 1\) do not fill the 4x4x1x1 devices"),
        ((2, 2, 1), r"\(2, 2, 1\) is not \(x, y, z, cores\)"),
        ((2, 0, 1, 1), "numbers of 1 or more"),
    ],
)
def test_blocks_that_do_not_fill_a_slice(slices, submesh, message):
    partitioner = Partitioner(model_parallel_submesh=submesh, devices=slices("v5e:4x4"))
    with pytest.raises(UserError, match=message):
        _ = partitioner.mesh


def test_a_submesh_is_for_tpus_and_one_of_two_ways():
    with pytest.raises(
        UserError, match="these devices are CPUs; set NUM_PARTITIONS to 4"
    ):
        _ = Partitioner(model_parallel_submesh=(2, 2, 1, 1)).mesh
    with pytest.raises(UserError, match="has 4 devices, NUM_PARTITIONS is 2"):
        _ = Partitioner(2, (2, 2, 1, 1)).mesh


@pytest.mark.parametrize(
    ("partitions", "rows", "microbatches", "choice"),
    [(1, 12, 1, "8 or 16"), (2, 6, 1, "4 or 8"), (4, 6, 2, "4 or 8"), (1, 0, 1, "8")],
)
def test_batches_that_do_not_divide_name_those_that_do(
    partitions, rows, microbatches, choice
):
    partitioner = Partitioner(partitions)
    with pytest.raises(UserError, match=f"BATCH_SIZE={rows} .*BATCH_SIZE to {choice}$"):
        partitioner.check_batch(rows, microbatches)
    partitioner.check_batch(int(choice.split()[-1]), microbatches)


def test_evaluation_says_that_it_fills_batches_up(capsys):
    Partitioner(2).check_eval_batch(16)
    assert not capsys.readouterr().err
    Partitioner(2).check_eval_batch(6)
    assert "batches get 2 empty rows; set it to 4 or 8" in capsys.readouterr().err
    with pytest.raises(UserError, match="EVAL_BATCH_SIZE=0 must be 1 or more"):
        Partitioner().check_eval_batch(0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"BATCH_SIZE": 12}, "BATCH_SIZE to 8 or 16"),
        ({"NUM_PARTITIONS": 3}, "NUM_PARTITIONS to 2 or 4"),
        ({"NUM_MICROBATCHES": 3}, "BATCH_SIZE to 24 or 48"),
        ({"MODEL_PARALLEL_SUBMESH": "(2, 2, 1, 1)"}, "NUM_PARTITIONS to 4 instead"),
        ({"PARAMETER_PARTITIONING_DIMS": 3}, "DIMS=3 must be 1 or 2"),
    ],
)
def test_the_command_refuses_before_it_looks_at_the_model(
    tmp_path, capsys, values, message
):
    values = {
        "MODEL_DIR": tmp_path / "run",
        "INITIAL_CHECKPOINT_PATH": tmp_path / "no_model",
        "MIXTURE_OR_TASK_NAME": "no_task",
        "TASK_FEATURE_LENGTHS": {"inputs": 8, "targets": 4},
        **values,
    }
    words = [f"--gin.{name}={value}" for name, value in values.items()]
    files = ["--gin_file=models/tiny.gin", "--gin_file=methods/prompt_tuning.gin"]
    assert cli.main(["train", *files, *words]) == 2
    error = capsys.readouterr().err
    (line,) = [x for x in error.splitlines() if x.startswith("prompt-tuning:")]
    assert message in line and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_loading_and_training_share_a_partitioner(tiny_checkpoint):
    """Losses and the prompt are those of one device, with kernels cut over all eight."""
    config = T5Config(
        vocab_size=8192,
        emb_dim=16,
        num_heads=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        head_dim=8,
        mlp_dim=32,
    )
    rows = np.arange(8 * 6, dtype=np.int32).reshape(8, 6) + 3
    batch = {
        "encoder_input_tokens": np.concatenate(
            [np.tile(np.arange(8192, 8195, dtype=np.int32), (8, 1)), rows], axis=1
        ),
        "decoder_input_tokens": rows[:, :2],
        "decoder_target_tokens": rows[:, 2:4],
    }
    prompts = (Prompt("task", 3),)
    start = np.linspace(-1, 1, 3 * 16, dtype=np.float32).reshape(3, 16)

    def tune(source: base_models.BaseModel) -> Result:
        member = Member(
            "task",
            {"prompts": {"task": start}},
            optimizers.adafactor(0.1, multiply_by_parameter_scale=False),
            lambda first: iter(lambda: batch, None),
        )
        return loop.fit(
            Model(Transformer(source.config, prompts)),
            source.params,
            [member],
            Schedule(4, log_period=1),
            key=jax.random.key(0),
            partitioner=source.partitioner,
            quiet=True,
        )["task"]

    cut = base_models.load(
        config,
        tiny_checkpoint,
        partitioner=Partitioner(2, parameter_partitioning_dims=2),
    )
    kernel = cut.params["encoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    assert np.prod(kernel.sharding.shard_shape(kernel.shape)) * 8 == kernel.size
    alone = base_models.load(
        config, tiny_checkpoint, partitioner=Partitioner(devices=(jax.devices()[0],))
    )
    assert alone.partitioner is None and alone.mesh is None
    assert cut.fingerprint == alone.fingerprint
    found, expected = tune(cut), tune(alone)
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)
    np.testing.assert_allclose(
        found.tuned["prompts"]["task"],
        expected.tuned["prompts"]["task"],
        rtol=1e-4,
        atol=1e-4,
    )
