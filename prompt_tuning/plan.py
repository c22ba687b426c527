# SPDX-License-Identifier: Apache-2.0
"""What a training step needs on chips that are not there: memory, traffic, FLOPs.

`compiled` asks the compiler, which takes seconds to minutes; `estimate` follows the
lifetimes of arrays through the traced step, which takes a second or two.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from prompt_tuning import methods, sharding, trees
from prompt_tuning.checkpoints import files
from prompt_tuning.model import Model
from prompt_tuning.network import T5Config, Transformer
from prompt_tuning.prompts import Prompt
from prompt_tuning.step import TrainState, make_train_step
from prompt_tuning.topologies import Topology
from prompt_tuning.types import Params

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A training step in numbers.

    Attributes:
      config: sizes of the model, with the activations' dtype and the remat policy.
      batch_size: rows over all chips.
      inputs: text tokens of the encoder.
      targets: tokens of the decoder.
      optimizer: moves the tuned leaves.
      method: a key of `methods.RULES`.
      prompt_length: virtual tokens, added to ``inputs``; 0 for methods without.
      frozen_dtype: what frozen weights are kept in.
      num_partitions: chips that one copy of the model is cut over.
      num_microbatches: parts of a batch whose gradients are added up.
    """

    config: T5Config
    batch_size: int
    inputs: int
    targets: int
    optimizer: optax.GradientTransformation
    method: str = "prompt_tuning"
    prompt_length: int = 100
    frozen_dtype: str = "bfloat16"
    num_partitions: int = 1
    num_microbatches: int = 1

    @property
    def model(self) -> Model:
        """Network and objective."""
        prompts = ()
        if self.prompt_length:
            prompts = (Prompt("plan", self.prompt_length),)
        return Model(Transformer(self.config, prompts))

    @property
    def step(self) -> Callable[..., Any]:
        """The pure function that training compiles."""
        return make_train_step(self.model, self.optimizer, self.num_microbatches)

    def grain(self, num_chips: int) -> int:
        """Every batch is a multiple of this number of rows."""
        return num_chips // self.num_partitions * self.num_microbatches

    def share(self, num_chips: int) -> "Workload":
        """The step that one chip takes: its heads, its part of the MLP, its rows."""
        cfg, parts = self.config, self.num_partitions
        return dataclasses.replace(
            self,
            config=dataclasses.replace(
                cfg,
                vocab_size=cfg.vocab_size // parts,
                num_heads=cfg.num_heads // parts,
                mlp_dim=cfg.mlp_dim // parts,
            ),
            batch_size=self.batch_size * parts // num_chips,
            num_partitions=1,
        )


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip.

    Attributes:
      weights: the frozen weights.
      state: the tuned leaves, the optimizer's statistics and the batch.
      activations: everything else that is alive at the worst moment.
    """

    weights: int
    state: int
    activations: int

    @property
    def total(self) -> int:
        """What has to fit."""
        return self.weights + self.state + self.activations


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a step.

    Attributes:
      memory: bytes on one chip.
      fits: False where the compiler refused the program for want of memory.
      collectives: kind -> times a step, and bytes of its results on one chip.
    """

    memory: Memory
    fits: bool
    collectives: dict[str, dict[str, int]]


