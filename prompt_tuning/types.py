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
from typing import Any

import jax

Array = jax.Array
DType = Any
Shape = Sequence[int]
PyTree = Any
Params = Mapping[str, Any]
Batch = Mapping[str, Array]
# An initialiser in Flax's form: (key, shape, dtype) -> array.
Initializer = Callable[..., Array]
