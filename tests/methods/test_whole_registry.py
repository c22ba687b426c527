# SPDX-License-Identifier: Apache-2.0
"""What every method of the package promises, so that a new one is tested by existing.

Saved and loaded again to the last bit, answered by the engine beside all others as by a
network that holds it alone, spread over devices as on one.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning import trees
from prompt_tuning.checkpoints import base_models, model_file, prompt_formats
from prompt_tuning.checkpoints.prompt_formats import Saved
from prompt_tuning.data.label_sets import label_tokens
from prompt_tuning.devices import sharding
from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.store import PromptStore
from prompt_tuning.methods import registry
from prompt_tuning.methods.attempt import Attempt
from prompt_tuning.methods.dept import DePT
from prompt_tuning.methods.low_dimensional_prompt import LowDimensionalPrompt
from prompt_tuning.methods.method import HELD, Start, assemble
from prompt_tuning.network import adapters
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt, virtual_ids
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.tasks import features
from prompt_tuning.training.best_evaluation import Selection

CONFIG = T5Config(8192, 16, 2, 2, 2, 8, 32)
LENGTH, LABELS = 4, ["good", "bad"]
TEXTS = ("a fine film", "what is this so dull story")
# What a method cannot do without, or is too large by default for so small a model.
OPTIONS = {
    "attempt": Attempt(("one", "two"), bottleneck=3),
    "dept": DePT(rank=7),
    "low_dimensional_prompt": LowDimensionalPrompt(8),
}
METHODS = {
    kind: OPTIONS.get(kind) or method()
    for kind, method in sorted(registry.METHODS.items())
    if method.__module__.startswith("prompt_tuning.")
}
OF_THE_MODEL = [kind for kind, each in METHODS.items() if each.result == "model"]
BESIDE_IT = [kind for kind in METHODS if kind not in OF_THE_MODEL]


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A method some way from its start.

    Attributes:
      method: it.
      held: what it holds.
      leaves: what it tunes, where they stand among the parameters.
      part: its part of the network's parameters.
    """

    method: registry.Method
    held: dict
    leaves: dict
    part: dict

    @property
    def saved(self):
        rows = self.part.get("prompts", {}).get("p", np.zeros((0, 16), np.float32))
        card = {"method": self.method.describe(), "vocabulary": "mini"}
        slots = self.part.get(adapters.COLLECTION, {})
        return Saved(np.asarray(rows), {**card, "labels": LABELS}, slots)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model of two layers of each kind, with the embedded vocabulary."""
    folder = tmp_path_factory.mktemp("two_layers")
    params = jax.jit(Model(Transformer(CONFIG)).init)(jax.random.key(0))
    model_file.save_model(folder, params, {})
    return base_models.load(CONFIG, folder, activation_dtype="float32")


@pytest.fixture(scope="module")
def tuned(base):
    """Of a kind, what it has become."""
    rows = jax.random.normal(jax.random.key(2), (LENGTH, 16))

    @functools.cache
    def of(kind):
        method = METHODS[kind]
        others = [jnp.roll(rows, i + 1, axis=1) for i, _ in enumerate(method.reads())]
        start = Start(rows, base.table, base.params, others)
        held = method.held(start)
        key = jax.random.key(BESIDE_IT.index(kind))
        leaves = jax.tree.map(lambda x: x + 0.02, method.init(key, start))
        leaves = method.place("p", leaves)
        part = method.materialize(leaves, {**base.params, HELD: {"p": held}})
        return Tuned(method, held, leaves, part)

    return of


def network_of(tuned, base, saved):
    """The network that holds one alone, and its parameters."""
    bank = (Prompt("p", LENGTH),) if tuned.method.has_prompt else ()
    part = {adapters.COLLECTION: saved.slots} if saved.slots else {}
    if bank:
        part["prompts"] = {"p": jnp.asarray(saved.array)}
    own = assemble({"p": part}, ["p"], bank)
    return Model(Transformer(CONFIG, bank)), {**base.params, **own}


def same(found, wanted):
    """Bit for bit, in the same places."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        np.testing.assert_array_equal(one, np.asarray(other))


