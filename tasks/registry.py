# SPDX-License-Identifier: Apache-2.0
"""Importing this module registers every task of the package."""

from prompt_tuning.tasks import glue, rotten_tomatoes, super_glue

__all__ = ["glue", "rotten_tomatoes", "super_glue"]
