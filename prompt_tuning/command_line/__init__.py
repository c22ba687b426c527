# SPDX-License-Identifier: Apache-2.0
"""What the command line is made of: its table of commands, gin files as data, help."""
