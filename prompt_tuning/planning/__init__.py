# SPDX-License-Identifier: Apache-2.0
"""What a step needs on chips that need not be there: memory, traffic, FLOPs."""
