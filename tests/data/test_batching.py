# SPDX-License-Identifier: Apache-2.0
"""Virtual tokens in batches, and the batches of tasks and mixtures."""

import collections
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
import tensorflow as tf

from prompt_tuning.data import batching, buckets, examples
from prompt_tuning.data.feature_converter import (
    PROMPT_INDEX,
    PromptFeatureConverter,
    cure,
)
from prompt_tuning.data.template import WHOLE_PROMPT
from prompt_tuning.errors import UserError
from prompt_tuning.network import losses
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import Transformer
from prompt_tuning.runs import task_data
from prompt_tuning.tasks import features, local_file, sources

V = 50
EOS = 1
PROMPTS = (Prompt("first", 3), Prompt("second", 2))
ONE = PROMPTS[:1]
MINI = 8192


def rows(converter, examples, inputs_length, targets_length=3):
    """Converts (inputs, targets, prompt_index) triples."""

    def generate():
        for inputs, targets, index in examples:
            yield {"inputs": inputs, "targets": targets, PROMPT_INDEX: index}

    ids = tf.TensorSpec([None], tf.int32)
    ds = tf.data.Dataset.from_generator(
        generate,
        output_signature={
            "inputs": ids,
            "targets": ids,
            PROMPT_INDEX: tf.TensorSpec([], tf.int64),
        },
    )
    lengths = {"inputs": inputs_length, "targets": targets_length}
    return list(converter(ds, lengths).as_numpy_iterator())


def encoder_tokens(converter, inputs, inputs_length, index=0):
    (row,) = rows(converter, [(inputs, [9, EOS], index)], inputs_length)
    return row["encoder_input_tokens"].tolist()


@pytest.mark.parametrize(
    "placement, expected",
    [
        ("prepend", [50, 51, 52, 7, 8, EOS, 0]),
        ("append", [7, 8, EOS, 50, 51, 52, 0]),
        ("after_bos", [7, 50, 51, 52, 8, EOS, 0]),
    ],
)
def test_placement(placement, expected):
    converter = PromptFeatureConverter(ONE, V, placement)
    assert encoder_tokens(converter, [7, 8, EOS], 4) == expected


def test_the_other_features_are_t5s():
    (row,) = rows(PromptFeatureConverter(ONE, V), [([7, EOS], [9, 4, EOS], 0)], 4)
    assert row["decoder_target_tokens"].tolist() == [9, 4, EOS]
    assert row["decoder_input_tokens"].tolist() == [0, 9, 4]
    assert row["decoder_loss_weights"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "inputs, expected",
    [
        ([-1, 7, -2, 8, EOS, -3], [50, 7, 51, 8, EOS, 52, 0, 0]),
        ([7, WHOLE_PROMPT, 8, EOS], [7, 50, 51, 52, 8, EOS, 0, 0]),
        # A template may leave positions out: nothing else is inserted.
        ([7, -3, EOS], [7, 52, EOS, 0, 0, 0, 0, 0]),
    ],
)
def test_a_task_says_where_the_positions_go(inputs, expected):
    converter = PromptFeatureConverter(ONE, V, "append")
    assert encoder_tokens(converter, inputs, 5) == expected


@pytest.mark.parametrize(
    "inputs, expected",
    [
        # The end of the text goes; EOS stays.
        ([5, 6, 7, 8, EOS], [50, 51, 52, 5, 6, EOS]),
        # Text that does not end in EOS just loses its end.
        ([5, 6, 7, 8, 9], [50, 51, 52, 5, 6, 7]),
        # Virtual tokens stay, also those behind the cut and behind EOS.
        ([-1, 5, 6, 7, -2, 8, EOS, -3], [50, 5, 6, 51, EOS, 52]),
        ([5, 6, EOS], [50, 51, 52, 5, 6, EOS]),
    ],
)
def test_text_beyond_the_length_is_cut(inputs, expected):
    assert encoder_tokens(PromptFeatureConverter(ONE, V), inputs, 3) == expected


def test_rows_name_their_prompt():
    converter = PromptFeatureConverter(PROMPTS, V)
    # Both rows have room for the longer prompt.
    assert encoder_tokens(converter, [7, EOS], 2, 0) == [50, 51, 52, 7, EOS]
    assert encoder_tokens(converter, [7, EOS], 2, 1) == [53, 54, 7, EOS, 0]
    assert encoder_tokens(converter, [-2, 7, EOS], 2, 1) == [54, 7, EOS, 0, 0]


