# SPDX-License-Identifier: Apache-2.0
"""Rows of many prompts in shared batches are answered as each would be alone."""

import threading

import jax
import numpy as np
import pytest

from prompt_tuning import decoding
from prompt_tuning.checkpoints import base_models
from prompt_tuning.data.label_sets import label_tokens
from prompt_tuning.errors import UserError
from prompt_tuning.inference import ensembles
from prompt_tuning.inference.engine import CONTENT_FREE, Engine
from prompt_tuning.inference.store import PromptStore
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.tasks import features

H, V = 16, 8192
RNG = np.random.default_rng(0)
WORDS = ("a", "fine", "dull", "film", "story", "what", "is", "this", "so", "very")
GREEDY = decoding.Greedy(4)


@pytest.fixture(scope="module")
def source(tiny_checkpoint):
    return base_models.load(
        T5Config(V, H, 2, 1, 1, 8, 32), tiny_checkpoint, activation_dtype="float32"
    )


def card(source, **more):
    return {"base_model": source.identity, "vocabulary": "mini", **more}


KINDS = {
    "two": {"labels": ["good", "bad"]},
    "three": {"labels": ["yes", "no", "it is not so"], "placement": "append"},
    "free": {},
    "pair": {
        "labels": ["same", "other"],
        "template": "{prompt:0:2} {premise} and {prompt:2:3} {hypothesis}",
    },
    "words": {"labels": ["great", "terrible"], "template": "{text} It was"},
}


def fill(store, source, lengths=(1, 4, 9)):
    """Adds prompts of every kind and length: name -> array."""
    arrays = {}
    for kind, change in KINDS.items():
        for length in lengths:
            length = {"words": 0, "pair": max(3, length)}.get(kind, length)
            name = f"{kind}-{len(arrays)}"
            # Far from zero, so that every prompt answers differently.
            arrays[name] = RNG.normal(scale=3, size=(length, H)).astype(np.float32)
            metric = {"accuracy": float(len(arrays))}
            store.add(name, arrays[name], card(source, metric=metric, **change))
    return arrays


def some_text():
    return " ".join(RNG.choice(WORDS, RNG.integers(1, 12)))


def rows_for(names, count):
    rows = []
    for name in RNG.choice(names, count).tolist():
        if name.startswith("pair"):
            columns = {"premise": some_text(), "hypothesis": some_text()}
        else:
            columns = {"text": some_text()}
        rows.append({"prompt": name, **columns})
    return rows


@pytest.fixture(scope="module")
def filled(source):
    store = PromptStore(source, 64)
    return store, fill(store, source)


@pytest.fixture(scope="module")
def engine(source, filled):
    return Engine(source, filled[0], batch_sizes=(2, 8), longest=48, strategy=GREEDY)


def assert_same(got, want):
    assert set(got) == set(want)
    for key in set(got) - {"scores", "answers"}:
        assert got[key] == want[key], key
    if "scores" in got:
        assert list(got["scores"]) == list(want["scores"])
        values = [list(row["scores"].values()) for row in (got, want)]
        np.testing.assert_allclose(*values, rtol=0, atol=1e-5)
    for one, other in zip(got.get("answers", ()), want.get("answers", ()), strict=True):
        assert_same(one, other)


def test_a_mixed_batch_equals_one_by_one(engine, filled):
    rows = rows_for(list(filled[1]), 40)
    together = engine.answer(rows)
    assert [row["prompt"] for row in together] == [row["prompt"] for row in rows]
    for row, answer in zip(rows, together, strict=True):
        assert_same(engine.answer([row])[0], answer)
    assert len({str(answer) for answer in together}) > 25


