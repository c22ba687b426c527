# SPDX-License-Identifier: Apache-2.0
"""Lengths to edges, edges to batches: few shapes, little padding, nothing lost."""

import itertools

import numpy as np
import pytest

from prompt_tuning.data import buckets


def test_used_counts_up_to_the_last_token():
    tokens = np.array([[5, 6, 0, 0], [0, 7, 0, 8], [0, 0, 0, 0]])
    assert buckets.used(tokens).tolist() == [2, 4, 1]


@pytest.mark.parametrize("shortest, longest", [(22, 84), (1, 3), (5, 5), (2, 512)])
@pytest.mark.parametrize("count", [1, 4, 9])
def test_edges_grow_by_one_factor(shortest, longest, count):
    edges = buckets.edges(shortest, longest, count)
    assert edges[-1] == longest and len(edges) <= count
    assert list(edges) == sorted(set(edges))
    assert all(edge % buckets.MULTIPLE == 0 for edge in edges[:-1])
    factor = (longest / shortest) ** (1 / count)
    for below, above in itertools.pairwise((shortest, *edges)):
        assert above <= (below + buckets.MULTIPLE) * factor + buckets.MULTIPLE


@pytest.mark.parametrize("arguments", [(0, 5, 2), (6, 5, 2), (1, 5, 0)])
def test_no_edges(arguments):
    with pytest.raises(ValueError, match="no .* edges between"):
        buckets.edges(*arguments)


def test_fitting():
    assert [buckets.fitting(n, (8, 20)) for n in (1, 8, 9, 20)] == [8, 8, 20, 20]
    with pytest.raises(ValueError, match="length 21 is beyond"):
        buckets.fitting(21, (8, 20))


def test_groups_hold_every_row_once_in_few_shapes():
    lengths = np.random.default_rng(0).integers(3, 85, 201)
    edges = buckets.edges(3, 84)
    groups = buckets.groups(lengths, edges, [16])
    assert [len(group.indices) for group in groups] == [16] * 12 + [9]
    assert sorted(np.concatenate([g.indices for g in groups])) == list(range(201))
    assert {group.length for group in groups} <= set(edges)
    for group in groups:
        assert group.length == buckets.fitting(lengths[group.indices].max(), edges)
    longest = [lengths[group.indices].max() for group in groups]
    assert longest == sorted(longest, reverse=True)
    # Those of one length stay in order.
    (group,) = buckets.groups([7, 9, 7, 9], (16,), [4])
    assert group.indices.tolist() == [1, 3, 0, 2]
    assert buckets.groups([], (16,), [4]) == []


def cost(sizes, lengths, edges):
    """Of batches of these sizes over the rows by descending length."""
    ordered, total, at = sorted(lengths, reverse=True), 0, 0
    for size in sizes:
        total += buckets.BATCH_POSITIONS + size * buckets.fitting(ordered[at], edges)
        at += size
    return total


@pytest.mark.parametrize("seed", range(5))
def test_groups_of_several_sizes_cost_least(seed):
    lengths = np.random.default_rng(seed).integers(3, 400, 9)
    edges, sizes = buckets.edges(3, 400, 6), (1, 2, 8)
    groups = buckets.groups(lengths, edges, sizes)
    assert sorted(np.concatenate([g.indices for g in groups])) == list(range(9))
    for group in groups:
        assert group.length == buckets.fitting(lengths[group.indices].max(), edges)
    found = [buckets.fitting(len(group.indices), sizes) for group in groups]
    # Every way to cut nine rows, the last batch being filled up.
    ways = [
        way
        for count in range(1, 10)
        for way in itertools.product(sizes, repeat=count)
        if sum(way[:-1]) < 9 <= sum(way)
    ]
    assert cost(found, lengths, edges) == min(cost(w, lengths, edges) for w in ways)


def padded(lengths, edges):
    return sum(buckets.fitting(length, edges) for length in lengths)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("most", [1, 2, 3])
def test_edges_for_pads_least(seed, most):
    lengths = np.random.default_rng(seed).integers(1, 60, 40)
    found = buckets.edges_for(lengths, most, gain=0)
    longest = lengths.max()
    candidates = [n for n in range(8, longest, 8)]
    best = min(
        padded(lengths, (*rest, longest))
        for count in range(most)
        for rest in itertools.combinations(candidates, count)
    )
    assert len(found) <= most and found[-1] == longest
    assert padded(lengths, found) == best


def test_a_further_edge_has_to_be_worth_it():
    # An edge of 16 saves 38 % of all positions, 24 for the odd one 3 % more.
    lengths = [80] * 10 + [16] * 10 + [24]
    assert buckets.edges_for(lengths, 4, gain=0.05) == (16, 80)
    assert buckets.edges_for(lengths, 4, gain=0.01) == (16, 24, 80)
    assert buckets.edges_for(lengths, 4, gain=0.5) == (80,)
    assert buckets.edges_for([9, 9, 9]) == (9,)
    with pytest.raises(ValueError, match="no lengths"):
        buckets.edges_for([])


def test_packed_rows_count():
    # 4 + 4 fill a row; 5 begins one, where the targets leave no room for a third.
    examples = np.array([[4, 1], [4, 1], [5, 2], [1, 1], [1, 1]])
    assert buckets.packed_rows(examples, (8, 3)) == 3
    assert buckets.packed_rows(examples, (8, 9)) == 2
    # Nine examples are more than are packed together.
    assert buckets.packed_rows(np.ones((9, 2), int), (8, 8)) == 2
    assert buckets.packed_rows(np.ones((8, 2), int), (8, 8)) == 1
