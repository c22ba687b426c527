# SPDX-License-Identifier: Apache-2.0
"""Meshes, axis rules and chips: where arrays lie."""
