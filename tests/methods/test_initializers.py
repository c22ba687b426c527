# SPDX-License-Identifier: Apache-2.0
"""Initialisers: on arrays whose result is known, statistically, and their errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning.methods import initializers

KEY = jax.random.key(0)
# Row i holds i, so that a drawn row tells which one it is.
TABLE = np.repeat(np.arange(50, dtype=np.float32)[:, None], 4, axis=1)
sevens = lambda key, shape, dtype: jnp.full(shape, 7.0, dtype)


def rows_of(prompt):
    """The index of each row, having checked that it is a row of the table."""
    np.testing.assert_array_equal(prompt, np.repeat(prompt[:, :1], 4, axis=1))
    return np.asarray(prompt[:, 0]).astype(int)


def test_uniform_reaches_both_ends_and_never_leaves_them():
    prompt = initializers.random_uniform()(KEY, (100, 64), jnp.float32)
    assert prompt.shape == (100, 64) and prompt.dtype == jnp.float32
    assert -0.5 <= prompt.min() < -0.49 and 0.49 < prompt.max() <= 0.5
    assert abs(prompt.mean()) < 0.02
    # The variance of a uniform distribution of width 1.
    assert prompt.var() == pytest.approx(1 / 12, rel=0.05)


def test_uniform_takes_another_scale_and_another_key():
    init = initializers.random_uniform(2.0)
    prompt = init(KEY, (100, 64))
    assert prompt.min() < -1.9 and prompt.max() > 1.9
    assert (init(jax.random.key(1), (100, 64)) != prompt).any()


def test_sampled_vocab_draws_rows_of_the_population_without_repeats():
    init = initializers.sampled_vocab(TABLE, population=20)
    drawn = rows_of(init(KEY, (20, 4)))
    # As many as there are: every piece from id 3 on occurs once.
    assert sorted(drawn) == list(range(3, 23))
    assert drawn.tolist() != sorted(drawn)


def test_sampled_vocab_repeats_only_where_the_prompt_outgrows_the_population():
    drawn = rows_of(initializers.sampled_vocab(TABLE, population=5)(KEY, (30, 4)))
    assert set(drawn) <= set(range(3, 8)) and len(drawn) == 30


def test_the_papers_population_is_cut_to_the_table():
    drawn = rows_of(initializers.sampled_vocab(TABLE)(KEY, (47, 4)))
    assert sorted(drawn) == list(range(3, 50))
    assert initializers.PAPER_POPULATION == 5000


def test_sampled_vocab_depends_on_the_key():
    init = initializers.sampled_vocab(TABLE)
    assert (init(KEY, (10, 4)) != init(jax.random.key(1), (10, 4))).any()


def test_class_labels_start_as_the_mean_of_their_tokens():
    init = initializers.class_labels(TABLE, [[10], [20, 30, 40]], sevens)
    prompt = init(KEY, (5, 4), jnp.float32)
    np.testing.assert_array_equal(prompt[:, 0], [10.0, 30.0, 7.0, 7.0, 7.0])
    assert prompt.shape == (5, 4) and prompt.dtype == jnp.float32


def test_as_many_labels_as_positions_leave_nothing_to_the_fallback():
    prompt = initializers.class_labels(TABLE, [[1], [2]], None)(KEY, (2, 4))
    np.testing.assert_array_equal(prompt[:, 0], [1.0, 2.0])


def test_from_text_reads_one_row_for_each_token():
    prompt = initializers.from_text(TABLE, [8, 8, 3], sevens)(KEY, (4, 4))
    np.testing.assert_array_equal(prompt[:, 0], [8.0, 8.0, 3.0, 7.0])


def test_from_saved_is_the_saved_prompt_in_float32():
    saved = np.arange(12, dtype=np.float64).reshape(3, 4) * 300
    prompt = initializers.from_saved(saved)(KEY, (3, 4))
    np.testing.assert_array_equal(prompt, saved)
    assert prompt.dtype == jnp.float32


@pytest.mark.parametrize(
    "make",
    [
        lambda: initializers.sampled_vocab(TABLE),
        lambda: initializers.class_labels(TABLE, [[1]], sevens),
        lambda: initializers.from_text(TABLE, [1], sevens),
    ],
    ids=["sampled_vocab", "class_labels", "from_text"],
)
def test_a_table_of_another_width_is_refused(make):
    with pytest.raises(ValueError, match="prompt width 5 is not the embedding width 4"):
        make()(KEY, (3, 5))


def test_no_labels_and_labels_without_tokens_are_refused():
    with pytest.raises(ValueError, match="labels of one token or more.*empty: all"):
        initializers.class_labels(TABLE, [], sevens)
    with pytest.raises(ValueError, match=r"empty: \[1\]"):
        initializers.class_labels(TABLE, [[3], []], sevens)


def test_more_labels_than_positions_are_refused():
    init = initializers.class_labels(TABLE, [[1], [2], [3]], sevens)
    with pytest.raises(ValueError, match="3 class labels do not fit .* length 2"):
        init(KEY, (2, 4))


def test_an_empty_text_is_refused():
    with pytest.raises(ValueError, match="needs a text of one token or more"):
        initializers.from_text(TABLE, [], sevens)


def test_a_text_longer_than_the_prompt_names_the_length_to_set():
    init = initializers.from_text(TABLE, [1, 2, 3], sevens)
    with pytest.raises(ValueError, match="has 3 tokens.*set PROMPT_LENGTH=3"):
        init(KEY, (2, 4))


@pytest.mark.parametrize("shape", [(4, 4), (3, 5)])
def test_a_saved_prompt_of_another_shape_is_refused(shape):
    init = initializers.from_saved(np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"is \[3, 4\].*set PROMPT_LENGTH=3"):
        init(KEY, shape)