def abstract_arguments(
    work: Workload, mesh: Mesh | None = None
) -> tuple[TrainState, Params, dict[str, jax.ShapeDtypeStruct]]:
    """State, frozen leaves and batch as shapes, placed as training places them."""
    boxed = work.model.abstract_params()
    params = nn.meta.unbox(boxed)
    tuned, frozen = methods.split(params, methods.RULES[work.method])
    length = work.inputs + work.prompt_length
    shapes = {
        "encoder_input_tokens": (length, jnp.int32),
        "decoder_input_tokens": (work.targets, jnp.int32),
        "decoder_target_tokens": (work.targets, jnp.int32),
        "decoder_loss_weights": (work.targets, jnp.float32),
    }
    batch = {
        name: jax.ShapeDtypeStruct((work.batch_size, length), dtype)
        for name, (length, dtype) in shapes.items()
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    create = lambda tuned, key: TrainState.create(tuned, work.optimizer, key)
    state = jax.eval_shape(create, tuned, key)
    frozen = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(work.frozen_dtype)),
        frozen,
    )
    if mesh is None:
        return state, frozen, batch
    place = lambda leaf, where: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=where
    )
    placed = trees.flatten(param_shardings(work, mesh))
    by_name = lambda name, leaf: place(leaf, placed[name])
    whole = sharding.replicated(mesh)
    state = jax.tree.map(lambda leaf: place(leaf, whole), state)
    state = state.replace(tuned=trees.map_with_path(by_name, state.tuned))
    rows = NamedSharding(mesh, PartitionSpec(sharding.DATA))
    batch = {name: place(leaf, rows) for name, leaf in batch.items()}
    return state, trees.map_with_path(by_name, frozen), batch


def param_shardings(work: Workload, mesh: Mesh | AbstractMesh) -> Params:
    """Where every parameter lies (see `sharding.param_shardings`)."""
    rules = sharding.logical_axis_rules()
    return sharding.param_shardings(work.model.abstract_params(), mesh, rules)


def arguments_memory(work: Workload, num_chips: int) -> Memory:
    """What lies on a chip before the step begins, exactly."""
    state, frozen, batch = abstract_arguments(work.share(num_chips))
    # A key's dtype has no size of its own; it is a few bytes.
    state = state.replace(key=state.step)
    return Memory(trees.num_bytes(frozen), trees.num_bytes((state, batch)), 0)


def estimate(work: Workload, topology: Topology) -> Memory:
    """The memory of one chip, without compiling.

    The step that one chip takes is traced at the sizes of its share; an array that a
    fused kernel would not write to memory costs nothing (see `_peak`).
    """
    own = work.share(topology.num_chips)
    traced = jax.make_jaxpr(own.step)(*abstract_arguments(own))
    memory = arguments_memory(work, topology.num_chips)
    return dataclasses.replace(
        memory, activations=_peak(traced.jaxpr, topology.vmem_bytes)
    )


# Operations whose results are written to memory. Everything else (elementwise,
# broadcasts, masks, transposes) is taken to be fused into what reads it.
_WRITES = re.compile(
    "dot_general|conv_.*|reduce_.*|arg.*|gather|scatter.*|sort|cum.*|dynamic_.*"
)


def _peak(jaxpr: Jaxpr, vmem: int, looped: bool = False) -> int:
    """Most bytes alive at once inside a program, its arguments not counted.

    An array is alive from the operation that writes it to the last that reads it, also
    through fused operations in between. Inside a loop the compiler keeps about one of
    the arrays of a moment in the chip's vector memory, the largest that has room there.
    """
    operations: list[tuple[frozenset[int], dict[int, int], int]] = []

    def bytes_of(var) -> int:
        return math.prod(var.aval.shape) * var.aval.dtype.itemsize

    def walk(jaxpr, inputs: Sequence[frozenset[int]]) -> list[frozenset[int]]:
        written = dict(zip(jaxpr.invars, inputs, strict=True))
        stored = lambda v: (
            frozenset() if isinstance(v, Literal) else written.get(v, frozenset())
        )
        for eqn in jaxpr.eqns:
            reads = [stored(v) for v in eqn.invars]
            every = frozenset().union(*reads)
            inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
            name = eqn.primitive.name
            if inner is not None and name not in ("scan", "while"):
                outs = walk(getattr(inner, "jaxpr", inner), reads)
                written.update(zip(eqn.outvars, outs, strict=True))
                continue
            fused = not _WRITES.fullmatch(name) and not _narrows(eqn)
            if inner is None and fused:
                written.update(dict.fromkeys(eqn.outvars, every))
                continue
            within = 0 if inner is None else _peak(inner.jaxpr, vmem, True)
            sizes = {}
            for var in eqn.outvars:
                sizes[id(var)] = bytes_of(var)
                written[var] = frozenset([id(var)])
            operations.append((every, sizes, within))
        return [stored(v) for v in jaxpr.outvars]

    kept = frozenset().union(*walk(jaxpr, [frozenset()] * len(jaxpr.invars)))
    last = {key: i for i, (reads, _, _) in enumerate(operations) for key in reads}
    alive, most = {}, 0
    for i, (_, sizes, within) in enumerate(operations):
        alive |= sizes
        near = max((n for n in alive.values() if looped and n <= vmem), default=0)
        most = max(most, sum(alive.values()) - near + within)
        for key in list(alive):
            if last.get(key, i) <= i and key not in kept:
                del alive[key]
    return most


