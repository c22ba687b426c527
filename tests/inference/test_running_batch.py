# SPDX-License-Identifier: Apache-2.0
"""Free text of rows that come and go is that of whole batches, and is there sooner."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning import decoding
from prompt_tuning.checkpoints import base_models
from prompt_tuning.devices.partitioner import Partitioner
from prompt_tuning.inference.answering import Answering
from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.store import PromptStore
from prompt_tuning.network.slots import LowRank, Prefix
from prompt_tuning.network.transformer import T5Config

H, V = 16, 8192
LENGTH = 20
RNG = np.random.default_rng(3)
WORDS = ("a", "fine", "dull", "film", "story", "what", "is", "this", "so", "very")


class Ends:
    """A row ends with one of several tokens, so that answers of all lengths occur."""

    def extend(self, state, step, logits, mask, given):
        state, token, parents = super().extend(state, step, logits, mask, given)
        return state._replace(ended=state.ended | (token % 16 == 1)), token, parents


@dataclasses.dataclass(frozen=True)
class ComeAndGo(Ends, decoding.Greedy):
    """Decoded in rows that come and go."""


@dataclasses.dataclass(frozen=True)
class Whole(Ends, decoding.Sampling):
    """The same tokens by a strategy that is decoded in whole batches."""


GREEDY = ComeAndGo(LENGTH)
WHOLE = Whole(LENGTH, temperature=0.0)


def drawn(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


SLOTS = {
    "prefix-2": {
        "decoder/layers/self_attention/prefix": Prefix.of(
            drawn(1, 2, 16), drawn(1, 2, 16)
        )
    },
    "prefix-5": {
        "decoder/layers/self_attention/prefix": Prefix.of(
            drawn(1, 5, 16), drawn(1, 5, 16)
        )
    },
    "lora": {
        "decoder/layers/self_attention/query/output": LowRank.of(
            drawn(1, 16, 2), drawn(1, 2, 16)
        )
    },
}


@pytest.fixture(scope="module")
def source(tiny_checkpoint):
    """On one device, where rows come and go."""
    return base_models.load(
        T5Config(V, H, 2, 1, 1, 8, 32),
        tiny_checkpoint,
        activation_dtype="float32",
        partitioner=Partitioner(devices=tuple(jax.devices()[:1])),
    )


@pytest.fixture(scope="module")
def store(source):
    """Prompts of several lengths, with and without adapters; few fit it at once."""
    store = PromptStore(source, 24)
    card = {"base_model": source.identity, "vocabulary": "mini"}
    for name, length in [("one", 1), ("nine", 9), ("sixteen", 16)]:
        store.add(name, np.asarray(3 * drawn(length, H)), card)
    store.add(
        "labels", np.asarray(3 * drawn(2, H)), {**card, "labels": ["good", "bad"]}
    )
    for name, slots in SLOTS.items():
        store.add(name, np.asarray(3 * drawn(3, H)), card, slots=slots)
    return store


def rows_of(names, count):
    texts = [" ".join(RNG.choice(WORDS, RNG.integers(1, 12))) for _ in range(count)]
    names = [names[number % len(names)] for number in range(count)]
    return [{"prompt": name, "text": text} for name, text in zip(names, texts)]


@pytest.fixture(scope="module")
def rows(store):
    return rows_of(store.names(), 30)


@pytest.fixture(scope="module")
def whole(source, store, rows):
    """What whole batches answer."""
    return Engine(
        source, store, batch_sizes=(8,), lengths=(48,), strategy=WHOLE
    ).answer(rows)


@pytest.mark.parametrize("sizes", [(4,), (1, 2, 8)], ids=str)
def test_rows_that_come_and_go_are_answered_as_in_whole_batches(
    sizes, source, store, rows, whole
):
    engine = Engine(source, store, batch_sizes=sizes, lengths=(48,), strategy=GREEDY)
    found = engine.answer(rows)
    assert [row["answer"] for row in found] == [row["answer"] for row in whole]
    texts = [row["answer"] for row in found if "scores" not in row]
    assert len({len(text.split()) for text in texts}) > 3


def test_all_is_compiled_before_the_first_row(source, store, rows):
    engine = Engine(source, store, batch_sizes=(1, 4), lengths=(48,), strategy=GREEDY)
    requests = [engine.prepare(row) for row in rows[:6]]
    assert not engine.is_compiled_for(requests)
    engine.compile_for(requests)
    programs = engine.num_programs
    engine.run(requests)
    assert engine.num_programs == programs


def test_a_short_answer_is_there_first_and_others_join(source, store, rows, whole):
    """Whatever is in work meanwhile, each answer is the one that it is alone."""
    engine = Engine(source, store, batch_sizes=(1, 4), lengths=(48,), strategy=GREEDY)
    answering = Answering(engine)
    requests = [engine.prepare(row) for row in rows]
    found, ended, came, turn = {}, {}, 0, 0
    while came < len(rows) or answering:
        if came < len(rows):
            answering.add({came: requests[came]})
            came += 1
        results = answering.advance()
        ended |= dict.fromkeys(results, turn)
        found |= results
        turn += 1
    assert [found[i] for i in range(len(rows))] == [
        {**row, "prompt": found[i]["prompt"]} if "scores" not in row else found[i]
        for i, row in enumerate(whole)
    ]
    later = [ended[i] for i in range(len(rows))]
    assert later != sorted(later)


def test_of_several_prompts_all_answers_are_awaited(source, store):
    engine = Engine(source, store, batch_sizes=(2,), lengths=(48,), strategy=GREEDY)
    row = {"prompt": ["one", "nine", "sixteen"], "text": "what is this story"}
    answering = Answering(engine)
    answering.add({"only": engine.prepare(row)})
    results = {}
    while answering:
        assert not results
        results = answering.advance()
    assert results == {"only": engine.answer([row])[0]}


def test_what_is_given_up_leaves_nothing(source, store, rows):
    engine = Engine(source, store, batch_sizes=(4,), lengths=(48,), strategy=GREEDY)
    answering = Answering(engine)
    answering.add({i: engine.prepare(row) for i, row in enumerate(rows[:5])})
    answering.advance()
    answering.clear()
    assert not answering and answering.advance() == {}
