# SPDX-License-Identifier: Apache-2.0
"""Chooses the texts whose sentence vectors a teacher computes."""

import json
import random

from labelled import PLAIN_STYLE_SHARE, SEED, is_held_out, plain_style, split_sentences
from sources import read_movie_reviews

FILM_FILE = "film_sentences.jsonl"
SHORTEST, LONGEST = 4, 45
COUNT = 400_000
# Labelled sets hold questions, captions, headlines and messages, prose holds none.
LABELLED_SHARE = 0.5
# Words by themselves and fragments that a pattern made tell a teacher nothing new.
UNUSED_TASKS = ("opinion_words", "prompted", "imdb")


def choose_sentences(runs, rows):
    """Chooses distinct texts.

    Args:
      runs: Training runs of prose, each (source, paragraphs).
      rows: Labelled rows; those held out are left out.

    Returns:
      A list of strings in random order, so that any first part is a fair sample.
    """
    generator = random.Random(SEED)
    prose = [
        sentence
        for _, paragraphs in runs
        for paragraph in paragraphs
        for sentence in split_sentences(paragraph)
    ]
    texts = [
        text
        for row in rows
        if row.task not in UNUSED_TASKS and not is_held_out(row.key)
        for text in (row.text, row.second)
    ]
    chosen = []
    for group, share in ((prose, 1 - LABELLED_SHARE), (texts, LABELLED_SHARE)):
        fitting = sorted({t for t in group if SHORTEST <= len(t.split()) <= LONGEST})
        chosen += generator.sample(fitting, min(len(fitting), int(share * COUNT)))
    generator.shuffle(chosen)
    return [
        plain_style(text) if generator.random() < PLAIN_STYLE_SHARE else text
        for text in chosen
    ]


def film_sentences(packages):
    """Cuts film reviews into sentences; those of held-out reviews are left out.

    Args:
      packages: The folder of archives.

    Returns:
      A list of (sentence, label of its review) in random order, no sentence twice.
    """
    found = {
        " ".join(sentence.split()): label
        for review, label, source in read_movie_reviews(packages)
        if source == "imdb" and not is_held_out(review)
        for sentence in split_sentences(review)
        if SHORTEST <= len(sentence.split()) <= LONGEST
    }
    pairs = sorted(found.items())
    random.Random(SEED).shuffle(pairs)
    return pairs


def write_film_sentences(pairs, folder):
    """Writes one sentence a line, as JSON with the label of its review."""
    lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs]
    (folder / FILM_FILE).write_text("".join(lines), encoding="utf-8")


def read_film_sentences(folder):
    """Reads what `write_film_sentences` wrote."""
    rows = map(json.loads, (folder / FILM_FILE).read_text("utf-8").splitlines())
    return [(row["text"], row["label"]) for row in rows]


def write_sentences(sentences, path):
    """Writes one text a line."""
    lines = [" ".join(sentence.split()) + "\n" for sentence in sentences]
    path.write_text("".join(lines), encoding="utf-8")
