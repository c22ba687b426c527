# SPDX-License-Identifier: Apache-2.0
"""What a step needs: its arguments, what is estimated, what the compiler says."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning import decoding, trees
from prompt_tuning.devices import sharding, topologies
from prompt_tuning.methods import registry
from prompt_tuning.methods.method import Start
from prompt_tuning.network import quantization
from prompt_tuning.network.transformer import T5Config
from prompt_tuning.planning import (
    collectives,
    flops,
    lifetimes,
    memory_report,
    workload,
)
from prompt_tuning.planning.workload import Workload
from prompt_tuning.training import optimizers
from prompt_tuning.training.step import TrainState

XXL = T5Config(32128, 4096, 64, 24, 24, 64, 10240, dtype="bfloat16", remat="full")
V6E = topologies.parse("v6e:1x1")


@pytest.fixture
def work(tiny_config):
    config = dataclasses.replace(tiny_config, remat="full")
    optimizer = optimizers.adafactor(0.3, multiply_by_parameter_scale=False)
    return Workload(
        config=config,
        batch_size=16,
        inputs=56,
        targets=8,
        optimizer=optimizer,
        prompt_length=8,
        frozen_dtype="float32",
    )


def xxl(**changes):
    optimizer = optimizers.adafactor(0.3, multiply_by_parameter_scale=False)
    values = {"batch_size": 8, "inputs": 512, "targets": 32, **changes}
    return Workload(config=XXL, optimizer=optimizer, **values)


def test_arguments_are_those_of_training(work):
    """Shapes, dtypes and places are what `fit` gives the step."""
    mesh = sharding.make_mesh(2, jax.devices()[:4])
    work = dataclasses.replace(work, num_partitions=2)
    state, frozen, batch = workload.abstract_arguments(work, mesh)
    params = work.model.init(jax.random.key(0))
    tuned, rest = registry.split(params, registry.rules_of("prompt_tuning"))
    tx = optimizers.by_member({workload.MEMBER: work.optimizer})
    real = TrainState.create({workload.MEMBER: tuned}, tx, jax.random.key(0))
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(state) == shapes(real)
    assert shapes(frozen) == shapes(rest)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    table = frozen["token_embedder"]["embedding"]
    assert table.sharding.shard_shape(table.shape) == (128, 32)
    assert batch["encoder_input_tokens"].sharding.shard_shape((16, 64)) == (8, 64)


def test_every_member_of_a_run_is_counted(work):
    """LoRA's leaves and statistics beside a prompt's, each as often as it is there."""
    lora, plain = registry.named("lora"), registry.named("prompt_tuning")
    others = ((lora, 0), (lora, 0), (plain, 5))
    many = dataclasses.replace(work, others=others)
    alone = workload.arguments_memory(work, 1)
    params = work.model.init(jax.random.key(0))
    _, base = registry.split(params, registry.rules_of("prompt_tuning"))
    rows = jnp.zeros((5, work.config.emb_dim))
    added = 0
    for method, length in others:
        start = Start(rows[:length], base["token_embedder"]["embedding"], base)
        tuned = method.place("x", method.init(jax.random.key(0), start))
        tx = optimizers.by_member({"x": work.optimizer})
        state = TrainState.create({"x": tuned}, tx, jax.random.key(0))
        added += trees.num_bytes((state.tuned, state.opt_state))
    found = workload.arguments_memory(many, 1)
    assert (found.weights, found.state) == (alone.weights, alone.state + added)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_weights_of_a_chip_are_what_lies_on_a_device(work, parts, dims, dtype):
    """Arrays are made, quantised and placed as loading does it, and counted."""
    mesh = sharding.make_mesh(parts, jax.devices()[:4])
    work = dataclasses.replace(
        work,
        num_partitions=parts,
        parameter_partitioning_dims=dims,
        frozen_dtype=dtype,
    )
    params = work.model.init(jax.random.key(0))
    frozen = trees.flatten(registry.split(params, registry.rules_of(work.method))[1])
    if dtype == "int8":
        kernels = [name for name in frozen if name.endswith("/kernel")]
        for name in kernels:
            scale = quantization.scale_name(name)
            frozen[name], frozen[scale] = quantization.quantize(frozen[name])
    rules = sharding.logical_axis_rules(1, dims)
    boxed = work.model.abstract_params()
    if dtype == "int8":
        boxed = quantization.quantize_abstract(boxed)
    places = trees.flatten(sharding.param_shardings(boxed, mesh, rules))
    frozen = {name: jax.device_put(x, places[name]) for name, x in frozen.items()}
    first = jax.devices()[0]
    placed = sum(
        shard.data.nbytes
        for leaf in frozen.values()
        for shard in leaf.addressable_shards
        if shard.device == first
    )
    assert workload.arguments_memory(work, 4).weights == placed


@pytest.mark.parametrize("step", ["rank", "decode"])
def test_inference_is_what_evaluation_runs(work, step):
    """The planned program on real arrays: its arguments fit, its answers agree."""
    work = dataclasses.replace(work, step=step, batch_size=2)
    params = work.model.init(jax.random.key(0))
    tuned, frozen = registry.split(params, registry.rules_of("prompt_tuning"))
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    batch = {"encoder_input_tokens": jnp.full((2, 64), 5)}
    strategy = decoding.Greedy(8)
    if step == "rank":
        batch["label_tokens"] = jnp.array([[3, 1], [4, 1]]).repeat(4, axis=1)
    expected = {
        "rank": lambda: work.model.rank(params, *batch.values()),
        "decode": lambda: work.model.predict(params, *batch.values(), strategy),
    }[step]()
    arguments = (tuned, frozen, batch)
    assert shapes(workload.abstract_arguments(work)) == shapes(arguments)
    found = jax.jit(work.program)(*arguments)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_the_weights_of_xxl():
    """11.1 billion of two bytes, counted by hand from its sizes."""
    square, mlp = 4096 * 4096, 3 * 4096 * 10240
    layers = 24 * (4 * square + mlp + 2 * 4096) + 24 * (8 * square + mlp + 3 * 4096)
    total = layers + 2 * 32128 * 4096 + 2 * 4096 + 2 * 64 * 32
    assert workload.arguments_memory(xxl(), 1).weights == 2 * total


def test_flops_by_hand():
    """One layer each, every term written out."""
    config = T5Config(100, 4, 2, 1, 1, 3, 5)
    optimizer = optimizers.adafactor(0.3)
    work = Workload(
        config=config,
        batch_size=2,
        inputs=7,
        targets=3,
        optimizer=optimizer,
        prompt_length=1,
    )
    projection, mlp, logits = 4 * 6, 3 * 4 * 5, 4 * 100
    encoder = (4 * projection + mlp) + 2 * projection  # and memory's keys, values
    decoder = 6 * projection + mlp + logits
    pairs = 8 * 8 + 3 * 3 + 3 * 8
    expected = {
        "weights": 2 * 4 * (8 * encoder + 3 * decoder),
        "attention": 2 * 12 * 6 * pairs,
    }
    assert flops.count(work) == {**expected, "total": sum(expected.values())}
    forward = {"weights": expected["weights"] // 2}
    decode = dataclasses.replace(work, step="decode")
    assert flops.count(decode)["weights"] == forward["weights"]
    assert flops.count(decode)["attention"] == expected["attention"] // 3
    # Another label: the decoder's weights and attention once more.
    rank = dataclasses.replace(work, step="rank", num_labels=2)
    forward["weights"] += 2 * 2 * 3 * decoder
    assert flops.count(rank)["weights"] == forward["weights"]
    # Labels of a second decoder row: keys and values of the encoder's output, too.
    many = dataclasses.replace(work, step="rank", num_labels=43)
    memory = 2 * projection * 8
    forward["weights"] += 2 * 2 * (memory + 41 * 3 * decoder)
    assert flops.count(many)["weights"] == forward["weights"]
    # A loss over labels trains through as many decoders.
    labels = dataclasses.replace(work, label_loss="cross_entropy", num_labels=2)
    more = 2 * 4 * 3 * decoder
    assert flops.count(labels)["weights"] == expected["weights"] + more
    assert labels.decoders == 2 and work.decoders == 1
    tuned = dataclasses.replace(
        work, method=registry.named("model_tuning"), prompt_length=0
    )
    assert flops.count(tuned)["weights"] == 2 * 6 * (7 * encoder + 3 * decoder)


def test_forward_flops_agree_with_the_compiler(work):
    """The program's own count of a forward pass, half of that of frozen weights."""
    config = dataclasses.replace(work.config, num_encoder_layers=1)
    config = dataclasses.replace(config, num_decoder_layers=1, emb_dim=256)
    work = dataclasses.replace(work, config=config)
    state, frozen, batch = workload.abstract_arguments(work)
    tuned = state.tuned[workload.MEMBER]
    logits = lambda tuned, rest, batch: work.model.logits(
        trees.merge(tuned, rest), batch
    )
    cost = jax.jit(logits).lower(tuned, frozen, batch).compile().cost_analysis()
    number = flops.count(work)
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
    assert collectives.read(text) == {
        "all-reduce": {"count": 24, "bytes": 24 * 64},
        "all-gather": {"count": 1, "bytes": 128},
    }


