# SPDX-License-Identifier: Apache-2.0
"""Trees: names, rules that cover every leaf, and a hash that nothing escapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning import trees

TREE = {"a": {"b": np.ones((2, 3), np.float32), "c": np.zeros(4, np.int32)}, "d": 5.0}


def test_flatten_joins_names_in_the_order_of_the_tree():
    assert list(trees.flatten(TREE)) == ["a/b", "a/c", "d"]


def test_unflatten_inverts_flatten():
    back = trees.unflatten(trees.flatten(TREE))
    assert jax.tree.structure(back) == jax.tree.structure(TREE)
    assert back["a"]["b"] is TREE["a"]["b"]


def test_map_with_path_hands_over_the_leaves_of_every_tree():
    first, second = {"a": {"x": 1}, "b": 2}, {"b": 20, "a": {"x": 10}}
    joined = trees.map_with_path(lambda name, *leaves: (name, *leaves), first, second)
    assert joined == {"a": {"x": ("a/x", 1, 10)}, "b": ("b", 2, 20)}


def test_the_first_rule_that_matches_the_whole_name_decides():
    rules = ((r"a/.*", "one"), (r"a/b", "two"), (r"d", "three"))
    assert trees.labels(TREE, rules) == {"a": {"b": "one", "c": "one"}, "d": "three"}
    assert trees.labels({"da": 1}, ((r"d", "part"), (r".*", "rest"))) == {"da": "rest"}


def test_leaves_without_a_rule_are_all_listed():
    with pytest.raises(ValueError, match=r"no rule covers a/c, d; end the rules with"):
        trees.labels(TREE, ((r"a/b", "one"),))


def test_select_drops_branches_that_are_left_empty():
    labels = {"a": {"b": "x", "c": "x"}, "d": "y"}
    assert trees.select(TREE, labels, "y") == {"d": 5.0}
    assert set(trees.flatten(trees.select(TREE, labels, "x"))) == {"a/b", "a/c"}


def test_merge_joins_branches_and_refuses_a_leaf_held_twice():
    assert trees.merge({"a": {"b": 1}}, {"a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}
    with pytest.raises(ValueError, match="both trees hold 'a/b'"):
        trees.merge({"a": {"b": 1}}, {"a": {"b": 2}})


def test_sizes_count_scalars_and_bytes_of_arrays_and_of_shapes():
    tree = {"a": jnp.zeros((2, 3), jnp.bfloat16), "b": jnp.zeros((), jnp.int32)}
    assert trees.count(tree) == 7
    assert trees.num_bytes(tree) == 2 * 6 + 4
    assert trees.num_bytes(jax.eval_shape(lambda: tree)) == 16


def test_the_fingerprint_does_not_depend_on_order_or_on_who_holds_the_array():
    tree = {"a": np.arange(6.0).reshape(2, 3), "b": {"c": np.ones(2, np.float32)}}
    other = {"b": {"c": jnp.ones(2)}, "a": np.asfortranarray(tree["a"])}
    assert trees.fingerprint(tree) == trees.fingerprint(other)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: {"a": np.nextafter(x, 2, dtype=x.dtype)},
        lambda x: {"b": x},
        lambda x: {"a": x.reshape(3, 2)},
        lambda x: {"a": x.view(np.int32)},
        lambda x: {"a": x, "b": x[:0]},
    ],
    ids=["one bit", "name", "shape", "dtype", "empty leaf"],
)
def test_the_fingerprint_sees(change):
    x = np.ones((2, 3), np.float32)
    assert trees.fingerprint({"a": x}) != trees.fingerprint(change(x))


def test_the_fingerprint_sees_the_sign_of_zero_in_bfloat16():
    zero = jnp.zeros(3, jnp.bfloat16)
    assert trees.fingerprint({"a": zero}) != trees.fingerprint({"a": -zero})


def test_first_match_takes_whole_names_only():
    rules = ((r"b", 1), (r"ab?", 2), (r".*b", 3))
    assert trees.first_match(rules, "ab") == 2
    assert trees.first_match(rules, "cb") == 3
    assert trees.first_match(rules, "c") is None
