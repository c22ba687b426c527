# SPDX-License-Identifier: Apache-2.0
"""Rows of tasks become batches of arrays.

Empty on purpose: `template`, `local_task` and `buckets` need no TensorFlow.
"""
