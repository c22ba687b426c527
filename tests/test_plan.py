# SPDX-License-Identifier: Apache-2.0
"""Plans: what the compiler says, what the estimate says, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from prompt_tuning import cli, methods, optim, plan, sharding, topologies, trees
from prompt_tuning.commands import plan as command
from prompt_tuning.errors import UserError
from prompt_tuning.network import T5Config
from prompt_tuning.step import TrainState

XXL = T5Config(32128, 4096, 64, 24, 24, 64, 10240, dtype="bfloat16", remat="full")
V6E = topologies.parse("v6e:1x1")
LENGTHS = "--gin.TASK_FEATURE_LENGTHS={'inputs': 12, 'targets': 4}"
FILES = ("--gin_file=models/tiny.gin", "--gin_file=methods/prompt_tuning.gin")


@pytest.fixture
def work(tiny_config):
    config = dataclasses.replace(tiny_config, remat="full")
    optimizer = optim.adafactor(0.3, multiply_by_parameter_scale=False)
    return plan.Workload(config, 16, 56, 8, optimizer, "prompt_tuning", 8, "float32")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No answer of an earlier run is taken, and none is left behind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def xxl(**changes):
    optimizer = optim.adafactor(0.3, multiply_by_parameter_scale=False)
    values = {"batch_size": 8, "inputs": 512, "targets": 32, **changes}
    return plan.Workload(XXL, optimizer=optimizer, **values)


@pytest.mark.parametrize(
    ("name", "chips", "gb"),
    [("v5e:2x4", 8, 16), ("v6e:1x1", 1, 32), ("v5p:2x2x1", 4, 95)],
)
def test_topologies_are_parsed(name, chips, gb):
    found = topologies.parse(name)
    assert (found.num_chips, found.platform) == (chips, "tpu")
    # Memory in binary units, or a little of the data sheet's kept by the system.
    assert 0.97 * gb <= found.usable_bytes / topologies.GIB <= 1.01 * gb


def test_the_local_devices_are_a_topology():
    found = topologies.parse("local")
    assert found.num_chips == jax.device_count() and found.usable_bytes > 0
    assert found.devices() == jax.devices()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5e:3x3", "set TOPOLOGY to v5e:2x4"),
        ("v5e:2x2x1", "set TOPOLOGY to v5e:2x2"),
        ("v5p:4x4", "set TOPOLOGY to v5p:2x2x4"),
        ("v5e", "set TOPOLOGY to v5e:1x1 or v5e:2x2"),
        ("h100:8", "no TPU chip is called 'h100'"),
    ],
)
def test_a_slice_that_does_not_exist(name, says):
    with pytest.raises(UserError, match=says):
        topologies.parse(name)


@pytest.mark.parametrize(
    ("topology", "changes", "says"),
    [
        ("v5e:2x4", {"num_partitions": 3}, "set NUM_PARTITIONS to 2"),
        ("v5e:16x16", {"num_partitions": 128, "batch_size": 2}, "heads 64 over 128"),
        ("v5e:4x4", {"num_partitions": 2, "batch_size": 12}, "BATCH_SIZE to 8 or 16"),
        ("v5e:2x4", {}, "set NUM_PARTITIONS to 2"),
        ("v5e:1x1", {}, "set TOPOLOGY to v5e:2x2 and NUM_PARTITIONS to 2"),
        ("v6e:1x1", {"frozen_dtype": "float32"}, "TOPOLOGY to v6e:2x2"),
    ],
)
def test_what_cannot_be_placed_is_refused_before_it_is_compiled(
    topology, changes, says
):
    with pytest.raises(UserError, match=says):
        command.check(xxl(**changes), topologies.parse(topology))


def test_arguments_are_those_of_training(work):
    """Shapes, dtypes and places are what `fit` gives the step."""
    mesh = sharding.make_mesh(2, jax.devices()[:4])
    work = dataclasses.replace(work, num_partitions=2)
    state, frozen, batch = plan.abstract_arguments(work, mesh)
    params = work.model.init(jax.random.key(0))
    tuned, rest = methods.split(params, methods.RULES["prompt_tuning"])
    real = TrainState.create(tuned, work.optimizer, jax.random.key(0))
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(state) == shapes(real)
    assert shapes(frozen) == shapes(rest)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    table = frozen["token_embedder"]["embedding"]
    assert table.sharding.shard_shape(table.shape) == (128, 32)
    assert batch["encoder_input_tokens"].sharding.shard_shape((16, 64)) == (8, 64)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_weights_of_a_chip_are_what_lies_on_a_device(work, parts):
    mesh = sharding.make_mesh(parts, jax.devices()[:4])
    work = dataclasses.replace(work, num_partitions=parts)
    _, frozen, _ = plan.abstract_arguments(work, mesh)
    placed = sum(
        np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(frozen)
    )
    assert plan.arguments_memory(work, 4).weights == placed


def test_the_weights_of_xxl():
    """11.1 billion of two bytes, counted by hand from its sizes."""
    square, mlp = 4096 * 4096, 3 * 4096 * 10240
    layers = 24 * (4 * square + mlp + 2 * 4096) + 24 * (8 * square + mlp + 3 * 4096)
    total = layers + 2 * 32128 * 4096 + 2 * 4096 + 2 * 64 * 32
    assert plan.arguments_memory(xxl(), 1).weights == 2 * total


def test_flops_by_hand():
    """One layer each, every term written out."""
    config = T5Config(100, 4, 2, 1, 1, 3, 5)
    optimizer = optim.adafactor(0.3)
    work = plan.Workload(config, 2, 7, 3, optimizer, prompt_length=1)
    projection, mlp, logits = 4 * 6, 3 * 4 * 5, 4 * 100
    encoder = (4 * projection + mlp) + 2 * projection  # and memory's keys, values
    decoder = 6 * projection + mlp + logits
    pairs = 8 * 8 + 3 * 3 + 3 * 8
    expected = {
        "weights": 2 * 4 * (8 * encoder + 3 * decoder),
        "attention": 2 * 12 * 6 * pairs,
    }
    assert plan.flops(work) == {**expected, "total": sum(expected.values())}
    tuned = dataclasses.replace(work, method="model_tuning", prompt_length=0)
    assert plan.flops(tuned)["weights"] == 2 * 6 * (7 * encoder + 3 * decoder)


def test_forward_flops_agree_with_the_compiler(work):
    """The program's own count of a forward pass, half of that of frozen weights."""
    config = dataclasses.replace(work.config, num_encoder_layers=1)
    config = dataclasses.replace(config, num_decoder_layers=1, emb_dim=256)
    work = dataclasses.replace(work, config=config)
    state, frozen, batch = plan.abstract_arguments(work)
    logits = lambda tuned, rest, batch: work.model.logits(
        trees.merge(tuned, rest), batch
    )
    cost = jax.jit(logits).lower(state.tuned, frozen, batch).compile().cost_analysis()
    number = plan.flops(work)
    assert cost["flops"] == pytest.approx(
        number["weights"] / 2 + number["attention"] / 3, rel=0.1
    )


