# SPDX-License-Identifier: Apache-2.0
"""Pre-training batches: nothing lost, nothing too long, the same at every resumption."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from prompt_tuning.data import span_corruption
from prompt_tuning.errors import UserError
from prompt_tuning.training import pretraining

VOCAB = 256
FIRST_SENTINEL = VOCAB - 1
# No id occurs twice within 150 tokens, so that a piece of text tells where it is from;
# sentinels are not among them.
TEXT = np.arange(3000, dtype=np.int32) % 150 + 10


def example(i):
    """Inputs and targets of lengths that vary with i; each ends with EOS."""
    inputs = np.append(np.full(i % 5 + 1, 10 + i), 1)
    return inputs, np.append(np.full(i % 2 + 1, 100 + i), 1)


@pytest.fixture(scope="module")
def labelled():
    inputs, targets = zip(*(example(i) for i in range(30)))
    offsets = lambda pieces: np.cumsum([0] + [len(piece) for piece in pieces])
    return pretraining.Labelled(
        inputs=np.concatenate(inputs).astype(np.uint16),
        input_offsets=offsets(inputs),
        targets=np.concatenate(targets).astype(np.uint16),
        target_offsets=offsets(targets),
        task=np.repeat([0, 1, 2], 10),
        task_names=np.array(["a", "b", "c"]),
    )


@pytest.fixture(scope="module")
def mixture(labelled):
    return pretraining.Mixture(
        TEXT,
        labelled,
        VOCAB,
        batch_size=12,
        inputs_length=40,
        targets_length=16,
        task_weights={"a": 1.0, "c": 3.0},
    )


def reassemble(inputs, targets):
    """Puts the spans of the targets where the sentinels of the inputs are."""
    assert inputs[-1] == targets[-1] == span_corruption.EOS_ID
    spans, current = {}, None
    for token in targets[:-1]:
        if token > 200:
            current = spans.setdefault(int(token), [])
        else:
            current.append(int(token))
    order = [int(token) for token in inputs if token > 200]
    assert order == list(spans) == [FIRST_SENTINEL - i for i in range(len(order))]
    text = []
    for token in inputs[:-1]:
        text += spans[int(token)] if token > 200 else [int(token)]
    return text


@pytest.mark.parametrize("length", [2, 3, 7, 40, 128])
def test_spans_put_back_give_the_text(length):
    rng = np.random.default_rng(length)
    for start in range(20):
        text = TEXT[start : start + length]
        inputs, targets = span_corruption.corrupt_spans(text, rng, VOCAB)
        assert reassemble(inputs, targets) == text.tolist()


def test_the_noise_has_its_density_and_its_span_length():
    rng = np.random.default_rng(0)
    hidden = spans = 0
    for _ in range(50):
        _, targets = span_corruption.corrupt_spans(TEXT[:140], rng, VOCAB)
        spans += (targets > 200).sum()
        hidden += (targets <= 200).sum() - 1
    assert hidden / (50 * 140) == pytest.approx(0.15, abs=0.005)
    assert hidden / spans == pytest.approx(3.0, abs=0.1)


def test_spans_start_anywhere():
    rng = np.random.default_rng(0)
    masks = np.zeros(40)
    for _ in range(300):
        inputs, _ = span_corruption.corrupt_spans(TEXT[:40], rng, VOCAB)
        masks += ~np.isin(TEXT[:40], inputs)
    # The first token is never hidden (the text opens with a kept piece).
    assert masks[0] == 0 and (masks[2:] > 0).all()


@pytest.mark.parametrize(
    ("inputs_length", "targets_length"), [(128, 32), (512, 114), (40, 16), (40, 400)]
)
def test_the_text_length_is_the_longest_that_fits(inputs_length, targets_length):
    length = span_corruption.span_corruption_length(
        inputs_length, targets_length, 0.15, 3.0
    )
    lengths = lambda length: [
        len(part)
        for part in span_corruption.corrupt_spans(
            np.full(length, 7), np.random.default_rng(0), VOCAB
        )
    ]
    fits = lambda length: all(
        np.less_equal(lengths(length), [inputs_length, targets_length])
    )
    assert fits(length) and not fits(length + 1)


def segments(batch, row):
    """(inputs, targets) of every example of a packed row."""
    for segment in range(1, int(batch["encoder_segment_ids"][row].max()) + 1):
        yield tuple(
            batch[f"{side}_tokens"][row][batch[ids][row] == segment].tolist()
            for side, ids in (
                ("encoder_input", "encoder_segment_ids"),
                ("decoder_target", "decoder_segment_ids"),
            )
        )


def test_a_batch_holds_each_kind_of_row_in_its_share(mixture):
    batch = mixture.batch(3)
    assert {k: v.shape for k, v in batch.items()} == {
        "encoder_input_tokens": (12, 40),
        "encoder_segment_ids": (12, 40),
        "decoder_input_tokens": (12, 16),
        "decoder_target_tokens": (12, 16),
        "decoder_segment_ids": (12, 16),
        "decoder_loss_weights": (12, 16),
    }
    text = TEXT.tolist()
    windows = {tuple(text[i : i + 4]) for i in range(len(text) - 4)}
    for row in range(3):
        (pair,) = segments(batch, row)
        whole = reassemble(*(np.array(part) for part in pair))
        assert all(tuple(whole[i : i + 4]) in windows for i in range(len(whole) - 4))
    for row in range(3, 6):
        ((prefix, rest),) = segments(batch, row)
        # Targets continue the inputs, and fill their room.
        assert len(rest) == 16
        assert (np.diff(prefix + rest) % 150 == 1).all()
    examples = {tuple(map(tuple, example(i))) for i in [*range(10), *range(20, 30)]}
    for row in range(6, 12):
        packed = [tuple(map(tuple, pair)) for pair in segments(batch, row)]
        assert len(packed) > 1 and set(packed) <= examples


def test_tasks_are_drawn_by_their_weights(mixture):
    drawn = np.zeros(3)
    for step in range(40):
        batch = mixture.batch(step)
        for row in range(6, 12):
            for inputs, _ in segments(batch, row):
                drawn[(inputs[0] - 10) // 10] += 1
    assert drawn[1] == 0
    # First fit prefers the short, and both tasks have the same lengths.
    assert drawn[2] / drawn.sum() == pytest.approx(0.75, abs=0.05)


def test_a_batch_depends_on_seed_and_step_alone(mixture):
    resumed = itertools.islice(mixture.batches(start=2), 2)
    straight = list(itertools.islice(mixture.batches(), 4))[2:]
    for got, want in zip(resumed, straight, strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, want)
    first, second = mixture.batch(0), mixture.batch(1)
    reseeded = dataclasses.replace(mixture, seed=1).batch(0)
    for other in (second, reseeded):
        assert (
            (first["encoder_input_tokens"] != other["encoder_input_tokens"])
            .any(axis=1)
            .all()
        )


def test_text_alone_needs_no_labelled_examples():
    mixture = pretraining.Mixture(
        TEXT, None, VOCAB, 4, 40, 16, span_corruption=0.5, prefix_lm=0.5
    )
    assert mixture.batch(0)["encoder_input_tokens"].shape == (4, 40)


def test_packing_shifts_each_examples_targets_by_itself():
    batch = pretraining.pack(
        [[([5, 6, 1], [7, 1]), ([8, 1], [9, 4, 1])], [([3], [2])]], 6, 7
    )
    row = {name: value[0].tolist() for name, value in batch.items()}
    assert row == {
        "encoder_input_tokens": [5, 6, 1, 8, 1, 0],
        "encoder_segment_ids": [1, 1, 1, 2, 2, 0],
        "decoder_input_tokens": [0, 7, 0, 9, 4, 0, 0],
        "decoder_target_tokens": [7, 1, 9, 4, 1, 0, 0],
        "decoder_segment_ids": [1, 1, 2, 2, 2, 0, 0],
        "decoder_loss_weights": [1, 1, 1, 1, 1, 0, 0],
    }


def test_a_packed_batch_has_the_loss_of_its_rows_alone(tiny_model, tiny_params):
    examples = [([5, 6, 1], [7, 1]), ([8, 1], [9, 4, 1]), ([60, 61, 1], [3, 1])]
    packed = pretraining.pack([examples], 9, 8)
    separate = pretraining.pack([[pair] for pair in examples], 3, 3)
    loss = jax.jit(tiny_model.loss)
    np.testing.assert_allclose(
        loss(tiny_params, packed)[0], loss(tiny_params, separate)[0], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.full(5000, -3, np.int16), "has ids down to -3"),
        (np.full(5000, 3.0), r"holds float64 of shape \(5000,\)"),
        (np.full((50, 100), 3), r"of shape \(50, 100\): token ids are one row"),
        (np.ones(5000, bool), "holds bool"),
        (np.zeros(0, np.uint16), "holds no token ids"),
        (np.full(5000, VOCAB), "has ids up to 256 but the model only 256"),
        (None, "is no array of numbers"),
    ],
)
def test_what_is_no_row_of_ids_is_refused(ids, message, labelled, tmp_path):
    options = {"vocab_size": VOCAB, "batch_size": 4, "task_weights": {"a": 1}}
    if ids is None:
        (tmp_path / "text.npy").write_bytes(b"\x93NUMPY and no more")
    else:
        np.save(tmp_path / "text.npy", ids)
    with pytest.raises(UserError, match=message) as caught:
        pretraining.load(tmp_path, **options)
    assert "\n" not in str(caught.value)
    # And where labelled examples hold it.
    if ids is not None:
        np.save(tmp_path / "text.npy", TEXT)
        arrays = dataclasses.asdict(labelled)
        np.savez(tmp_path / "labelled.npz", **{**arrays, "targets": ids})
        with pytest.raises(UserError, match=message):
            pretraining.load(tmp_path, **options)


def test_offsets_that_cut_nothing_are_refused(labelled, tmp_path):
    np.save(tmp_path / "text.npy", TEXT)
    for wrong in (
        labelled.input_offsets[::-1],
        labelled.input_offsets[:-1],
        [0.0, 1.0],
    ):
        arrays = {**dataclasses.asdict(labelled), "input_offsets": np.array(wrong)}
        np.savez(tmp_path / "labelled.npz", **arrays)
        with pytest.raises(UserError, match="input_offsets of .* must rise from 0"):
            pretraining.load(tmp_path, vocab_size=VOCAB, batch_size=4)


def test_labelled_examples_are_read_from_a_file(labelled, tmp_path):
    arrays = dataclasses.asdict(labelled)
    np.savez(tmp_path / "all.npz", **arrays)
    loaded = pretraining.Labelled.load(tmp_path / "all.npz")
    for i in (0, 7, 29):
        for got, want in zip(loaded.example(i), example(i), strict=True):
            np.testing.assert_array_equal(got, want)
    del arrays["task"], arrays["targets"]
    np.savez(tmp_path / "part.npz", **arrays)
    with pytest.raises(UserError, match="part.npz lacks the arrays targets, task"):
        pretraining.Labelled.load(tmp_path / "part.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"span_corruption": 0.8, "prefix_lm": 0.3}, "add up to 1 at most"),
        ({"span_corruption": -0.1}, "must not be negative"),
        ({"labelled": None}, "give a labelled file"),
        ({"task_weights": {"a": 1, "z": 1}}, r"unknown \['z'\].*tasks are a, b, c"),
        ({"task_weights": {}}, "none given.*tasks are a, b, c"),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused(change, message, mixture):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(mixture, **change)