def alone(source, array, change, row):
    """The answer of a network that holds this prompt alone, of one unpadded row."""
    vocabulary = features.vocabulary("mini")
    prompts = (Prompt("task", len(array)),) if len(array) else ()
    model = Model(Transformer(source.config, prompts))
    params = dict(source.params) | ({"prompts": {"task": array}} if prompts else {})
    virtual = list(range(V, V + len(array)))
    if "premise" in row:
        text = [*virtual[:2], *vocabulary.encode(row["premise"] + " and")]
        text += [*virtual[2:3], *vocabulary.encode(row["hypothesis"]), 1]
    elif not prompts:
        text = [*vocabulary.encode(row["text"] + " It was"), 1]
    elif change.get("placement") == "append":
        text = [*vocabulary.encode(row["text"]), 1, *virtual]
    else:
        text = [*virtual, *vocabulary.encode(row["text"]), 1]
    tokens = np.array([text], np.int32)
    labels = change.get("labels")
    if labels is None:
        predict = jax.jit(lambda *args: model.predict(*args, GREEDY)[0])
        ids = np.asarray(predict(params, tokens))[0, -1]
        return {"answer": vocabulary.decode(ids.tolist())}
    label_ids = label_tokens(labels, vocabulary)
    scores = np.asarray(jax.jit(model.rank)(params, tokens, label_ids))
    chances = np.asarray(jax.nn.softmax(scores[0])).tolist()
    return {
        "answer": labels[int(np.argmax(chances))],
        "scores": dict(zip(labels, chances, strict=True)),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_a_network_with_this_prompt_alone(
    kind, engine, filled, source
):
    names = [name for name in filled[1] if name.startswith(kind)]
    for row in rows_for(names, 1):
        name = row["prompt"]
        want = alone(source, filled[1][name], KINDS[kind], row)
        assert_same(engine.answer([row])[0], {"prompt": name, **want})


def test_a_store_that_holds_few_prompts_gives_the_same(engine, filled, source):
    store = PromptStore(source, 12)
    for name in filled[1]:
        prompt = filled[0].get(name)
        store.add(name, prompt.array, prompt.card)
    small = Engine(source, store, batch_sizes=(8,), longest=48, strategy=GREEDY)
    rows = rows_for(list(filled[1]), 24)
    for got, want in zip(small.answer(rows), engine.answer(rows), strict=True):
        assert_same(got, want)


def test_prompts_come_and_go_without_compiling(source):
    store = PromptStore(source, 64)
    engine = Engine(source, store, batch_sizes=(4,), longest=48)
    store.add("first", np.ones((3, H), np.float32), card(source, **KINDS["two"]))
    engine.warm_up(longest=48)
    engine.answer([{"prompt": "first", "text": "fine"}])
    programs, compiled = engine.num_programs, []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name)
    )
    for step in range(6):
        name = f"p{step}"
        prompt = RNG.normal(size=(int(RNG.integers(1, 20)), H)).astype(np.float32)
        store.add(name, prompt, card(source, **KINDS["two"]))
        engine.answer([{"prompt": name, "text": some_text()[:40]} for _ in range(5)])
        store.remove(name)
    assert engine.num_programs == programs
    assert not [name for name in compiled if "backend_compile" in name]


def test_accepted_rows_outlive_their_prompt(engine, filled, source):
    store = filled[0]
    array, row = filled[1]["two-1"], {"prompt": "gone", "text": "a fine film"}
    store.add("gone", array, card(source, **KINDS["two"]))
    request = engine.prepare(row)
    store.remove("gone")
    other = RNG.normal(scale=3, size=(7, H)).astype(np.float32)
    store.add("gone", other, card(source, labels=["bad", "good"]))
    want = alone(source, array, KINDS["two"], row)
    assert_same(engine.run([request])[0], {"prompt": "gone", **want})
    want = alone(source, other, {"labels": ["bad", "good"]}, row)
    assert_same(engine.answer([row])[0], {"prompt": "gone", **want})
    store.remove("gone")


def test_threads_answer_at_once(engine, filled):
    rows = rows_for(list(filled[1]), 24)
    want = engine.answer(rows)
    got = {}

    def work(start):
        got[start] = engine.answer(rows[start : start + 6])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(0, 24, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for start, answers in got.items():
        for one, other in zip(answers, want[start : start + 6], strict=True):
            assert_same(one, other)
    assert len(got) == 4


def test_rows_may_bring_labels(engine):
    row = {"prompt": "two-0", "text": "fine", "labels": ["story", "film", "dull", "so"]}
    (answer,) = engine.answer([row])
    assert list(answer["scores"]) == row["labels"]
    assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-6)
    (answer,) = engine.answer([{**row, "prompt": "free-6"}])
    assert answer["answer"] in row["labels"]


def test_a_column_may_be_called_like_an_option(source):
    store = PromptStore(source, 8)
    change = {"template": "{labels} {combine}", "labels": ["yes", "no"]}
    store.add("odd", np.ones((2, H), np.float32), card(source, **change))
    engine = Engine(source, store, longest=32)
    row = {"prompt": "odd", "labels": "one text", "combine": "another"}
    (answer,) = engine.answer([row])
    assert list(answer["scores"]) == ["yes", "no"]


TRIO = ["two-0", "two-1", "two-2"]


@pytest.mark.parametrize("rule", ensembles.RULES)
def test_an_ensemble_combines_what_its_prompts_answer_alone(rule, engine):
    text = "what a fine film"
    each = engine.answer([{"prompt": name, "text": text} for name in TRIO])
    (answer,) = engine.answer([{"prompt": TRIO, "text": text, "combine": rule}])
    assert answer["prompt"] == TRIO and answer["combine"] == rule
    for one, other in zip(answer["answers"], each, strict=True):
        assert_same(one, other)
    tables = np.array([list(one["scores"].values()) for one in each])
    right = tables.argmax(axis=1)
    if rule == "vote":
        want = np.bincount(right, minlength=2) / 3
    elif rule == "mean":
        want = np.exp(np.log(tables).mean(axis=0))
        want /= want.sum()
    else:
        want = tables[2]  # The one with the highest metric in its card.
    np.testing.assert_allclose(list(answer["scores"].values()), want, atol=1e-5)
    assert answer["answer"] == ["good", "bad"][int(np.argmax(want))]


