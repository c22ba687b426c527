# SPDX-License-Identifier: Apache-2.0
"""Array aliases and the alphabet of dimensions that every signature uses.

========  =============================  ========  ===========================
``B``     batch                          ``N``     attention heads
``T``     input (encoder) tokens         ``D``     width of one head
``S``     target (decoder) tokens        ``F``     width of the MLP
``P``     positions of a soft prompt     ``L``     layers
``H``     hidden width (``emb_dim``)     ``K``     decodes (beams, samples)
``V``     vocabulary (embedding rows)    ``E``     prompts of an ensemble
========  =============================  ========  ===========================
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
from annotated_types import Ge, Gt, Le, Lt, MinLen

Array = jax.Array
DType = Any
Shape = Sequence[int]
PyTree = Any
Params = Mapping[str, Any]
Batch = Mapping[str, Array]
# An initialiser in Flax's form: (key, shape, dtype) -> array.
Initializer = Callable[..., Array]

# Kinds and ranges of what people write (see `values`). Upper ends are far beyond any use
# and stop what would fill the memory before it is refused for another reason.
PositiveInt = Annotated[int, Ge(1), Le(2**31 - 1)]
NonNegativeInt = Annotated[int, Ge(0), Le(2**31 - 1)]
# Of something in a tuning method: vocabularies, the largest, have a quarter of this.
Size = Annotated[int, Ge(1), Le(1_000_000)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]
# The published prompts have 5 to 150 positions.
PromptLength = Annotated[int, Ge(0), Le(10_000)]
# Attention is quadratic in it.
TokenLength = Annotated[int, Ge(1), Le(65_536)]
FeatureLengths = Mapping[str, TokenLength]
BatchSize = Annotated[int, Ge(1), Le(1_000_000)]
# Beams or samples of a row.
Decodes = Annotated[int, Ge(1), Le(1024)]
# T5X's optimizers go up to 0.3 for prompts; sweeps have tried a hundred.
LearningRate = Annotated[float, Gt(0), Le(1000)]
LearningRates = Sequence[LearningRate]
# What is dropped at random, or taken off a target.
Rate = Annotated[float, Ge(0), Lt(1)]
Share = Annotated[float, Ge(0), Le(1)]
# Of a folder or file that is written; an empty one would mean where one happens to be.
PathText = Annotated[str, MinLen(1)]
WeightDtype = Literal["auto", "float32", "bfloat16", "int8"]
ActivationDtype = Literal["auto", "float32", "bfloat16"]