@pytest.mark.parametrize("most", [0, 1, 7, 50, 999])
@pytest.mark.parametrize("guess", [0, 4, 64, 2000])
def test_bisection_finds_the_largest_batch(most, guess):
    asked = []
    fits = lambda batch: asked.append(batch) or batch <= most
    found = memory_report.largest_batch(fits, 4, guess)
    assert found <= most < (found + 4) * 17 / 16 + 4
    assert found % 4 == 0 and len(asked) == len(set(asked)) <= 16


def on_cpu(work, tmp_path, chips):
    """What the compiler says for the first of the simulated devices."""
    topology = dataclasses.replace(topologies.parse("local"), num_chips=chips)
    if chips != jax.device_count():
        pytest.skip(f"needs {chips} simulated devices")
    return memory_report.compiled(work, topology, tmp_path)


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
    small = memory_report.estimate(work, V6E)
    large = memory_report.estimate(dataclasses.replace(work, batch_size=32), V6E)
    assert large.weights == small.weights
    assert 1.8 * small.activations < large.activations < 2.2 * small.activations


def test_decoding_holds_the_keys_and_values_of_all_layers(work):
    """Of the encoder's output, and of what is decoded."""
    work = dataclasses.replace(work, step="decode", inputs=120)
    config = dataclasses.replace(work.config, num_decoder_layers=48)
    deep = dataclasses.replace(work, config=config)
    more = memory_report.estimate(deep, V6E).activations
    more -= memory_report.estimate(work, V6E).activations
    position = 2 * 46 * work.batch_size * 4 * 8 * 4  # [L, B, ..., N, D] float32, twice
    cached = position * (120 + 8 + 8)
    assert cached <= more <= 1.5 * cached