def _narrows(eqn: JaxprEqn) -> bool:
    """Whether an operation ends a float32 interlude inside a bfloat16 network.

    What softmax, norms and their gradients compute in float32 is fused; its rounded
    result is read by matrix products and written.
    """
    if eqn.primitive.name != "convert_element_type":
        return False
    (before,), (after,) = eqn.invars, eqn.outvars
    return after.aval.dtype.itemsize < before.aval.dtype.itemsize


def compiled(work: Workload, topology: Topology, cache: pathlib.Path) -> Compiled:
    """Compiles the step for a topology and reads what the compiler says of it.

    Args:
      work: the step.
      topology: its chips.
      cache: folder of earlier answers; the same program is not compiled twice.
    """
    mesh = sharding.make_mesh(work.num_partitions, topology.devices())
    arguments = abstract_arguments(work, mesh)
    with sharding.partitioned(mesh, sharding.logical_axis_rules()):
        lowered = jax.jit(work.step, donate_argnums=0).lower(*arguments)
    version = "" if topology.platform != "tpu" else metadata.version("libtpu")
    told = f"{topology.name} {version} {jax.__version__} {lowered.as_text()}"
    path = cache / f"{hashlib.sha256(told.encode()).hexdigest()}.json"
    if not path.exists():
        answer = _ask(
            lowered, arguments_memory(work, topology.num_chips), topology.platform
        )
        cache.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(answer)))
    read = json.loads(path.read_text())
    memory = Memory(**read["memory"])
    fits = read["fits"] and memory.total <= topology.usable_bytes
    return Compiled(memory, fits, read["collectives"])


def _ask(lowered: jax.stages.Lowered, before: Memory, platform: str) -> Compiled:
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refused = _REFUSED.search(str(error))
        if refused is None:
            raise
        used = float(refused[1]) * 1024 ** (1 + "KMGT".index(refused[2]))
        activations = int(used) - before.total
        return Compiled(dataclasses.replace(before, activations=activations), False, {})
    sizes = program.memory_analysis()
    total = sizes.argument_size_in_bytes + sizes.output_size_in_bytes
    total += sizes.temp_size_in_bytes - sizes.alias_size_in_bytes
    if platform == "tpu":
        # What decides on a TPU: programs whose sizes add up to more than its memory
        # compile, those whose peak is more do not.
        total = sizes.peak_memory_in_bytes
    # The padding of arguments to the tiles of the hardware counts as activations.
    return Compiled(
        dataclasses.replace(before, activations=total - before.total),
        True,
        collectives(program.as_text()),
    )