@pytest.fixture(scope="module")
def files_of(tuned, base, tmp_path_factory):
    """Of a kind, the file that a run of it ends with."""
    folder = tmp_path_factory.mktemp("files")

    @functools.cache
    def of(kind):
        saved, path = tuned(kind).saved, folder / f"{kind}.safetensors"
        card = {**saved.card, "base_model": base.identity}
        prompt_formats.save_own(path, saved._replace(card=card))
        return path

    return of


@functools.cache
def program(model):
    return jax.jit(model.rank)


def ranked(model, params, texts):
    """The likelihoods of the labels, [2, 2], after two texts of ids."""
    tokens = np.stack([np.pad(ids, (0, 16 - len(ids))) for ids in texts])
    labels = label_tokens(LABELS, features.vocabulary("mini"))
    return np.asarray(program(model)(params, tokens.astype(np.int32), labels))


@pytest.mark.parametrize("kind", BESIDE_IT)
def test_it_is_saved_and_loaded_to_the_last_bit(kind, tuned, files_of, base, tmp_path):
    """Its leaves, as the best of a run; what the network reads of them, as its file."""
    own = tuned(kind)
    best = Selection(tmp_path, "p")
    best.consider(1, {"accuracy": 1.0}, own.leaves, 0.5)
    again = Selection(tmp_path, "p")
    again.resume(best.record())
    same(again.best.tuned, own.leaves)
    saved, loaded = own.saved, prompt_formats.load_with_slots(files_of(kind))
    np.testing.assert_array_equal(loaded.array, saved.array)
    assert loaded.card["method"] == own.method.describe()
    same(dict(loaded.slots), dict(saved.slots))
    model, params = network_of(own, base, saved)
    virtual = range(8192, 8192 + len(saved.array))
    texts = [*virtual, 5, 9, 11, 1], [*virtual, 7, 1]
    wanted = ranked(model, params, texts)
    _, params = network_of(own, base, loaded)
    np.testing.assert_array_equal(ranked(model, params, texts), wanted)
    assert np.isfinite(wanted).all()


@pytest.mark.parametrize("kind", OF_THE_MODEL)
def test_a_model_is_saved_and_loaded_to_the_last_bit(kind, base, tmp_path):
    method = METHODS[kind]
    leaves, frozen = method.split(base.params)
    leaves = jax.tree.map(lambda x: x + 0.02, leaves)
    rest = {name: tree for name, tree in frozen.items() if name != HELD}
    whole = trees.merge(method.materialize(leaves, frozen), rest)
    model_file.save_model(tmp_path, whole, {})
    loaded = base_models.load(CONFIG, tmp_path, activation_dtype="float32")
    same(loaded.params, whole)
    assert loaded.fingerprint != base.fingerprint
    model, texts = Model(Transformer(CONFIG)), ([5, 9, 11, 1], [7, 1])
    np.testing.assert_array_equal(
        ranked(model, loaded.params, texts), ranked(model, whole, texts)
    )


@pytest.fixture(scope="module")
def mixed(files_of, base):
    """By kind: the ids of its rows, and what the engine says to them, all in one batch."""
    store = PromptStore(base, 128)
    for kind in BESIDE_IT:
        store.load(files_of(kind), kind)
    rows = [{"prompt": kind, "text": text} for text in TEXTS for kind in BESIDE_IT]
    engine = Engine(base, store, batch_sizes=(len(rows),), lengths=(16,))
    requests = [engine.prepare(row) for row in rows]
    scores = [list(answer["scores"].values()) for answer in engine.run(requests)]
    assert engine.num_programs == 1
    found = {kind: [] for kind in BESIDE_IT}
    for row, request, own in zip(rows, requests, scores, strict=True):
        found[row["prompt"]].append((request.items[0].ids, own))
    return found


