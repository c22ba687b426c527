# SPDX-License-Identifier: Apache-2.0
"""What the commands do, as functions of plain arguments: one module each."""
