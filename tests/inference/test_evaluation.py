# SPDX-License-Identifier: Apache-2.0
"""Evaluation in batches of like lengths: the answers of one batch at full length."""

import jax
import numpy as np
import pytest
import seqio

from prompt_tuning import decoding, trees
from prompt_tuning.data import batching, buckets, examples, metrics
from prompt_tuning.devices import sharding
from prompt_tuning.errors import UserError
from prompt_tuning.inference import evaluation
from prompt_tuning.inference.answerer import MOST_LENGTHS, Answerer, batches_by_length
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.tasks import features, sources

MINI = 8192
PROMPTS = (Prompt("task", 3),)
LENGTHS = {"inputs": 60, "targets": 4}
ROWS, BATCH = 37, 4
LABELS = ("yes", "no", "perhaps")


def add_task(name, rows, with_metrics=True):
    """Sentences of one to fifty words, in no order of their lengths."""
    rng = np.random.default_rng(rows)
    words = np.array(["a", "fine", "dull", "film", "story", "what", "of", "one"])
    columns = {
        "inputs": [" ".join(rng.choice(words, n)) for n in rng.integers(1, 50, rows)],
        "targets": rng.choice(LABELS, rows).tolist(),
    }
    seqio.TaskRegistry.add(
        name,
        source=sources.Rows(lambda split: columns, ["validation"]),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features=features.output_features("mini"),
        metric_fns=[metrics.accuracy] if with_metrics else [],
    )
    return name


@pytest.fixture(scope="module")
def task():
    yield add_task("test_evaluate_rows", ROWS)
    seqio.TaskRegistry.remove("test_evaluate_rows")


@pytest.fixture(scope="module")
def vocabulary():
    return features.vocabulary("mini")


@pytest.fixture(scope="module")
def tuned():
    """A model with a prompt, and random weights under which answers differ."""
    config = T5Config(
        vocab_size=MINI,
        emb_dim=16,
        num_heads=2,
        num_encoder_layers=2,
        num_decoder_layers=1,
        head_dim=8,
        mlp_dim=32,
    )
    model = Model(Transformer(config, PROMPTS))

    def heed_the_input(name, leaf):
        return 4 * leaf if "encoder_decoder_attention" in name else leaf

    params = jax.jit(model.init)(jax.random.key(0))
    return model, trees.map_with_path(heed_the_input, params)


def evaluator(name, answerer, batch_size=BATCH):
    converter = batching.make_converter(examples.find(name), LENGTHS, PROMPTS, MINI)
    return evaluation.Evaluator(
        name, "validation", LENGTHS, converter, answerer, batch_size=batch_size
    )


def full_rows(name):
    """All encoder rows at full length, in the order of the split."""
    batches = batching.load(
        name,
        split="validation",
        task_feature_lengths=LENGTHS,
        prompts=PROMPTS,
        vocab_size=MINI,
        batch_size=ROWS,
        shuffle=False,
        num_epochs=1,
    )
    return next(batches)["encoder_input_tokens"]


@pytest.mark.parametrize("mesh", [False, True], ids=["one device", "eight devices"])
@pytest.mark.parametrize("labels", [LABELS, None], ids=["ranked", "decoded"])
def test_answers_are_those_at_full_length_and_in_order(
    task, tuned, vocabulary, labels, mesh
):
    model, params = tuned
    strategy = None if labels else lambda **_: decoding.Greedy(max_decode_len=4)
    plain = Answerer(model, vocabulary, labels=labels, strategy=strategy)
    whole = plain.answer(params, full_rows(task))
    expected = [vocabulary.decode(row.tolist()) for row in whole]
    assert len(set(expected)) > 1
    answerer = plain
    if mesh:
        answerer = Answerer(
            model,
            vocabulary,
            labels=labels,
            strategy=strategy,
            mesh=sharding.make_mesh(),
        )
    found = evaluator(task, answerer)(params)
    assert found.answers == expected
    right = np.mean([a == b for a, b in zip(expected, found.targets, strict=True)])
    assert found.metrics == {"accuracy": pytest.approx(100 * right)}


def test_scores_are_those_at_full_length(task, tuned, vocabulary):
    model, params = tuned
    answerer = Answerer(model, vocabulary, labels=LABELS)
    rows = full_rows(task)
    want = np.asarray(answerer.scores(params, rows))
    for part in batches_by_length(rows, BATCH):
        batch = batching.pad_rows(rows[part.indices, : part.length], BATCH)
        got = np.asarray(answerer.scores(params, batch))[: len(part.indices)]
        np.testing.assert_allclose(got, want[part.indices], rtol=1e-5, atol=1e-5)


def test_few_shapes_and_little_padding(task):
    rows = full_rows(task)
    groups = batches_by_length(rows, BATCH)
    assert sorted(np.concatenate([g.indices for g in groups])) == list(range(ROWS))
    shapes = {group.length for group in groups}
    assert 1 < len(shapes) <= MOST_LENGTHS
    for group in groups:
        # Nothing but padding is left out.
        assert not rows[group.indices, group.length :].any()
    positions = sum(group.length for group in groups) / len(groups)
    assert positions < 0.75 * rows.shape[1]
    # What fits in one batch is one shape.
    assert len(batches_by_length(rows, ROWS)) == 1
    (alone,) = batches_by_length(rows, ROWS)
    assert alone.length == buckets.used(rows).max() < rows.shape[1]


def test_tasks_of_a_mixture_are_answered_apart(task, tuned, vocabulary):
    """A shorter task behind a longer one gets its own answers only."""
    model, params = tuned
    answerer = Answerer(model, vocabulary, labels=LABELS)
    other = add_task("test_evaluate_short", 5)
    seqio.MixtureRegistry.add("test_evaluate_mixture", [task, other], default_rate=1)
    try:
        mixed = evaluator("test_evaluate_mixture", answerer)(params)
        alone = {name: evaluator(name, answerer)(params) for name in (task, other)}
    finally:
        seqio.MixtureRegistry.remove("test_evaluate_mixture")
        seqio.TaskRegistry.remove(other)
    assert mixed.metrics == {
        f"{name}/accuracy": one.metrics["accuracy"] for name, one in alone.items()
    }
    assert len(mixed.answers) == len(mixed.targets)
    assert mixed.answers == alone[task].answers


def test_a_task_without_a_metric(tuned, vocabulary):
    name = add_task("test_evaluate_bare", 3, with_metrics=False)
    answerer = Answerer(tuned[0], vocabulary, labels=LABELS)
    try:
        with pytest.raises(UserError, match="'validation': give it one .TASK_METRICS"):
            evaluator(name, answerer)
    finally:
        seqio.TaskRegistry.remove(name)
