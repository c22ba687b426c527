# SPDX-License-Identifier: Apache-2.0
"""Prompts: ids after the table's last row, one float32 leaf for each prompt."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning.network.prompts import Prompt, PromptBank, virtual_ids
from prompt_tuning.network.transformer import TokenEmbedder

PROMPTS = (Prompt("first", 3), Prompt("second", 2))


def test_ids_lie_end_to_end_after_the_table():
    ids = virtual_ids(PROMPTS, vocab_size=256)
    np.testing.assert_array_equal(ids["first"], [256, 257, 258])
    np.testing.assert_array_equal(ids["second"], [259, 260])
    assert ids["first"].dtype == np.int32


def test_two_prompts_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two of the prompts are called 'first'"):
        virtual_ids([Prompt("first", 1), Prompt("first", 2)], 256)


@pytest.mark.parametrize("length", [0, -1])
def test_a_prompt_without_positions_is_refused(length):
    with pytest.raises(ValueError, match=f"has length {length}; it must be 1 or more"):
        Prompt("p", length)


@pytest.mark.parametrize("name", ["", "a/b"])
def test_a_name_that_cannot_be_a_leaf_is_refused(name):
    with pytest.raises(ValueError, match="must be a word that files can be called by"):
        Prompt(name, 1)


def test_the_bank_lays_its_leaves_in_the_order_of_the_ids():
    bank = PromptBank(PROMPTS, emb_dim=4)
    boxed = bank.init(jax.random.key(0))
    assert boxed["params"]["first"].names == ("prompt", "prompt_embed")
    params = nn.meta.unbox(boxed)["params"]
    assert {name: leaf.shape for name, leaf in params.items()} == {
        "first": (3, 4),
        "second": (2, 4),
    }
    assert all(leaf.dtype == jnp.float32 for leaf in params.values())
    rows = bank.apply({"params": params})
    np.testing.assert_array_equal(rows[:3], params["first"])
    np.testing.assert_array_equal(rows[3:], params["second"])


def embed(table, virtual, ids):
    embedder = TokenEmbedder(*table.shape)
    return embedder.apply({"params": {"embedding": table}}, ids, virtual, "float32")


def test_real_ids_read_the_table_and_virtual_ids_the_bank():
    table = jnp.arange(20.0).reshape(10, 2)
    virtual = -jnp.ones((3, 2)) * jnp.arange(1.0, 4.0)[:, None]
    ids = jnp.array([[11, 0, 9], [10, 12, 5]])
    rows = embed(table, virtual, ids)
    np.testing.assert_array_equal(rows[..., 0], [[-2.0, 0.0, 18.0], [-1.0, -3.0, 10.0]])


def test_a_virtual_id_gives_no_gradient_to_the_table_nor_a_real_one_to_the_bank():
    table, virtual = jnp.ones((10, 2)), jnp.ones((3, 2))
    ids = jnp.array([[9, 4, 11]])
    to_table, to_virtual = jax.grad(lambda *args: embed(*args, ids).sum(), (0, 1))(
        table, virtual
    )
    np.testing.assert_array_equal(np.flatnonzero(to_table.sum(1)), [4, 9])
    np.testing.assert_array_equal(np.flatnonzero(to_virtual.sum(1)), [1])
