# SPDX-License-Identifier: Apache-2.0
"""A step to plan: its numbers, its program, and its arguments as shapes.

The program is the one that training, ranking or decoding compiles, and the arguments
are placed as these place them, so that what a compiler says of one holds for the other.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from prompt_tuning import decoding, dtypes, trees
from prompt_tuning.devices import sharding
from prompt_tuning.methods import registry
from prompt_tuning.methods.method import HELD, Method, Start, assemble
from prompt_tuning.methods.prompt_tuning import PromptTuning
from prompt_tuning.network import quantization
from prompt_tuning.network.comparison import CompareAs
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.training import optimizers
from prompt_tuning.training.step import TrainState, make_train_step
from prompt_tuning.types import Params, PyTree

TRAIN, RANK, DECODE = STEPS = ("train", "rank", "decode")
# The one member of a run that is planned.
MEMBER = "plan"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A step in numbers.

    Attributes:
      config: sizes of the model, with the activations' dtype and the remat policy.
      batch_size: rows over all chips.
      inputs: text tokens of the encoder.
      targets: tokens of the decoder.
      optimizer: moves the tuned leaves; inference has no use for it.
      method: what moves.
      prompt_length: virtual tokens, added to ``inputs``; 0 for methods without.
      others: methods and prompt lengths of the members beside this one. What they tune
        and its statistics are counted; the traced program is that of the one.
      frozen_dtype: what frozen weights are kept in. With 'int8' kernels the leaves
        that are not quantised are kept in the activations' dtype.
      num_partitions: chips that one copy of the model is cut over.
      parameter_partitioning_dims: 2 also cuts the hidden width of parameters over the
        chips that share no copy.
      num_microbatches: parts of a batch whose gradients are added up.
      step: 'train', 'rank' (the likelihood of every label) or 'decode' (greedily).
      num_labels: labels that are ranked, or that a ``label_loss`` reads.
      label_loss: what training compares labels by; None teaches target tokens.
    """

    config: T5Config
    batch_size: int
    inputs: int
    targets: int
    optimizer: optax.GradientTransformation
    method: Method = dataclasses.field(default_factory=PromptTuning)
    prompt_length: int = 100
    others: tuple[tuple[Method, int], ...] = ()
    frozen_dtype: str = "bfloat16"
    num_partitions: int = 1
    parameter_partitioning_dims: int = 1
    num_microbatches: int = 1
    step: str = TRAIN
    num_labels: int = 2
    label_loss: str | None = None

    @property
    def decoders(self) -> int:
        """What the decoder reads for a row: its targets alone (1), or so many labels."""
        of_labels = self.step == RANK or (self.step == TRAIN and self.label_loss)
        return self.num_labels if of_labels else 1

    @property
    def comparisons(self) -> int:
        """How often a step compares two prompts' answers, all members together."""
        members = (self.method, *(method for method, _ in self.others))
        return sum(method.comparisons for method in members)

    @property
    def model(self) -> Model:
        """Network and objective."""
        prompts = ()
        if self.prompt_length:
            prompts = (Prompt(MEMBER, self.prompt_length),)
        network = Transformer(self.config, prompts)
        loss = self.label_loss if self.step == TRAIN else None
        return Model(network) if loss is None else Model(network, label_loss=loss)

    @property
    def program(self) -> Callable[..., Any]:
        """The pure function that is compiled, of the `abstract_arguments`."""
        if self.step == TRAIN:
            return make_train_step(
                self.model,
                _optimizer(self),
                self.num_microbatches,
                self._assemble,
                self._penalize if self.method.has_penalty else None,
                self._teach if self.method.has_lesson else None,
            )
        if self.step == RANK:
            return lambda tuned, frozen, batch: self.model.rank(
                trees.merge(tuned, frozen), **batch
            )
        strategy = decoding.Greedy(self.targets)
        return lambda tuned, frozen, batch: self.model.predict(
            trees.merge(tuned, frozen), strategy=strategy, **batch
        )

    def _assemble(self, tuned: Mapping[str, Params], frozen: Params) -> Params:
        part = self.method.materialize(tuned[MEMBER], frozen)
        bank = self.model.network.prompts
        return trees.merge(assemble({MEMBER: part}, [MEMBER], bank), frozen)

    def _penalize(self, tuned: Mapping[str, Params], frozen: Params) -> PyTree:
        return self.method.penalize(tuned[MEMBER], frozen)

    def _teach(
        self, tuned: Mapping[str, Params], frozen: Params, compare: CompareAs
    ) -> PyTree:
        own = functools.partial(compare, MEMBER)
        return self.method.teach(tuned[MEMBER], frozen, own)

    @property
    def donated(self) -> tuple[int, ...]:
        """Arguments whose memory the results take over."""
        return (0,) if self.step == TRAIN else ()

    @property
    def rules(self) -> sharding.Rules:
        """From logical to mesh axes."""
        return sharding.logical_axis_rules(1, self.parameter_partitioning_dims)

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
            parameter_partitioning_dims=1,
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


