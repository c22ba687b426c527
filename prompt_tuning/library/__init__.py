# SPDX-License-Identifier: Apache-2.0
"""The front door for Python: load, tune, predict, save, share; see docs/library.md."""
