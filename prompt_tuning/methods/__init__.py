# SPDX-License-Identifier: Apache-2.0
"""What each tuning method moves, and how prompts start."""
