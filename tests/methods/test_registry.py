# SPDX-License-Identifier: Apache-2.0
"""Methods: rules that part every model into tuned and frozen leaves."""

import flax.linen as nn
import numpy as np
import pytest

from prompt_tuning import trees
from prompt_tuning.errors import UserError
from prompt_tuning.methods import registry
from prompt_tuning.methods.last_layers import LastLayers
from prompt_tuning.methods.method import HELD
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import Transformer


@pytest.fixture(scope="module")
def shapes(tiny_config):
    model = Model(Transformer(tiny_config, (Prompt("a", 5), Prompt("b", 3))))
    return nn.meta.unbox(model.abstract_params())


@pytest.mark.parametrize("method", ["prompt_tuning", "model_tuning", "norm_tuning"])
def test_every_leaf_is_either_tuned_or_frozen(method, shapes):
    tuned, frozen = registry.split(shapes, registry.rules_of(method))
    assert set(trees.flatten(trees.merge(tuned, frozen))) == set(trees.flatten(shapes))


def test_prompt_tuning_tunes_the_prompts_alone(shapes):
    tuned, frozen = registry.split(shapes, registry.rules_of("prompt_tuning"))
    assert set(trees.flatten(tuned)) == {"prompts/a", "prompts/b"}
    assert not any("prompt" in name for name in trees.flatten(frozen))


def test_norm_tuning_tunes_vectors_alone(shapes):
    tuned, frozen = registry.split(shapes, registry.rules_of("norm_tuning"))
    assert {name.rsplit("/", 1)[1] for name in trees.flatten(tuned)} == {
        "scale",
        "rel_embedding",
    }
    assert not any(name.endswith("scale") for name in trees.flatten(frozen))


def test_last_layers_are_the_ends_of_stacks(tiny_params):
    """The others do not move; together they are the model, bit for bit."""
    method = LastLayers(layers=1, encoder=True)
    tuned, frozen = method.split(tiny_params)
    assert {name.split("/")[1] for name in trees.flatten(tuned)} == {"layers"}
    assert {leaf.shape[0] for leaf in trees.flatten(tuned).values()} == {1}
    assert trees.count(LastLayers().split(tiny_params)[0]) < trees.count(tuned)
    moved = trees.map_with_path(lambda name, leaf: leaf + 1, tuned)
    for own, offset in ((tuned, 0), (moved, 1)):
        rest = {name: tree for name, tree in frozen.items() if name != HELD}
        whole = trees.flatten(trees.merge(method.materialize(own, frozen), rest))
        assert whole.keys() == trees.flatten(tiny_params).keys()
        for name, leaf in trees.flatten(tiny_params).items():
            if "/layers/" in name:
                np.testing.assert_array_equal(whole[name][0], leaf[0])
                np.testing.assert_array_equal(whole[name][1], leaf[1] + offset)
            else:
                np.testing.assert_array_equal(whole[name], leaf)
    with pytest.raises(UserError, match="layers=3 is more than the 2 layers"):
        LastLayers(layers=3).split(tiny_params)


def test_model_tuning_freezes_nothing(shapes):
    assert registry.split(shapes, registry.rules_of("model_tuning"))[1] == {}


def test_a_method_that_tunes_nothing_is_refused(shapes):
    del_prompts = {name: leaf for name, leaf in shapes.items() if name != "prompts"}
    with pytest.raises(ValueError, match="no parameter is tuned"):
        registry.split(del_prompts, registry.rules_of("prompt_tuning"))


def test_rules_that_leave_a_gap_are_refused(shapes):
    with pytest.raises(ValueError, match="no rule covers .*token_embedder/embedding"):
        registry.split(shapes, ((r"prompts/.*", registry.TUNED),))
