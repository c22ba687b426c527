# SPDX-License-Identifier: Apache-2.0
"""Prompt tuning: the rows of the prompt move, and nothing else.

Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning"
(https://arxiv.org/abs/2104.08691).
"""

import dataclasses

from prompt_tuning.methods.method import Method


@dataclasses.dataclass(frozen=True)
class PromptTuning(Method, kind="prompt_tuning"):
    """P rows of H numbers."""