def test_without_prompts_nothing_is_inserted():
    converter = PromptFeatureConverter((), V)
    assert encoder_tokens(converter, [7, EOS], 3) == [7, EOS, 0]
    # The same template serves model tuning.
    assert encoder_tokens(converter, [-1, 7, WHOLE_PROMPT, EOS], 3) == [7, EOS, 0]


@pytest.mark.parametrize("index", [2, -1])
def test_unknown_prompt(index):
    with pytest.raises(tf.errors.InvalidArgumentError, match="no such prompt"):
        encoder_tokens(PromptFeatureConverter(PROMPTS, V), [7, EOS], 3, index)


def test_every_packed_segment_carries_its_prompt():
    converter = PromptFeatureConverter(PROMPTS, V, pack=True)
    two = [([7, EOS], [9, EOS], 0), ([8, EOS], [4, EOS], 1)]
    (row,) = rows(converter, two, 10, 5)
    assert row["encoder_input_tokens"].tolist() == [50, 51, 52, 7, 1, 53, 54, 8, 1, 0]
    assert row["encoder_segment_ids"].tolist() == [1] * 5 + [2] * 4 + [0]
    assert row["encoder_positions"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0]
    assert row["decoder_input_tokens"].tolist() == [0, 9, 0, 4, 0]
    assert row["decoder_segment_ids"].tolist() == [1, 1, 2, 2, 0]


def test_a_packed_segment_fits_its_row():
    converter = PromptFeatureConverter(ONE, V, pack=True)
    (row,) = rows(converter, [([5, 6, 7, 8, EOS], [EOS], 0)], 6)
    assert row["encoder_input_tokens"].tolist() == [50, 51, 52, 5, 6, EOS]
    with pytest.raises(UserError, match="no room for text beside a prompt of 3"):
        rows(converter, [], 3)


def test_limited_converter_never_exceeds_the_length():
    converter = PromptFeatureConverter(ONE, V)
    limited = converter.limited_to(3)
    assert encoder_tokens(limited, [5, 6, 7, 8, EOS], 9) == [50, 51, 52, 5, 6, EOS]
    assert len(encoder_tokens(converter, [5, EOS], 9)) == 12


def test_unknown_placement():
    with pytest.raises(UserError, match="'middle': choose one of 'prepend', 'append'"):
        PromptFeatureConverter(ONE, V, "middle")


# Tasks of few rows in the embedded vocabulary. Row i's inputs are the digits of i.

ROWS = 10


def add_task(name, count=ROWS, target="yes", preprocessors=(), **columns):
    columns = {
        "inputs": [f"{i:03}" for i in range(count)],
        "targets": [target] * count,
        **columns,
    }
    seqio.TaskRegistry.add(
        name,
        source=sources.Rows(lambda split: columns, ["train", "validation"]),
        preprocessors=[
            seqio.preprocessors.tokenize,
            *preprocessors,
            seqio.preprocessors.append_eos,
        ],
        output_features=features.output_features("mini"),
    )
    return name


@pytest.fixture(scope="module")
def task():
    yield add_task("test_data_rows")
    seqio.TaskRegistry.remove("test_data_rows")


@pytest.fixture
def temporary_task():
    names = []

    def add(name, **kwargs):
        names.append(add_task(name, **kwargs))
        return name

    yield add
    for name in names:
        seqio.TaskRegistry.remove(name)


def load(name, **kwargs):
    defaults = {
        "split": "train",
        "task_feature_lengths": {"inputs": 8, "targets": 4},
        "prompts": ONE,
        "vocab_size": MINI,
        "batch_size": 4,
        "seed": 3,
    }
    return batching.load(name, **{**defaults, **kwargs})


def take(batches, count):
    return [batch["encoder_input_tokens"] for batch in itertools.islice(batches, count)]


def test_batches_have_the_models_shapes(task):
    batch = next(load(task))
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "encoder_input_tokens": ((4, 11), "int32"),
        "decoder_input_tokens": ((4, 4), "int32"),
        "decoder_target_tokens": ((4, 4), "int32"),
        "decoder_loss_weights": ((4, 4), "float32"),
    }
    assert (batch["encoder_input_tokens"][:, :3] == MINI + np.arange(3)).all()


