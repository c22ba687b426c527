# SPDX-License-Identifier: Apache-2.0
"""The likelihood of a split's right answers: a finer measure than its metrics.

Early in training most metrics stand still, and one example more or less moves them by
steps; the likelihood tells runs apart before they do.
"""

from collections.abc import Callable

import jax
import numpy as np

from prompt_tuning import processes
from prompt_tuning.data import in_memory
from prompt_tuning.devices import sharding
from prompt_tuning.inference.answerer import Evaluation, batches_by_length
from prompt_tuning.network.model import Model
from prompt_tuning.types import Params

# What it is called among metrics.
LOG_LIKELIHOOD = "log_likelihood"


def evaluator(
    model: Model,
    examples: in_memory.Examples,
    mesh: jax.sharding.Mesh | None,
    batch_size: int,
) -> Callable[[Params], Evaluation]:
    """Measures the mean log-likelihood of the right answers.

    Args:
      model: with the network of these examples' prompts.
      examples: those of the split.
      mesh: the devices, where there are several.
      batch_size: rows of a batch.
    """
    score = jax.jit(model.score)
    tokens = in_memory.padded(examples.inputs, max(map(len, examples.inputs)))
    longest = max(map(len, examples.targets))

    def evaluate(params: Params) -> Evaluation:
        total = 0.0
        for part in batches_by_length(tokens, batch_size):
            batch = examples.features(part.indices, part.length, longest)
            short = batch_size - len(part.indices)
            batch = {k: np.pad(v, ((0, short), (0, 0))) for k, v in batch.items()}
            if mesh is not None:
                batch = {k: sharding.spread_rows(v, mesh) for k, v in batch.items()}
            scores = np.asarray(processes.whole(score(params, batch)))
            total += float(scores[: len(part.indices)].sum())
        return Evaluation({LOG_LIKELIHOOD: total / len(examples)}, (), ())

    return evaluate