@pytest.mark.parametrize("kind", BESIDE_IT)
def test_the_engine_answers_it_beside_the_others_as_a_network_of_it_alone(
    kind, mixed, tuned, base
):
    own = tuned(kind)
    model, params = network_of(own, base, own.saved)
    ids, scores = zip(*mixed[kind], strict=True)
    assert {sum(each < 0) for each in ids} == {len(own.saved.array)}
    texts = [np.where(each < 0, 8191 - each, each) for each in ids]
    wanted = jax.nn.softmax(ranked(model, params, texts))
    np.testing.assert_allclose(scores, wanted, rtol=1e-4)
    bare = [each[each >= 0] for each in ids]
    without = jax.nn.softmax(ranked(Model(Transformer(CONFIG)), base.params, bare))
    assert np.abs(wanted - without).max() > 1e-5


def gradients(model, base, leaves, batch):
    """The loss of a batch of all methods, and its gradient by all their leaves."""

    def loss(leaves):
        parts = {
            kind: METHODS[kind].materialize(own, base) for kind, own in leaves.items()
        }
        own = assemble(parts, BESIDE_IT, model.network.prompts)
        rest = {name: tree for name, tree in base.items() if name != HELD}
        return model.loss(trees.merge(own, rest), batch)[0]

    return jax.value_and_grad(loss)(leaves)


@pytest.fixture(scope="module")
def on_one_and_on_eight(tuned, base):
    """The same of a batch of all, on one device, and with kernels in two, rows in four."""
    everyone = {kind: tuned(kind) for kind in BESIDE_IT}
    leaves = {
        kind: {place: {kind: tree["p"]} for place, tree in own.leaves.items()}
        for kind, own in everyone.items()
    }
    held = {kind: own.held for kind, own in everyone.items() if own.held}
    bank = tuple(Prompt(kind, LENGTH) for kind in leaves if "prompts" in leaves[kind])
    model = Model(Transformer(CONFIG, bank), members=tuple(BESIDE_IT))
    ids = virtual_ids(bank, CONFIG.vocab_size)
    rng = np.random.default_rng(0)
    owners = np.arange(-(-len(BESIDE_IT) // 4) * 4, dtype=np.int32) % len(BESIDE_IT)
    tokens = rng.integers(2, 200, (len(owners), LENGTH + 5)).astype(np.int32)
    for row, owner in enumerate(owners):
        tokens[row, LENGTH + 1 + row % 5 :] = 0
        tokens[row, :LENGTH] = ids.get(BESIDE_IT[owner], tokens[row, :LENGTH])
    targets = rng.integers(2, 200, (len(owners), 2))
    batch = {
        "encoder_input_tokens": tokens,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": np.ones(targets.shape, np.float32),
        "prompt_index": owners,
    }
    compute = functools.partial(gradients, model)
    one = jax.jit(compute)({**base.params, HELD: held}, leaves, batch)
    mesh, rules = sharding.make_mesh(2), sharding.logical_axis_rules()
    boxed = Model(Transformer(CONFIG)).abstract_params()
    params = jax.device_put(base.params, sharding.param_shardings(boxed, mesh, rules))
    held, leaves = sharding.replicate((held, leaves), mesh)
    with sharding.partitioned(mesh, rules):
        spread = sharding.shard_batch(batch, mesh)
        eight = jax.jit(compute)({**params, HELD: held}, leaves, spread)
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-5)
    return one[1], eight[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", BESIDE_IT)
def test_eight_devices_compute_what_one_computes(kind, on_one_and_on_eight):
    one, eight = (trees.flatten(found[kind]) for found in on_one_and_on_eight)
    for name, leaf in one.items():
        scale = float(np.abs(leaf).max())
        assert scale > 0, name
        np.testing.assert_allclose(eight[name], leaf, rtol=1e-4, atol=1e-4 * scale)
