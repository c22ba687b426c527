# SPDX-License-Identifier: Apache-2.0
"""What the project writes to disk: base models, prompts, and states of training."""