def test_the_seed_decides_the_order(task):
    one, same, other = load(task), load(task), load(task, seed=4)
    first = np.stack(take(one, 8))
    np.testing.assert_array_equal(first, np.stack(take(same, 8)))
    assert (first != np.stack(take(other, 8))).any()


@pytest.mark.parametrize("pack", [False, True])
def test_a_run_resumes_where_it_stopped(task, pack):
    whole = load(task, pack=pack, task_feature_lengths={"inputs": 24, "targets": 8})
    later = load(
        task,
        pack=pack,
        task_feature_lengths={"inputs": 24, "targets": 8},
        start_batch=5,
    )
    assert later.position == 5
    np.testing.assert_array_equal(take(whole, 9)[5:], take(later, 4))
    assert later.position == whole.position == 9


def words(seed=0, count=40):
    """Texts of one to twenty tokens."""
    lengths = np.random.default_rng(seed).integers(1, 20, count)
    return {"inputs": ["a " * n for n in lengths], "targets": ["yes"] * count}


EDGES = (8, 16, 24)
WORDS = {"task_feature_lengths": {"inputs": 21, "targets": 4}, "batch_size": 2}


def test_batches_are_padded_to_the_edge_of_their_longest_row(temporary_task):
    name = temporary_task("test_data_edges", **words())
    whole = itertools.islice(load(name, **WORDS), 30)
    seen = collections.Counter()
    for full, batch in zip(whole, load(name, edges=EDGES, **WORDS)):
        length = batch["encoder_input_tokens"].shape[1]
        seen[length] += 1
        longest = max(np.count_nonzero(row) for row in full["encoder_input_tokens"])
        assert length == min(edge for edge in EDGES if edge >= longest)
        rest = full.pop("encoder_input_tokens")
        np.testing.assert_array_equal(rest[:, :length], batch["encoder_input_tokens"])
        for key, array in full.items():
            np.testing.assert_array_equal(array, batch[key])
    assert len(seen) == 3


def test_processes_and_resumed_runs_pad_alike(temporary_task):
    name = temporary_task("test_data_alike", **words())
    options = {**WORDS, "edges": EDGES}
    whole = take(load(name, **options), 20)
    # A process whose own row is short pads it for the longest of the other.
    parts = [take(load(name, shard_info=(i, 2), **options), 20) for i in (0, 1)]
    for batch, *rows in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(batch, np.concatenate(rows))
    later = take(load(name, start_batch=12, **options), 8)
    for batch, again in zip(whole[12:], later, strict=True):
        np.testing.assert_array_equal(batch, again)


def test_edges_of_a_split(temporary_task):
    columns = words(count=200)
    columns["inputs"].sort()
    name = temporary_task("test_data_split", **columns)
    report = load(name, task_feature_lengths={"inputs": 500, "targets": 4}).report
    edges = report.edges(4)
    # The few lengths of the batches that were seen, and room for any other.
    assert edges[-1] == 503 and edges[-2] == report.tokens[:, 0].max() <= 24
    assert len(edges) <= 4
    assert report.edges(200) == edges[-2:]


def test_fill_counts_tokens_and_positions(temporary_task):
    name = temporary_task("test_data_fill", **words(count=60))
    batches = load(name, num_epochs=1, **{**WORDS, "batch_size": 60})
    report = batches.report
    found = report.fill(60)
    batch = batching.trim(next(batches), report.edges(60))
    for side, tokens in [("encoder", "encoder_input"), ("decoder", "decoder_target")]:
        share = np.mean(batch[f"{tokens}_tokens"] != 0)
        assert getattr(found, side) == pytest.approx(share)
    assert found.examples_per_row == 1


