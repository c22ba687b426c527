# SPDX-License-Identifier: Apache-2.0
"""Batches of examples that are held in memory."""

import itertools

import numpy as np
import pytest

from prompt_tuning.data import in_memory
from prompt_tuning.errors import UserError

# Seven examples: example i has i + 2 input tokens, all of them i + 10.
INPUTS = [np.full(i + 2, i + 10, np.int32) for i in range(7)]
TARGETS = [np.array([i + 20, 1], np.int32) for i in range(7)]
EXAMPLES = in_memory.Examples(INPUTS, TARGETS)


def stream(size=3, seed=0, **options):
    options = {"edges": (4, 8), "targets_length": 3, **options}
    return in_memory.ShuffledBatches(EXAMPLES, size, seed, **options)


def take(batches, count):
    return list(itertools.islice(batches, count))


def drawn(batches) -> list[int]:
    """Which examples the rows of batches are."""
    firsts = [batch["encoder_input_tokens"][:, 0] for batch in batches]
    return (np.concatenate(firsts) - 10).tolist()


def test_features():
    batch = EXAMPLES.features([2, 0], 5, 3)
    assert batch["encoder_input_tokens"].tolist() == [
        [12, 12, 12, 12, 0],
        [10, 10, 0, 0, 0],
    ]
    assert batch["decoder_target_tokens"].tolist() == [[22, 1, 0], [20, 1, 0]]
    assert batch["decoder_input_tokens"].tolist() == [[0, 22, 1], [0, 20, 1]]
    assert batch["decoder_loss_weights"].tolist() == [[1, 1, 0], [1, 1, 0]]
    assert batch["decoder_loss_weights"].dtype == np.float32


def test_every_pass_holds_every_example_once_in_its_own_order():
    found = drawn(take(stream(size=7), 3))
    passes = [found[start : start + 7] for start in (0, 7, 14)]
    assert [sorted(each) for each in passes] == [list(range(7))] * 3
    assert len({tuple(each) for each in passes}) == 3


def test_a_batch_at_the_end_of_a_pass_goes_on_with_the_next():
    assert drawn(take(stream(size=3), 7)) == drawn(take(stream(size=7), 3))


def test_batches_larger_than_the_examples():
    assert drawn(take(stream(size=21), 1)) == drawn(take(stream(size=7), 3))


@pytest.mark.parametrize("start", [1, 2, 5])
def test_a_batch_is_the_same_whatever_came_before_it(start):
    later = take(stream(start_batch=start), 4)
    for one, other in zip(later, take(stream(), start + 4)[start:], strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_the_seed_decides_the_order():
    assert drawn(take(stream(seed=0), 7)) == drawn(take(stream(seed=0), 7))
    assert drawn(take(stream(seed=0), 7)) != drawn(take(stream(seed=1), 7))


def test_rows_are_padded_to_the_edge_of_the_longest():
    batches = take(stream(size=1), 7)
    for example, batch in zip(drawn(batches), batches, strict=True):
        length = batch["encoder_input_tokens"].shape[1]
        assert length == (4 if len(INPUTS[example]) <= 4 else 8)


def test_processes_take_their_rows_of_the_same_batches():
    whole = take(stream(size=4), 5)
    parts = [take(stream(size=4, shard_info=(i, 2)), 5) for i in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        for name in batch:
            joined = np.concatenate([first[name], second[name]])
            np.testing.assert_array_equal(joined, batch[name])


def test_rows_that_do_not_divide_among_processes():
    with pytest.raises(UserError, match="a batch of 3 does not divide among 2"):
        stream(size=3, shard_info=(0, 2))


def test_the_cut_is_that_of_the_converter():
    from prompt_tuning.data import feature_converter

    rows = [[-1, -2, 5, 6, 7, 1], [5, 6, 7, 8], [5, -1, 6, 1, -2], [-1, 1], [5, 1]]
    for ids, length in itertools.product(rows, range(1, 6)):
        ids = np.array(ids, np.int32)
        expected = feature_converter.cut(ids, length, 1).numpy()
        np.testing.assert_array_equal(in_memory.cut(ids, length, 1), expected)


def test_the_report_counts_what_is_cut():
    report = in_memory.report_of(EXAMPLES, [3, 3, 4, 5, 6, 7, 9], 6, 2)
    assert report.inputs_cut == 2 and report.longest_inputs == 9
    assert report.room == (8, 2)
    assert report.edges(3)[-1] == 8
    assert report.fill(1).decoder == 1.0