def test_weights_of_two_dimensions_are_gathered_layer_by_layer(work):
    """Cut over the rows' chips, too, they take less; a layer at a time is whole."""
    chips = topologies.parse("v6e:2x2")
    cut = dataclasses.replace(work, parameter_partitioning_dims=2)
    one, two = (memory_report.estimate(each, chips) for each in (work, cut))
    assert two.weights < 0.3 * one.weights
    embed, joined, mlp = 32, 4 * 8, 64
    kernels = 8 * embed * joined + 3 * embed * mlp
    assert two.activations - one.activations == 4 * (kernels + 3 * embed)


def test_lifetimes_by_hand():
    """Matrix products are written, what lies between them is fused."""

    def program(x, w):  # [64, 128], [128, 128]
        a = x @ w
        b = jnp.tanh(a) @ w  # a is alive
        c = (b + x) @ w  # a is not
        return jnp.sum(c)

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 128), (128, 128))]
    traced = jax.make_jaxpr(program)(*shapes)
    array = 64 * 128 * 4
    assert lifetimes.peak(traced.jaxpr, vmem=0) == 2 * array


def test_a_loop_carries_in_place_and_stacks_its_results():
    def program(x, w):  # [64, 128], [128, 128]
        def body(carry, _):
            return jnp.tanh(carry @ w), carry

        return jax.lax.scan(body, x @ w, length=5)

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 128), (128, 128))]
    traced = jax.make_jaxpr(program)(*shapes)
    array = 64 * 128 * 4
    # What is carried, five results, and the product inside.
    assert lifetimes.peak(traced.jaxpr, vmem=0) == (1 + 5 + 1) * array


def test_arrays_take_whole_tiles():
    """7 rows of 130 numbers are stored as 8 of 256."""
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((7, 9), (9, 130))]
    traced = jax.make_jaxpr(jnp.dot)(*shapes)
    assert lifetimes.peak(traced.jaxpr, vmem=0) == 7 * 130 * 4
    assert lifetimes.peak(traced.jaxpr, vmem=2**20) == 8 * 256 * 4


def test_remat_saves_memory(work):
    needs = {}
    for remat in ("none", "dots", "full"):
        config = dataclasses.replace(work.config, remat=remat, num_encoder_layers=12)
        own = dataclasses.replace(work, config=config)
        needs[remat] = memory_report.estimate(own, V6E).activations
    assert needs["full"] < needs["dots"] < needs["none"]


@pytest.mark.parametrize(
    ("topology", "batch", "measured"),
    [
        ("v6e:1x1", 8, 22.69),
        ("v6e:1x1", 36, 29.41),
        ("v5p:1x1x1", 32, 28.50),
        ("v5p:1x1x1", 256, 92.81),
    ],
)
def test_the_estimate_agrees_with_measurements_of_xxl(topology, batch, measured):
    """GiB that libtpu 0.0.42.1 said the step takes (docs/plan.md)."""
    guess = memory_report.estimate(xxl(batch_size=batch), topologies.parse(topology))
    assert guess.total / topologies.GIB == pytest.approx(measured, rel=0.1)


def test_the_estimate_agrees_with_the_tpu_compiler(work, tmp_path):
    """A model compiled for one v6e chip without having one."""
    pytest.importorskip("libtpu", reason="libtpu is not installed")
    config = dataclasses.replace(work.config, vocab_size=65536, emb_dim=128)
    work = dataclasses.replace(work, config=config)
    answer = memory_report.compiled(work, V6E, tmp_path)
    assert answer.fits and answer.collectives == {}
    guess = memory_report.estimate(work, V6E)
    assert guess.total == pytest.approx(answer.memory.total, rel=0.1)
