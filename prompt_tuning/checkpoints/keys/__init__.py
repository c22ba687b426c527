# SPDX-License-Identifier: Apache-2.0
"""Names of parameters in every format, as data: one table a file."""
