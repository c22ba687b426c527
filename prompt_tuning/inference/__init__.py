# SPDX-License-Identifier: Apache-2.0
"""Answers and metrics from a frozen model and its prompts."""
