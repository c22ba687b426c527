# SPDX-License-Identifier: Apache-2.0
"""Decoding: strategies over one loop, free or bound to a set of labels.

`Greedy`, `Sampling` and `Beam` are frozen dataclasses, so that `jax.jit` can take them as
static arguments; `decode` is the loop that runs any of them, and a `LabelTrie` lets it
write nothing but labels.
"""

from prompt_tuning.decoding.beam import Beam
from prompt_tuning.decoding.label_trie import Constraint, LabelTrie
from prompt_tuning.decoding.loop import Strategy, decode, forced_tokens
from prompt_tuning.decoding.masks import NEG_INF, keep_topk, keep_topp
from prompt_tuning.decoding.token_by_token import Greedy, Sampling

__all__ = [
    "NEG_INF",
    "Beam",
    "Constraint",
    "Greedy",
    "LabelTrie",
    "Sampling",
    "Strategy",
    "decode",
    "forced_tokens",
    "keep_topk",
    "keep_topp",
]