@pytest.mark.parametrize("targets", [4, 32])
def test_fill_of_packed_rows(temporary_task, targets):
    """Counted as seqio packs, whether inputs or targets fill the rows first."""
    name = temporary_task("test_data_packed", **words(count=200))
    lengths = {"inputs": 40, "targets": targets}
    batches = load(
        name,
        task_feature_lengths=lengths,
        pack=True,
        num_epochs=1,
        shuffle=False,
        batch_size=1,
    )
    rows = [batch["encoder_input_tokens"] for batch in batches]
    report = batches.report
    assert buckets.packed_rows(report.tokens, report.room) == len(rows)
    found = report.fill(1, pack=True)
    # The report takes the examples in another order.
    assert found.encoder == pytest.approx(np.mean(np.stack(rows) != 0), rel=0.05)
    assert found.examples_per_row == pytest.approx(200 / len(rows), rel=0.05)
    assert (found.examples_per_row < 2.1) == (targets == 4)


def test_a_run_pads_to_edges_and_says_how_full_its_rows_are(temporary_task, capsys):
    name = temporary_task("test_data_run", **words(count=60))
    lengths = {"inputs": 500, "targets": 4}
    task = task_data.TaskData(name, None, None, lengths, ONE, MINI)
    assert take(task.batches("train", 4, seed=0)(0), 1)[0].shape[1] <= 24
    found = task.fill("train", 4)
    line = f"tokens fill {found.encoder:.0%} of the encoder's positions and "
    assert line in capsys.readouterr().err and found.encoder > 0.5

    packed = task_data.TaskData(
        name, None, None, {"inputs": 12, "targets": 9}, ONE, MINI
    )
    assert take(packed.batches("train", 4, seed=0, pack=True)(0), 1)[0].shape[1] == 12
    packed.fill("train", 4, pack=True)
    said = capsys.readouterr().err
    # Of a packed row the prompt takes its share; that inputs are cut is said once.
    assert said.count("inputs lose their end: they are longer than 9 tokens") == 1
    assert "a batch of 4 packed rows holds about " in said


def test_packed_batches_of_a_task_equal_unpacked_ones(temporary_task, tiny_config):
    """Through seqio: the loss, the prompt's gradient and every example's score."""
    name = temporary_task("test_data_equal", **words(count=12))
    config = dataclasses.replace(tiny_config, vocab_size=MINI)
    model = Model(Transformer(config, ONE))
    params = jax.jit(model.init)(jax.random.key(0))

    @jax.jit
    def results(batch):
        def total(prompts):
            logits = model.logits({**params, "prompts": prompts}, batch)
            token_loss, _ = losses.cross_entropy(logits, batch["decoder_target_tokens"])
            token_loss *= batch["decoder_loss_weights"]
            return jnp.sum(token_loss), token_loss

        return jax.value_and_grad(total, has_aux=True)(params["prompts"])

    def batch_of(**options):
        options = {"num_epochs": 1, "shuffle": False, "batch_size": 12, **options}
        return next(load(name, **options))

    separate = batch_of(task_feature_lengths={"inputs": 21, "targets": 4})
    packed = batch_of(task_feature_lengths={"inputs": 50, "targets": 16}, pack=True)
    segments = packed["decoder_segment_ids"]
    assert segments.max() > 2 and batching.real_rows(packed).sum() < 7
    (want_loss, want_scores), want_grads = results(separate)
    (loss, scores), grads = results(packed)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    bound = 1e-5 * np.abs(want_grads["first"]).max()
    np.testing.assert_allclose(grads["first"], want_grads["first"], atol=bound, rtol=0)
    per_example = [
        float(row[ids == segment].sum())
        for row, ids in zip(scores, segments)
        for segment in range(1, ids.max() + 1)
    ]
    np.testing.assert_allclose(per_example, want_scores.sum(axis=1), rtol=1e-5)


def test_epochs_are_shuffled_anew(temporary_task):
    # Sorted labels and a source far larger than a batch must come out mixed.
    name = temporary_task("test_data_epochs", count=100)
    first, second = take(load(name, batch_size=100), 2)
    assert (first != second).any()
    unshuffled = next(load(name, batch_size=100, shuffle=False))
    assert (first != unshuffled["encoder_input_tokens"]).any()


def test_an_epoch_holds_every_example_once(task):
    batches = list(load(task, num_epochs=1))
    assert [batching.real_rows(batch).sum() for batch in batches] == [4, 4, 2]
    assert batches[-1]["decoder_loss_weights"][2:].sum() == 0
    tokens = np.concatenate(
        [batch["encoder_input_tokens"][batching.real_rows(batch)] for batch in batches]
    )
    assert len(np.unique(tokens, axis=0)) == ROWS