def test_collectives_count_as_often_as_their_loop_runs():
    text = """\
HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %ar = bf16[4,8]{1,0} all-reduce(%x), channel_id=1, to_apply=%add
}

ENTRY %main (p: bf16[4,8]) -> bf16[8,8] {
  %loop = (s32[], bf16[4,8]) while(%t), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"24"}}
  %start = (bf16[4,8], bf16[8,8]) all-gather-start(%y), dimensions={0}
  ROOT %done = bf16[8,8]{1,0} all-gather-done(%start)
}
"""
    assert plan.collectives(text) == {
        "all-reduce": {"count": 24, "bytes": 24 * 64},
        "all-gather": {"count": 1, "bytes": 128},
    }


@pytest.mark.parametrize("most", [0, 1, 7, 50, 999])
@pytest.mark.parametrize("guess", [0, 4, 64, 2000])
def test_bisection_finds_the_largest_batch(most, guess):
    asked = []
    fits = lambda batch: asked.append(batch) or batch <= most
    found = plan.largest_batch(fits, 4, guess)
    assert found <= most < (found + 4) * 17 / 16 + 4
    assert found % 4 == 0 and len(asked) == len(set(asked)) <= 16


def on_cpu(work, tmp_path, chips):
    """What the compiler says for the first of the simulated devices."""
    topology = dataclasses.replace(topologies.parse("local"), num_chips=chips)
    if chips != jax.device_count():
        pytest.skip(f"needs {chips} simulated devices")
    return plan.compiled(work, topology, tmp_path)


