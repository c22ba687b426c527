# SPDX-License-Identifier: Apache-2.0
"""Finds given rows in many texts.

Rows and texts are compared after case folding with everything but letters and
digits removed, so spacing and quotation marks make no difference. A row is
looked for as a whole text, and, where it has six words or more, anywhere
inside one.
"""

import re

import numpy as np

MINIMUM_WORDS = 6
WINDOW = 16
_MULTIPLIER = 0x9E3779B97F4A7C15
_TABLE_BITS = 22
_BATCH_BYTES = 4_000_000


def normalise(text):
    """Returns the text's letters and digits, case folded."""
    return re.sub(r"[\W_]+", "", text.casefold())


def window_hashes(data):
    """Hashes every window of WINDOW bytes.

    Args:
      data: bytes.

    Returns:
      A uint64 array: entry i belongs to data[i:i + WINDOW].
    """
    hashes = np.frombuffer(data, np.uint8).astype(np.uint64) + np.uint64(1)
    multiplier = _MULTIPLIER
    width = 1
    # Two neighbouring windows make one of twice the width, so that the cost is
    # the logarithm of the width. Overflow is the modulus.
    while width < WINDOW:
        hashes = hashes[:-width] * np.uint64(multiplier) + hashes[width:]
        multiplier = multiplier * multiplier % 2**64
        width *= 2
    return hashes


class LeakIndex:
    """Finds given rows in many texts."""

    def __init__(self, rows):
        """Builds the index.

        Args:
          rows: The strings that must not occur.
        """
        self._whole = {}
        self._inside = {}
        for row in rows:
            key = normalise(row).encode()
            if not key:
                continue
            self._whole[key] = row
            words = [word for word in row.split() if normalise(word)]
            if len(words) >= MINIMUM_WORDS and len(key) >= WINDOW:
                first = int(window_hashes(key[:WINDOW])[0])
                self._inside.setdefault(first, {})[key] = row
        # Most windows fail on this table of hash prefixes; only the few that pass
        # are looked up in the dictionary.
        self._table = np.zeros(1 << _TABLE_BITS, bool)
        shift = 64 - _TABLE_BITS
        for value in self._inside:
            self._table[value >> shift] = True
        self._shift = np.uint64(shift)

    def find(self, texts):
        """Looks for the rows in texts.

        Args:
          texts: A list of strings.

        Returns:
          A list of (index of the text, row), at most one for each text.
        """
        hits = []
        batch, size, begin = [], 0, 0
        for index, text in enumerate(texts):
            key = normalise(text).encode()
            batch.append(key)
            size += len(key)
            if size >= _BATCH_BYTES or index == len(texts) - 1:
                hits += [(begin + at, row) for at, row in self._find_batch(batch)]
                batch, size, begin = [], 0, index + 1
        return hits

    def _find_batch(self, keys):
        found = {
            at: self._whole[key] for at, key in enumerate(keys) if key in self._whole
        }
        # The separator is never part of a normalised text, so no match spans two.
        data = b"\n".join(keys)
        if len(data) < WINDOW:
            return sorted(found.items())
        ends = np.cumsum([len(key) + 1 for key in keys])
        hashes = window_hashes(data)
        (places,) = np.nonzero(self._table[hashes >> self._shift])
        for place in places.tolist():
            for key, row in self._inside.get(int(hashes[place]), {}).items():
                if data.startswith(key, place):
                    at = int(np.searchsorted(ends, place, side="right"))
                    found.setdefault(at, row)
        return sorted(found.items())