# How the TPU compiler says that a program does not fit.
_REFUSED = re.compile(
    r"(?:HLO temporaries \(|Used )([\d.]+)([KMGT])\)? (?:exceeds available HBM|of )"
)
_ARRAY = re.compile(r"\b([a-z]+)(\d+)\w*\[([\d,]*)\]")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
_CALLED = re.compile(r"(?:body|calls|to_apply|computation)=%?([\w.\-]+)")
_TIMES = re.compile(r'known_trip_count"?:\{"n":"(\d+)"')


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """Communication of one step, from the text of a compiled program.

    An operation inside a loop counts as often as the loop runs.

    Returns:
      kind -> ``count``, and ``bytes`` of the results on one chip.
    """
    blocks: dict[str, list[str]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            words = line.removeprefix("ENTRY ").split()
            name = words[0].lstrip("%").partition("(")[0]
            entry = name if line.startswith("ENTRY") else entry
        blocks.setdefault(name, []).append(line)
    found: dict[str, dict[str, int]] = {}

    def visit(name: str, times: int) -> None:
        for line in blocks.get(name, ()):
            if match := _COLLECTIVE.search(line):
                sizes = [
                    math.prod(int(n) for n in shape.split(",") if n) * int(bits) // 8
                    for _, bits, shape in _ARRAY.findall(match[1])
                ]
                # What a started operation returns holds its operand, too.
                both = match[3] and match[2] != "all-reduce"
                size = max(sizes, default=0) if both else sum(sizes)
                total = found.setdefault(match[2], {"count": 0, "bytes": 0})
                total["count"] += times
                total["bytes"] += times * size
            loop = _TIMES.search(line)
            for called in _CALLED.findall(line):
                visit(called, times * (int(loop[1]) if loop else 1))

    visit(entry, 1)
    return found


def flops(work: Workload) -> dict[str, int]:
    """Floating point operations of one step over all chips, by formula.

    A frozen weight costs 4 for every token that it meets: a multiplication and an
    addition forward, and as much for the gradient of its input; a tuned one 2 more for
    its own gradient. Weights of the encoder, and the decoder's that make keys and
    values of the encoder's output, meet the T encoder tokens of a row (prompt and
    padding included), the others of the decoder its S. Attention has no weights: its
    two products of N heads of width D take 4 T^2 N D a row forward and twice that
    backward. What remat computes again, and elementwise work, does not count.

    Returns:
      ``weights``, ``attention`` and ``total``.
    """
    cfg = work.config
    encoder, decoder = work.inputs + work.prompt_length, work.targets
    joined = cfg.num_heads * cfg.head_dim
    square = cfg.emb_dim * joined  # one of query, key, value and out
    mlp = (len(cfg.mlp_activations) + 1) * cfg.emb_dim * cfg.mlp_dim
    at_encoder = cfg.num_encoder_layers * (4 * square + mlp)
    at_encoder += cfg.num_decoder_layers * 2 * square
    at_decoder = cfg.num_decoder_layers * (6 * square + mlp)
    at_decoder += cfg.vocab_size * cfg.emb_dim
    each = 6 if work.method == "model_tuning" else 4
    weights = each * (at_encoder * encoder + at_decoder * decoder)
    pairs = cfg.num_encoder_layers * encoder**2
    pairs += cfg.num_decoder_layers * decoder * (decoder + encoder)
    attention = 3 * 4 * pairs * joined
    weights, attention = weights * work.batch_size, attention * work.batch_size
    return {"weights": weights, "attention": attention, "total": weights + attention}


def largest_batch(
    fits: Callable[[int], bool], grain: int, guess: int, limit: int = 2**16
) -> int:
    """The largest batch that fits, by bisection; 0 if none does.

    Above 16 grains the batches looked at lie a sixteenth apart or less.

    Args:
      fits: whether a batch does; taken to be monotone.
      grain: every batch is a multiple of it.
      guess: where to look first.
      limit: the largest batch to look at.

    >>> largest_batch(lambda batch: batch <= 50, grain=4, guess=8)
    48
    """
    # 1, 2, ... 15, 16, 17, ... 31, 32, 34, ... 62, 64, 68, ...
    batch = lambda i: grain * (i if i < 16 else (16 + i % 16) << (i // 16 - 1))
    low, high, step, i = 0, 1, 1, 1
    while batch(high) <= limit:
        high += 1
    while batch(i + 1) <= min(guess, limit):
        i += 1
    # From the guess in growing steps until both sides are known, then by halves.
    while high - low > 1:
        if fits(batch(i)):
            low = i
            i += step
        else:
            high = i
            i -= step
        step *= 2
        if not low < i < high:
            i = (low + high) // 2
    return batch(low) if low else 0
