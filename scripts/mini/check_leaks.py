# SPDX-License-Identifier: Apache-2.0
"""Checks that no row of an evaluated task occurs in the pretraining arrays.

The models are later measured on the tasks of `probe_tasks.py`, so neither
their text nor their labelled examples nor the sentences whose vectors they
match may hold a row of them. Run it on the folder that `prepare.py` wrote:

  python check_leaks.py --output DIR --data DIR --packages DIR

The exit status is 1 when a row was found; `leaks.py` says what counts as found.
"""

import argparse
import itertools
import pathlib
import sys

import numpy as np
import sentencepiece
from leaks import LeakIndex
from probe_tasks import read_probe_tasks

EOS = 1
# What decoding writes for characters outside the vocabulary, and letters for it: without
# them a row that ends in such characters would be found in every text it begins like.
UNKNOWN, UNKNOWN_LETTERS = "\u2047", "unknownpiece"


def _decode(processor, flat, offsets):
    """Returns the text of each slice of a flat array of ids."""
    limit = processor.get_piece_size()
    pieces = []
    for begin, end in itertools.pairwise(offsets):
        ids = flat[begin:end]
        pieces.append(ids[(ids != EOS) & (ids < limit)].tolist())
    return [text.replace(UNKNOWN, UNKNOWN_LETTERS) for text in processor.decode(pieces)]


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
    path = output / "sentences.npz"
    if path.exists():
        arrays = np.load(path)
        yield path.name, _decode(processor, arrays["ids"], arrays["offsets"])


def main(arguments=None):
    """Runs the check.

    Args:
      arguments: The command line, or None for the process's own.

    Returns:
      The exit status.
    """
    parser = argparse.ArgumentParser(
        description="Looks for evaluated rows in the pretraining arrays."
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        required=True,
        help="folder that prepare.py wrote",
    )
    parser.add_argument(
        "--data",
        type=pathlib.Path,
        required=True,
        help="folder of plain files that prepare.py read",
    )
    parser.add_argument(
        "--packages",
        type=pathlib.Path,
        required=True,
        help="folder of archives that prepare.py read",
    )
    options = parser.parse_args(arguments)
    _, evaluated = read_probe_tasks(options.data, options.packages)
    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(options.output / "spiece.model")
    )
    rows = []
    for name, texts in evaluated.items():
        print(f"{name}: {len(texts)} rows")
        # A row with characters outside the vocabulary would decode differently.
        ids = processor.encode(texts)
        rows += texts
        rows += [t.replace(UNKNOWN, UNKNOWN_LETTERS) for t in processor.decode(ids)]
    index = LeakIndex(rows)
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
