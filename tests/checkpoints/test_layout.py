# SPDX-License-Identifier: Apache-2.0
"""T5X's names and ours are one to one."""

import json

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import pytest

from prompt_tuning import trees
from prompt_tuning.checkpoints import layout
from prompt_tuning.network.model import Model
from prompt_tuning.network.transformer import T5Config, Transformer


@pytest.mark.parametrize("variant", ["t5_1_1", "t5_1_0"])
def test_names_and_shapes_are_those_of_t5x(golden, tiny_config, variant):
    kwargs = vars(tiny_config)
    if variant == "t5_1_0":
        kwargs = {
            **kwargs,
            "mlp_activations": ("relu",),
            "logits_via_embedding": True,
        }
    ours = Model(Transformer(T5Config(**kwargs))).abstract_params()
    tree = json.loads((golden / variant / "param_tree.json").read_text())
    theirs = {name: tuple(leaf["shape"]) for name, leaf in tree.items()}
    flat = trees.flatten(nn.meta.unbox(ours))
    assert layout.shapes(flat) == theirs
    assert set(layout.groups(theirs)) == set(flat)


def test_stack_and_unstack_are_inverse(golden):
    with np.load(golden / "t5_1_1" / "params.npz") as file:
        theirs = dict(file)
    ours = layout.stack(theirs)
    np.testing.assert_array_equal(
        ours["decoder/layers/mlp/wo/kernel"][1],
        theirs["decoder/layers_1/mlp/wo/kernel"],
    )
    back = layout.unstack(ours)
    assert back.keys() == theirs.keys()
    for name, leaf in theirs.items():
        np.testing.assert_array_equal(back[name], leaf)


def test_stacking_orders_layers_by_number_and_keeps_bfloat16():
    flat = {
        f"a/layers_{i}/w": np.full(2, i, ml_dtypes.bfloat16) for i in (10, *range(10))
    }
    (leaf,) = layout.stack(flat).values()
    assert leaf.dtype == ml_dtypes.bfloat16
    assert leaf[:, 0].astype(int).tolist() == list(range(11))


def test_a_missing_layer_is_named():
    with pytest.raises(ValueError, match=r"'a/layers/w' has gaps: layers \[0, 2\]"):
        layout.groups(["a/layers_0/w", "a/layers_2/w"])


def test_sizes_are_read_off_shapes(tiny_model):
    sizes = layout.sizes(
        layout.shapes(trees.flatten(nn.meta.unbox(tiny_model.abstract_params())))
    )
    assert sizes == {
        "vocab_size": 256,
        "emb_dim": 32,
        "num_heads": 4,
        "head_dim": 8,
        "mlp_dim": 64,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
    }
    assert layout.sizes({"some/other/leaf": (3,)}) == {}


def test_ranges_shorten_messages():
    names = [f"d/layers_{i}/w" for i in (0, 1, 2, 5, 7, 8)]
    assert layout.collapse([*names, "d/norm"]) == ["d/layers_{0-2,5,7-8}/w", "d/norm"]


def test_shapes_need_no_arrays():
    leaf = jax.ShapeDtypeStruct((3, 4), np.float32)
    assert layout.shapes({"e/layers/w": leaf, "e/s": leaf}) == {
        "e/layers_0/w": (4,),
        "e/layers_1/w": (4,),
        "e/layers_2/w": (4,),
        "e/s": (3, 4),
    }
