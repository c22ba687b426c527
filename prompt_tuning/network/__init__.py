# SPDX-License-Identifier: Apache-2.0
"""The T5 network, its virtual tokens, and the loss and answers it gives."""