def test_processes_share_the_global_batches(task):
    whole = take(load(task, num_epochs=2), 5)
    parts = [take(load(task, num_epochs=2, shard_info=(i, 2)), 5) for i in (0, 1)]
    for batch, first, second in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(batch, np.concatenate([first, second]))
    with pytest.raises(UserError, match="does not divide among 3 processes"):
        load(task, shard_info=(0, 3))


def test_mixture(task, temporary_task):
    other = temporary_task("test_data_mixed", target="no")
    seqio.MixtureRegistry.add("test_data_mixture", [(task, 3), (other, 1)])
    try:
        batches = load("test_data_mixture", batch_size=100)
        targets = next(batches)["decoder_target_tokens"][:, 0]
    finally:
        seqio.MixtureRegistry.remove("test_data_mixture")
    counts = sorted(collections.Counter(targets.tolist()).values())
    assert len(counts) == 2 and 10 <= counts[0] <= 40


def test_prompt_index_of_a_task(temporary_task):
    name = temporary_task("test_data_index", prompt_index=[1] * ROWS)
    batch = next(load(name, prompts=PROMPTS))
    assert (batch["encoder_input_tokens"][:, :2] == MINI + np.array([3, 4])).all()


def test_inputs_that_lose_their_end_are_reported(task):
    whole = load(task)
    assert whole.report.message() is None
    assert (whole.report.examples, whole.report.complete) == (ROWS, True)
    longest = whole.report.longest_inputs
    lengths = {"inputs": longest - 1, "targets": 4}
    report = load(task, task_feature_lengths=lengths).report
    assert report.inputs_cut > 0
    assert report.message() == (
        f"{report.inputs_cut} of 10 inputs lose their end: they are longer than "
        f"{longest - 1} tokens (the longest has {longest}); raise "
        "TASK_FEATURE_LENGTHS['inputs'] to keep them whole"
    )
    partly = load(task, task_feature_lengths=lengths, examples_to_check=4).report
    assert (partly.examples, partly.complete) == (4, False)
    assert "of the first 4 inputs" in partly.message()