def test_prompts_of_unlike_lengths_and_kinds_vote(engine):
    names = ["two-0", "three-4", "free-8"]
    (free,) = engine.answer([{"prompt": ["free-6", "free-8"], "text": "so dull"}])
    assert free["answer"] == free["answers"][0]["answer"]
    assert all("scores" not in one for one in free["answers"])
    labels = ["yes", "no"]
    (answer,) = engine.answer([{"prompt": names, "text": "so dull", "labels": labels}])
    texts = [one["answer"] for one in answer["answers"]]
    assert texts.count(answer["answer"]) >= 2 and set(texts) <= set(labels)


def test_calibration_takes_off_what_a_prompt_says_of_nothing(engine, filled, source):
    array = filled[1]["two-1"]
    text = "so very dull"
    tables = [
        np.log(list(alone(source, array, KINDS["two"], {"text": t})["scores"].values()))
        for t in (text, *CONTENT_FREE)
    ]
    leaning = np.exp(tables[1:]).mean(axis=0)
    want = np.exp(tables[0]) / leaning
    row = {"prompt": "two-1", "text": text, "calibrate": True}
    (answer,) = engine.answer([row])
    got = list(answer["scores"].values())
    np.testing.assert_allclose(got, want / want.sum(), atol=1e-5)
    plain = list(engine.answer([{**row, "calibrate": False}])[0]["scores"].values())
    assert abs(got[0] - plain[0]) > 1e-3
    assert_same(engine.answer([row])[0], answer)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "x"}, "names no prompt"),
        ({"prompt": [], "text": "x"}, "names no prompt"),
        ({"prompt": 3, "text": "x"}, "names no prompt"),
        ({"prompt": ["two-0", "two-0"], "text": "x"}, "names a prompt twice"),
        ({"prompt": "tow-0", "text": "x"}, "no prompt 'tow-0'; did you mean two-0"),
        ({"prompt": "two-0"}, "no column 'text'"),
        ({"prompt": "two-0", "text": ""}, "the text is empty"),
        ({"prompt": "two-0", "text": "x " * 200}, "more than 48"),
        ({"prompt": "two-0", "text": "x", "labels": ["a"]}, "two or more"),
        ({"prompt": "two-0", "text": "x", "labels": ["☃", "a"]}, "does not know"),
        ({"prompt": "two-0", "text": "x", "combine": "vote"}, "needs several prompts"),
        ({"prompt": TRIO, "text": "x", "combine": "most"}, "vote, mean, best"),
        ({"prompt": TRIO, "text": "x", "calibrate": 1}, "true or false"),
        ({"prompt": "free-6", "text": "x", "calibrate": True}, "free text"),
        (
            {"prompt": ["two-0", "three-3"], "text": "x", "combine": "mean"},
            "do not have the same labels",
        ),
        (
            {"prompt": ["free-6", "free-7"], "text": "x", "combine": "mean"},
            "do not rank the same labels",
        ),
    ],
)
def test_refused_rows(row, says, engine):
    with pytest.raises(UserError, match=says):
        engine.prepare(row)
    with pytest.raises(UserError, match="row 2: "):
        engine.answer([{"prompt": "two-0", "text": "fine"}, row])


def test_the_best_of_prompts_without_metrics_is_not_known(source):
    store = PromptStore(source, 8)
    for name in "ab":
        store.add(name, np.ones((1, H), np.float32), card(source, **KINDS["two"]))
    row = {"prompt": ["a", "b"], "text": "x", "combine": "best"}
    with pytest.raises(UserError, match="no validation metric"):
        Engine(source, store).prepare(row)


def test_no_rows_are_no_answers(engine):
    assert engine.answer([]) == []
    assert engine.run([]) == []


def test_sizes_must_be_sizes(source, filled):
    for change in ({"batch_sizes": ()}, {"batch_sizes": (0, 4)}, {"longest": 0}):
        with pytest.raises(UserError, match="give sizes"):
            Engine(source, filled[0], **change)


def test_labels_of_padding_score_minus_infinity(tiny_model, tiny_params, tiny_batch):
    tokens = tiny_batch["encoder_input_tokens"]
    shared = np.array([[5, 6, 1], [7, 1, 0]], np.int32)
    own = np.zeros((3, 4, 4), np.int32)
    own[:, :2, :3] = shared
    own[1, 2, :2] = [9, 1]
    rank = jax.jit(tiny_model.rank)
    want = np.asarray(rank(tiny_params, tokens, shared))
    got = np.asarray(rank(tiny_params, tokens, own))
    np.testing.assert_allclose(got[:, :2], want, rtol=0, atol=1e-5)
    assert np.isneginf(got[[0, 2]][:, 2:]).all() and np.isneginf(got[1, 3])
    assert np.isfinite(got[1, 2])


def test_draws_follow_from_the_seed(source, filled):
    def draws(seed):
        engine = Engine(
            source,
            filled[0],
            batch_sizes=(2,),
            longest=16,
            strategy=decoding.Sampling(6),
            seed=seed,
        )
        return [
            r["answer"] for r in engine.answer([{"prompt": "free-6", "text": "x"}] * 6)
        ]

    first = draws(0)
    assert draws(0) == first != draws(1)
    # Batches of the same rows draw on their own.
    assert len(set(first)) == 6
