# SPDX-License-Identifier: Apache-2.0
"""The check of shapes: it is on, and it sees what is wrong."""

import pathlib
import sys

import jax.numpy as jnp
import pytest
import shapes

from prompt_tuning.network import layers, losses


@pytest.fixture(autouse=True)
def on():
    with shapes.checking():
        yield


def test_calls_are_checked():
    logits = jnp.zeros((2, 3, 5))
    with pytest.raises(shapes.ShapeError, match=r"targets is \[2, 4\].*says \[B, S\]"):
        losses.cross_entropy(logits, jnp.zeros((2, 4), jnp.int32))
    with pytest.raises(shapes.ShapeError, match="key_valid"):
        layers.padding_mask(jnp.ones((2, 3), bool), jnp.ones((1, 3), bool))


def test_results_are_checked():
    source = "def f(\n    x: Array,  # [B, 2]\n) -> Array:  # [B, K] and [] or [B]\n    ...\n"
    ((name, promise),) = shapes.promises(source)
    f = lambda x: (x.T, x[0, 0])
    assert name == "f" and shapes.checked(f, promise)(jnp.zeros((2, 2)))
    with pytest.raises(shapes.ShapeError, match=r"result 1 is \[2, 3\]"):
        shapes.checked(f, promise)(jnp.zeros((3, 2)))
    with pytest.raises(shapes.ShapeError, match=r"x is \[3\]"):
        shapes.checked(f, promise)(jnp.zeros(3))


def test_most_signatures_of_the_network_have_shapes():
    checked = [name for module in shapes.MODULES for name in _names(module)]
    assert len(checked) >= 30
    assert {
        "network.model.Model.rank",
        "network.transformer.Transformer.decode",
    } <= set(checked)


def _names(module):
    path = f"prompt_tuning.{module}"
    source = pathlib.Path(str(sys.modules[path].__file__)).read_text()
    return [f"{module}.{name}" for name, _ in shapes.promises(source)]
