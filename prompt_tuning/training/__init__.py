# SPDX-License-Identifier: Apache-2.0
"""The training loop and all that a run keeps."""
