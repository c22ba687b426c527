# SPDX-License-Identifier: Apache-2.0
"""Writes pairs of sentences of three domains for the experiment on domain shift.

News (MRPC), questions (QQP) and copied passages (PAN), each to be tuned on and to be
measured on, as TSV files with the columns `sentence1`, `sentence2` and `label`, which is
`different` or `same` in all of them:

  python paraphrase_domains.py --data DIR --output DIR

`--data` is the folder that prepare.py reads. Both labels are drawn equally often, by the
hashes of the pairs: what the domains differ in are texts and not shares of labels. No
sentence of a validation or test file stands in another split of any domain.
"""

import hashlib
import sys

import domain_files
from leaks import normalise
from sources import read_mrpc, read_pan
from suites import read_qqp

# Of each domain who reads it, and what its training and its test rows are called.
DOMAINS = {
    "mrpc": (read_mrpc, "train", "test"),
    "qqp": (read_qqp, "train", "dev"),
    "pan": (read_pan, "train", "test"),
}
LABELS = ("different", "same")
COLUMNS = ("sentence1", "sentence2", "label")
# A training pair of so many hundredths of all hashes is one of validation.
VALIDATION_SHARE = 10
# Words of both sentences; a third of PAN's pairs are longer.
LONGEST_PAIR = 75


def digest(row):
    """Returns a number that depends on a pair's two texts alone."""
    return int(hashlib.sha1("\t".join(row[:2]).encode()).hexdigest(), 16)


def short(rows):
    """Returns (first, second, label) of the pairs that are no longer than LONGEST_PAIR."""
    found = ((row.text, row.second, row.label) for row in rows)
    return [row for row in found if len(" ".join(row[:2]).split()) <= LONGEST_PAIR]


def apart(domains):
    """Cuts validation parts off, and drops pairs of which another split knows a sentence.

    Args:
      domains: (training rows, test rows) by domain.

    Returns:
      A dict of the rows by (domain, split), and the number of those that were dropped.
    """
    found, seen, dropped = {}, set(), 0
    training = {domain: ([], []) for domain in domains}
    for domain, (rows, _) in domains.items():
        for row in rows:
            training[domain][digest(row) % 100 >= VALIDATION_SHARE].append(row)
    # Test pairs come first and are kept: training is what has rows to spare.
    splits = {
        "test": {domain: rows for domain, (_, rows) in domains.items()},
        "validation": {domain: rows for domain, (rows, _) in training.items()},
        "train": {domain: rows for domain, (_, rows) in training.items()},
    }
    for split, parts in splits.items():
        own = set()
        for domain, rows in parts.items():
            kept = []
            for row in rows:
                keys = {normalise(text) for text in row[:2]}
                if keys & seen:
                    dropped += 1
                    continue
                own |= keys
                kept.append(row)
            found[domain, split] = kept
        seen |= own
    return found, dropped


def main(arguments=None):
    """Writes DOMAIN_{train,validation,test}.tsv."""
    options = domain_files.parse(
        __doc__, "--data", "folder of the data sets", arguments
    )
    found, dropped = apart(
        {
            name: tuple(short(read(options.data, part)) for part in parts)
            for name, (read, *parts) in DOMAINS.items()
        }
    )
    print(f"{dropped} pairs left out: one of their sentences is in another split")
    for (domain, split), rows in found.items():
        count = options.rows if split == "test" else len(rows)
        drawn = domain_files.draw(set(rows), LABELS, count, digest)
        path = options.output / f"{domain}_{split}.tsv"
        domain_files.write(path, COLUMNS, drawn)
        print(f"{path.name}: {len(drawn)} of {len(rows)} pairs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
