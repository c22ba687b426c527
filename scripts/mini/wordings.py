# SPDX-License-Identifier: Apache-2.0
"""The wordings in which the labelled sets are put to the model.

A wording is a pattern for the input and a word for each label. Several of
them for each family, some with the question before the text and some after
it, teach the model that the wording decides the task and the answer's words.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Wording:
    """A pattern with {text} (and {second}) and the label's words.

    Attributes:
      pattern: A format string.
      words: A dict from label to target.
    """

    pattern: str
    words: dict[str, str]

    def render(self, text, second, label):
        """Returns the input and the target."""
        return self.pattern.format(text=text, second=second), self.words[label]


def _two(first, second):
    """Returns a function that builds wordings of a two-label family."""

    def build(pattern, first_word, second_word):
        return Wording(pattern, {first: first_word, second: second_word})

    return build


_polar = _two("positive", "negative")
_SENTIMENT = (
    _polar("sentiment: {text}", "positive", "negative"),
    _polar("{text} sentiment:", "positive", "negative"),
    _polar("positive or negative? {text}", "positive", "negative"),
    _polar("Text: {text} Is this text positive or negative?", "positive", "negative"),
    _polar("good or bad: {text}", "good", "bad"),
    _polar("{text} All in all, was it good or bad?", "good", "bad"),
    _polar("{text} In one word, it was", "great", "terrible"),
    _polar("great or terrible? {text}", "great", "terrible"),
    _polar("Does the writer like it? {text}", "yes", "no"),
    # The answer is reversed here: the question has to be read.
    _polar("{text} Is the writer unhappy with it?", "no", "yes"),
    _polar("true or false, this is praise: {text}", "true", "false"),
)


def _entails(pattern, *words):
    """Returns a wording of the three-label family."""
    labels = ("entailment", "neutral", "contradiction")
    return Wording(pattern, dict(zip(labels, words, strict=True)))


_NLI = (
    _entails(
        "nli premise: {text} hypothesis: {second}",
        "entailment",
        "neutral",
        "contradiction",
    ),
    _entails("{text} Is it true that: {second}", "yes", "maybe", "no"),
    _entails("Given: {text} Then: {second}", "true", "unknown", "false"),
    _entails(
        "{second} What does the following say of this? {text}",
        "entailment",
        "neutral",
        "contradiction",
    ),
)

_follows = _two("entailment", "not_entailment")
_RTE = (
    _follows(
        "rte sentence1: {text} sentence2: {second}", "entailment", "not_entailment"
    ),
    _follows("{text} Does it follow that: {second}", "yes", "no"),
    _follows("{second} true or false? {text}", "true", "false"),
)

_same = _two("same", "different")
_PARAPHRASE = (
    _same(
        "paraphrase sentence1: {text} sentence2: {second}",
        "equivalent",
        "not_equivalent",
    ),
    _same("{text} Does this say the same? {second}", "yes", "no"),
    _same("same or different: {text} and {second}", "same", "different"),
    _same("{text} {second} Do the two differ in meaning?", "no", "yes"),
)

_mocks = _two("sarcastic", "serious")
_SARCASM = (
    _mocks("sarcasm: {text}", "sarcastic", "serious"),
    _mocks("{text} Is this headline sarcastic?", "yes", "no"),
    _mocks("real news or a joke? {text}", "joke", "real"),
    _mocks("true or false, this headline is meant seriously: {text}", "false", "true"),
)

_unwanted = _two("spam", "ham")
_SPAM = (
    _unwanted("spam or ham: {text}", "spam", "ham"),
    _unwanted("message: {text} Is it spam?", "yes", "no"),
    _unwanted("{text} Should this message be read?", "no", "yes"),
)

_TOPICS = ("business", "entertainment", "politics", "sport", "tech")
_same_word = {topic: topic for topic in _TOPICS}
_LETTERS = dict(zip(_TOPICS, "abcde", strict=True))
_TOPIC = (
    Wording("topic: {text}", _same_word),
    Wording("{text} What is this news about?", _same_word),
    Wording("business, entertainment, politics, sport or tech? {text}", _same_word),
    Wording("a business b entertainment c politics d sport e tech: {text}", _LETTERS),
)

WORDINGS = {
    "imdb": _SENTIMENT,
    "vader_tweets": _SENTIMENT,
    "vader_amazon": _SENTIMENT,
    "vader_nyt": _SENTIMENT,
    "customer_reviews": _SENTIMENT,
    "opinion_words": _SENTIMENT,
    "snli": _NLI,
    "rte": _RTE,
    "mrpc": _PARAPHRASE,
    "pan": _PARAPHRASE,
    "sarcasm": _SARCASM,
    "spam": _SPAM,
    "bbc": _TOPIC,
}

# How many of the wordings each row is put in, and the most that a set may
# bring. A film review already gives many excerpts, one wording for each.
REPEATS = {
    "imdb": 1,
    "vader_tweets": 5,
    "vader_amazon": 4,
    "vader_nyt": 4,
    "customer_reviews": 5,
    "opinion_words": 1,
    "snli": 1,
    "rte": 3,
    "mrpc": 4,
    "pan": 3,
    "sarcasm": 2,
    "spam": 3,
    "bbc": 3,
}
CAPS = {"imdb": 300_000, "opinion_words": 60_000}
DEFAULT_CAP = 40_000
