# SPDX-License-Identifier: Apache-2.0
"""What the scripts share that write one task's rows of several domains."""

import argparse
import csv
import pathlib


def parse(doc, source, source_help, arguments=None):
    """Reads a command line: the folder of a ``source``, the output, and a number of rows."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument(source, type=pathlib.Path, required=True, help=source_help)
    parser.add_argument(
        "--output", type=pathlib.Path, required=True, help="folder of the TSV files"
    )
    parser.add_argument(
        "--rows", type=int, default=600, help="at most so many test rows of a domain"
    )
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    return options


def draw(rows, labels, count, digest):
    """Returns at most ``count`` rows, as many of each label in turn, by their digests.

    A row's label is its last value.
    """
    hashed = sorted(rows, key=digest)
    parts = [[row for row in hashed if row[-1] == label] for label in labels]
    each = min(count // len(parts), *map(len, parts))
    return [row for group in zip(*(part[:each] for part in parts)) for row in group]


def write(path, columns, rows):
    """Writes rows below the names of their columns."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(columns)
        writer.writerows(rows)
