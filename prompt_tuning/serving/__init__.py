# SPDX-License-Identifier: Apache-2.0
"""Answers over HTTP."""
