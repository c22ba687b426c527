# SPDX-License-Identifier: Apache-2.0
"""A run from its plan to its files: what the commands share."""
