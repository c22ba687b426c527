# SPDX-License-Identifier: Apache-2.0
"""The cost of a run is that of the batches it saw."""

import dataclasses

import optax

from prompt_tuning.methods import registry
from prompt_tuning.network.transformer import T5Config
from prompt_tuning.planning import flops
from prompt_tuning.planning.workload import Workload
from prompt_tuning.runs import costs

WORK = Workload(
    config=T5Config(256, 32, 4, 2, 2, 8, 64),
    batch_size=99,
    inputs=99,
    targets=9,
    optimizer=optax.identity(),
    prompt_length=7,
)


def test_flops_are_those_of_each_batch_as_it_was():
    """Encoder tokens of a batch hold the prompt already."""
    shapes = {(8, 12, 3): 5, (4, 20, 3): 2}
    step = lambda rows, text: flops.count(
        dataclasses.replace(WORK, batch_size=rows, inputs=text, targets=3)
    )["total"]
    assert costs.training_flops(shapes, WORK) == 5 * step(8, 5) + 2 * step(4, 13)
    labels = dataclasses.replace(WORK, label_loss="perceptron")
    every = dataclasses.replace(labels, batch_size=8, inputs=5, targets=4, num_labels=6)
    assert (
        costs.training_flops({(8, 12, 3): 1}, labels, (6, 4))
        == (flops.count(every)["total"])
    )
    tuned = dataclasses.replace(WORK, method=registry.named("model_tuning"))
    # Attention aside, a weight that moves costs half as much again.
    more = costs.training_flops({(8, 12, 3): 1}, tuned)
    attention = flops.count(
        dataclasses.replace(tuned, batch_size=8, inputs=5, targets=3)
    )["attention"]
    assert (more - attention) * 2 == 3 * (step(8, 5) - attention)