def abstract_params(work: Workload) -> Params:
    """Shapes of all parameters as they are kept, in boxes with their logical axes."""
    boxed = _boxed(work.model)
    dtype = work.frozen_dtype
    if dtype == dtypes.INT8:
        boxed = quantization.quantize_abstract(boxed)
        dtype = work.config.dtype
    # Inference moves nothing, but prompts stay float32 beside the weights.
    tuned = work.method.rules if work.step == TRAIN else PromptTuning.rules

    def kept(name: str, box: Any) -> Any:
        leaf = box.value
        exact = leaf.dtype == jnp.int8 or name.endswith(f"/{quantization.SCALE}")
        if exact or trees.first_match(tuned, name) == registry.TUNED:
            return box
        return box.replace_boxed(jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)))

    return trees.map_with_path(kept, boxed)


def _optimizer(work: Workload) -> optax.GradientTransformation:
    return optimizers.by_member({MEMBER: work.optimizer})


# A search for the largest batch asks for them again and again.
_boxed = functools.lru_cache(maxsize=16)(Model.abstract_params)


def param_shardings(work: Workload, mesh: Mesh | AbstractMesh) -> Params:
    """Where every parameter lies (see `sharding.param_shardings`)."""
    return sharding.param_shardings(abstract_params(work), mesh, work.rules)


def abstract_arguments(
    work: Workload, mesh: Mesh | AbstractMesh | None = None
) -> tuple[PyTree, Params, Mapping[str, jax.ShapeDtypeStruct]]:
    """The arguments of `Workload.program` as shapes.

    Returns:
      The state of training, or the prompts alone; the frozen leaves; the batch. With a
      mesh they are placed as a run places them.
    """
    params = nn.meta.unbox(abstract_params(work))
    if work.step == TRAIN and work.method.result == "model":
        tuned, frozen = jax.eval_shape(work.method.split, params)
    else:
        label_tree = trees.labels(params, PromptTuning.rules)
        tuned = trees.select(params, label_tree, registry.TUNED)
        frozen = trees.select(params, label_tree, registry.FROZEN)
    batch = _abstract_batch(work)
    state = tuned
    if work.step == TRAIN:
        if work.method.result != "model":
            tuned, held = _abstract_tuned(work.method, work.prompt_length, frozen)
            frozen = {**frozen, HELD: {MEMBER: held}} if held else frozen
        state = _abstract_state(work, tuned)
    if mesh is None:
        return state, frozen, batch
    place = lambda leaf, where: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=where
    )
    placed = trees.flatten(param_shardings(work, mesh))
    whole = sharding.replicated(mesh)
    by_name = lambda name, leaf: place(
        leaf, placed.get(name.removeprefix(f"{HELD}/"), whole)
    )
    state = jax.tree.map(lambda leaf: place(leaf, whole), state)
    if work.step == TRAIN:
        own = trees.map_with_path(by_name, state.tuned[MEMBER])
        state = state.replace(tuned={MEMBER: own})
    rows = NamedSharding(mesh, PartitionSpec(sharding.DATA))
    batch = {
        name: place(leaf, whole if leaf.ndim == 2 and name == "label_tokens" else rows)
        for name, leaf in batch.items()
    }
    return state, trees.map_with_path(by_name, frozen), batch


