# SPDX-License-Identifier: Apache-2.0
"""The gin files, installed as package data: models, methods, prompts, runs."""