def test_tasks_that_cut_before_eos_are_cut_here(temporary_task):
    """seqio's own cutting would neither be counted nor know virtual tokens."""
    name = "test_data_after_trim"
    seqio.TaskRegistry.add(
        name,
        source=sources.Rows(
            lambda split: {"inputs": ["a b c d e f"], "targets": ["yes"]}, ["train"]
        ),
        preprocessors=[
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=features.output_features("mini"),
    )
    try:
        lengths = {"inputs": 4, "targets": 4}
        batches = load(name, task_feature_lengths=lengths)
        tokens = next(batches)["encoder_input_tokens"][0]
    finally:
        seqio.TaskRegistry.remove(name)
    assert batches.report.inputs_cut == 1
    assert tokens[-1] == EOS and len(tokens) == 7


def test_tasks_that_need_the_lengths_get_them(temporary_task):
    seen = []

    def needs_lengths(ds, sequence_length):
        seen.append(dict(sequence_length))
        return ds

    name = temporary_task("test_data_needs", preprocessors=[needs_lengths])
    next(load(name))
    assert seen and all(lengths == {"inputs": 8, "targets": 4} for lengths in seen)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"split": "dev"}, "no split 'dev': choose one of train, validation"),
        ({"module": "no.such"}, "MIXTURE_OR_TASK_MODULE='no.such' does not import"),
        ({"vocab_size": 100}, "has 8192 ids but the model's table 100 rows"),
        ({"placement": "in"}, "no placement is called 'in'"),
        ({"task_feature_lengths": {"inputs": 8}}, "must give 'inputs' and 'targets'"),
        (
            {"task_feature_lengths": {"inputs": 8, "targets": 1}},
            "(the longest has 2): set TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 2}",
        ),
        (
            {"pack": True, "task_feature_lengths": {"inputs": 3, "targets": 4}},
            "packed rows of 3 tokens leave no room",
        ),
    ],
)
def test_mistakes(task, options, message):
    with pytest.raises(UserError) as error:
        load(task, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_over_long_targets_are_refused_wherever_they_are(task):
    batches = load(
        task,
        task_feature_lengths={"inputs": 8, "targets": 1},
        examples_to_check=0,
    )
    with pytest.raises(UserError, match=r"longer than TASK_FEATURE_LENGTHS\['targets"):
        next(batches)


@pytest.mark.parametrize(
    "name, message",
    [
        ("test_data_row", "did you mean test_data_rows"),
        ("qqqqqqqqqq", "name the module that registers it"),
    ],
)
def test_misspelt_task(task, name, message):
    with pytest.raises(UserError, match=message):
        load(name)


def test_empty_split(temporary_task):
    name = temporary_task("test_data_empty", count=0)
    with pytest.raises(UserError, match="split 'train' is empty"):
        load(name)


def test_split_that_preprocessing_empties(temporary_task):
    def drop_all(ds):
        return ds.filter(lambda row: False)

    name = temporary_task("test_data_filtered", preprocessors=[drop_all])
    with pytest.raises(UserError, match="split 'train' of test_data_filtered is empty"):
        load(name)


def test_module_with_a_syntax_error(tmp_path, monkeypatch):
    (tmp_path / "broken_task_module.py").write_text("def (\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="SyntaxError"):
        examples.find("any", "broken_task_module")


def test_inputs_that_name_positions_twice():
    def generate():
        yield {"inputs": [-1, -2, -3, -1, EOS], "targets": [EOS]}

    ids = tf.TensorSpec([None], tf.int32)
    ds = tf.data.Dataset.from_generator(
        generate, output_signature={"inputs": ids, "targets": ids}
    )
    ds = PromptFeatureConverter(ONE, V)(ds, {"inputs": 4, "targets": 2})
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        next(ds.as_numpy_iterator())
    assert "name each position once" in cure(error.value)


def test_source_that_takes_no_seed():
    def rows_of(split, shuffle_files):
        del split, shuffle_files
        return tf.data.Dataset.from_tensors({"inputs": "a", "targets": "b"})

    name = "test_data_no_seed"
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(rows_of, splits=["train"]),
        preprocessors=[seqio.preprocessors.tokenize],
        output_features=features.output_features("mini"),
    )
    try:
        with pytest.raises(UserError, match="seqio cannot read .*'seed'"):
            load(name)
    finally:
        seqio.TaskRegistry.remove(name)


@pytest.fixture
def template_task(tmp_path):
    def register(template):
        path = tmp_path / "rows.tsv"
        path.write_text("text\tlabel\na b\t0\n")
        return local_file.register(
            "test_data_template",
            {"train": str(path)},
            template,
            label_names=["no", "yes"],
        ).name

    yield register
    seqio.TaskRegistry.remove("test_data_template")
    local_file._REGISTERED.discard("test_data_template")


def test_template_beyond_the_prompt(template_task):
    name = template_task("{prompt:0:4} {text}")
    assert load(name, prompts=[Prompt("long", 4)])
    with pytest.raises(UserError, match="beyond the end of the prompt: raise"):
        load(name)


def test_evaluation_sees_the_same_rows_as_training(template_task):
    """seqio's evaluator, given no lengths, leaves cutting to the converter too."""
    name = template_task("{prompt:0:1} {text} {prompt:1:3}")
    lengths = {"inputs": 2, "targets": 4}
    provider = examples.find(name)
    converter = batching.make_converter(provider, lengths, ONE, MINI)
    evaluator = seqio.Evaluator(
        name,
        converter.limited_to(lengths["inputs"]),
        eval_split="train",
        use_cached=False,
        sequence_length=examples.lengths_for(provider, lengths),
        logger_cls=(),
    )
    seen = []

    def predict(ds):
        seen.extend(row["encoder_input_tokens"] for _, row in ds.as_numpy_iterator())
        return [(0, [5, EOS])]

    evaluator.evaluate(compute_metrics=False, step=0, predict_fn=predict)
    expected = next(load(name, task_feature_lengths=lengths, batch_size=1))
    np.testing.assert_array_equal(seen, expected["encoder_input_tokens"])


def test_functools_wrapped_trimming_is_recognised(temporary_task):
    trim = functools.partial(seqio.preprocessors.append_eos_after_trim)
    name = temporary_task("test_data_partial", preprocessors=[trim])
    provider = examples.find(name)
    assert examples.lengths_for(provider, {"inputs": 1, "targets": 1}) is None