def _abstract_tuned(method: Method, length: int, base: Params) -> tuple[Params, Params]:
    """What a member tunes, and what it holds, as shapes."""
    table = base["token_embedder"]["embedding"]
    rows = jax.ShapeDtypeStruct((length, table.shape[1]), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    start = Start(rows, table, base, [rows] * len(method.reads()))  # pyright: ignore[reportArgumentType]
    leaves = jax.eval_shape(method.init, key, start)
    return method.place(MEMBER, leaves), jax.eval_shape(method.held, start)


def _abstract_state(work: Workload, tuned: Params) -> TrainState:
    key = jax.eval_shape(lambda: jax.random.key(0))
    create = lambda tuned, key: TrainState.create(tuned, _optimizer(work), key)
    return jax.eval_shape(create, {MEMBER: tuned}, key)


def _others_bytes(work: Workload, frozen: Params) -> int:
    """What the other members tune, and its statistics; every chip has all of it."""
    base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), frozen)
    total = 0
    for (method, length), count in Counter(work.others).items():
        tuned, held = _abstract_tuned(method, length, base)
        state = _abstract_state(work, tuned)
        total += count * trees.num_bytes((state.tuned, state.opt_state, held))
    return total


def _abstract_batch(work: Workload) -> dict[str, jax.ShapeDtypeStruct]:
    rows, length = work.batch_size, work.inputs + work.prompt_length
    tokens = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    batch = {"encoder_input_tokens": tokens(rows, length)}
    if work.step == RANK:
        batch["label_tokens"] = tokens(work.num_labels, work.targets)
    if work.step == TRAIN:
        for name in ("decoder_input_tokens", "decoder_target_tokens"):
            batch[name] = tokens(rows, work.targets)
        weights = jax.ShapeDtypeStruct((rows, work.targets), jnp.float32)
        batch["decoder_loss_weights"] = weights
        if work.label_loss is not None:
            # Each row's own, as members of several tasks have them.
            batch["label_tokens"] = tokens(rows, work.num_labels, work.targets)
    return batch


def arguments_memory(work: Workload, num_chips: int) -> Memory:
    """What lies on a chip before the step begins, exactly."""
    parts = work.num_partitions
    mesh = AbstractMesh((num_chips // parts, parts), (sharding.DATA, sharding.MODEL))
    state, frozen, batch = abstract_arguments(work, mesh)
    if work.step == TRAIN:
        # A key's dtype has no size of its own; it is a few bytes.
        state = state.replace(key=state.step)
    on_chip = lambda leaf: jax.ShapeDtypeStruct(
        leaf.sharding.shard_shape(leaf.shape), leaf.dtype
    )
    own, rest = jax.tree.map(on_chip, (frozen, (state, batch)))
    others = _others_bytes(work, frozen)
    return Memory(trees.num_bytes(own), trees.num_bytes(rest) + others, 0)


def gathered_bytes(work: Workload, num_chips: int) -> int:
    """What a layer's weights take that are brought together from several chips."""
    if work.parameter_partitioning_dims == 1 or num_chips == work.num_partitions:
        return 0
    params = nn.meta.unbox(abstract_params(work.share(num_chips)))
    depth = {
        "encoder": work.config.num_encoder_layers,
        "decoder": work.config.num_decoder_layers,
    }
    return max(
        trees.num_bytes(params[stack]["layers"]) // layers
        for stack, layers in depth.items()
    )