def test_the_compiler_answers_once(work, tmp_path):
    work = dataclasses.replace(work, num_partitions=4)
    first = on_cpu(work, tmp_path, 8)
    kept = list(tmp_path.glob("*.json"))
    assert first.fits and first.memory.activations > 0 and len(kept) == 1
    # Partitioned heads and MLPs add up their parts in every layer, both ways.
    assert first.collectives["all-reduce"]["count"] >= 2 * 4
    record = json.loads(kept[0].read_text())
    record["memory"]["activations"] = 12345
    kept[0].write_text(json.dumps(record))
    assert on_cpu(work, tmp_path, 8).memory.activations == 12345


def test_more_rows_take_more_memory(work):
    small = plan.estimate(work, V6E)
    large = plan.estimate(dataclasses.replace(work, batch_size=32), V6E)
    assert large.weights == small.weights
    assert 1.8 * small.activations < large.activations < 2.2 * small.activations


def test_remat_saves_memory(work):
    needs = {}
    for remat in ("none", "dots", "full"):
        config = dataclasses.replace(work.config, remat=remat, num_encoder_layers=12)
        own = dataclasses.replace(work, config=config)
        needs[remat] = plan.estimate(own, V6E).activations
    assert needs["full"] < needs["dots"] < needs["none"]


@pytest.mark.parametrize(
    ("topology", "batch", "measured"),
    [("v6e:1x1", 8, 23.05), ("v6e:1x1", 24, 27.57), ("v5p:1x1x1", 32, 29.53)],
)
def test_the_estimate_agrees_with_measurements_of_xxl(topology, batch, measured):
    """GiB that libtpu 0.0.42.1 said the step takes (docs/plan.md)."""
    guess = plan.estimate(xxl(batch_size=batch), topologies.parse(topology))
    assert guess.total / topologies.GIB == pytest.approx(measured, rel=0.1)


def test_the_estimate_agrees_with_the_tpu_compiler(work, tmp_path):
    """A model compiled for one v6e chip without having one."""
    pytest.importorskip("libtpu", reason="libtpu is not installed")
    config = dataclasses.replace(work.config, vocab_size=65536, emb_dim=128)
    work = dataclasses.replace(work, config=config)
    answer = plan.compiled(work, V6E, tmp_path)
    assert answer.fits and answer.collectives == {}
    guess = plan.estimate(work, V6E)
    assert guess.total == pytest.approx(answer.memory.total, rel=0.1)


def test_the_command_prints_and_writes(tmp_path, capsys):
    path = tmp_path / "plan.json"
    arguments = ["plan", *FILES, LENGTHS, "--gin.TOPOLOGY=v5e:2x2"]
    arguments += ["--gin.PROMPT_LENGTH=4", "--gin.COMPILE=False"]
    # The most rows that are tried, so that the search ends at once.
    arguments.append("--gin.BATCH_SIZE=65536")
    assert cli.main([*arguments, f"--gin.OUTPUT_FILE={path}"]) == 0
    shown = capsys.readouterr().out
    assert "v5e:2x2, 4 chips" in shown and "largest batch" in shown
    written = json.loads(path.read_text())
    assert written["encoder_tokens"] == 16 and written["estimate"]["fits"]
    assert written["frozen_dtype"] == "bfloat16" and "compiled" not in written


def test_the_local_devices_are_planned_and_compiled(capsys):
    arguments = ["plan", *FILES, LENGTHS, "--gin.TOPOLOGY=local"]
    arguments += ["--gin.PROMPT_LENGTH=4", "--gin.LARGEST_BATCH=False"]
    assert cli.main([*arguments, "--gin.NUM_PARTITIONS=2"]) == 0
    captured = capsys.readouterr()
    assert "all-reduce" in captured.out and "yes" in captured.out
    assert "compiling batch 32 for local" in captured.err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("--gin.TOPOLOGY=v5e:5x5", "set TOPOLOGY to v5e:"),
        ("--gin.NUM_PARTITIONS=4", "heads 2 over 4"),
        ("--gin.BATCH_SIZE=6", "set BATCH_SIZE to 4 or 8"),
        ("--gin.REMAT=some", "remat='some'"),
        ("--gin.FROZEN_DTYPE=int3", "int3"),
    ],
)
def test_mistakes_are_one_line(change, says, capsys):
    arguments = ["plan", *FILES, LENGTHS, "--gin.COMPILE=False"]
    if "TOPOLOGY" not in change:
        arguments.append("--gin.TOPOLOGY=v5e:2x2")
    assert cli.main([*arguments, change]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and says in lines[0]
