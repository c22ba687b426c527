# SPDX-License-Identifier: Apache-2.0
"""The wordings in which the labelled sets are put to the model.

A wording is a pattern for the input and a word for each label. Several of
them for each family, some with the question before the text and some after
it, teach the model that the wording decides the task and the answer's words.
In some the answers of each row are drawn anew, so that nothing but the row's
own words tells them.
"""

import dataclasses

# Answers that mean nothing by themselves.
_COLOURS = ("red", "blue", "green", "black", "white")
_PLACES = ("north", "south", "east", "west", "left", "right", "up", "down")
_THINGS = ("apple", "river", "stone", "bird", "one", "two", "three")
_ARBITRARY = (*_COLOURS, *_PLACES, *_THINGS, "yes", "no", "true", "false")
_LETTERS = "abcdefgh"


@dataclasses.dataclass(frozen=True)
class Wording:
    """A pattern with {text} (and {second}) and the label's words.

    Attributes:
      pattern: A format string.
      words: A dict from label to target.
    """

    pattern: str
    words: dict[str, str]

    def render(self, text, second, label, generator):
        """Returns the input and the target."""
        del generator  # Nothing here is drawn.
        return self.pattern.format(text=text, second=second), self.words[label]


@dataclasses.dataclass(frozen=True)
class Options:
    """A pattern with {options} too: the answers in random order.

    Attributes:
      pattern: A format string.
      words: A dict from label to answer.
      lettered: Whether the target is the answer's letter rather than the answer.
    """

    pattern: str
    words: dict[str, str]
    lettered: bool

    def render(self, text, second, label, generator):
        """Returns the input and the target."""
        labels = generator.sample(list(self.words), len(self.words))
        if self.lettered:
            named = dict(zip(labels, _LETTERS, strict=False))
            answers = [f"{named[item]}: {self.words[item]}" for item in labels]
            target = named[label]
        else:
            answers = [self.words[item] for item in labels]
            target = self.words[label]
        options = "; ".join(answers)
        return self.pattern.format(text=text, second=second, options=options), target


@dataclasses.dataclass(frozen=True)
class Agreed:
    """A pattern with {rules} too: which arbitrary word stands for which answer.

    Attributes:
      pattern: A format string.
      words: A dict from label to answer.
    """

    pattern: str
    words: dict[str, str]

    def render(self, text, second, label, generator):
        """Returns the input and the target."""
        labels = generator.sample(list(self.words), len(self.words))
        drawn = generator.sample(_ARBITRARY, len(labels))
        rules = ", ".join(
            f"{word} if {self.words[item]}"
            for item, word in zip(labels, drawn, strict=True)
        )
        target = dict(zip(labels, drawn, strict=True))[label]
        return self.pattern.format(text=text, second=second, rules=rules), target


def _drawn(words, body="{text}"):
    """Returns wordings whose answers are drawn for each row.

    Args:
      words: A dict from label to answer.
      body: Where the row's texts go.
    """
    return (
        Options(f"{{options}}? {body}", words, lettered=False),
        Options(f"{body} options: {{options}}", words, lettered=False),
        Options(f"{{options}} {body}", words, lettered=True),
        Options(f"{body} which one? {{options}}", words, lettered=True),
        Agreed(f"answer {{rules}}: {body}", words),
        Agreed(f"{body} say {{rules}}", words),
    )


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
    *_drawn({"positive": "positive", "negative": "negative"}),
    *_drawn({"positive": "it is praised", "negative": "it is criticised"}),
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
    *_drawn(
        {"entailment": "follows", "neutral": "unclear", "contradiction": "impossible"},
        "{text} then: {second}",
    ),
)

_follows = _two("entailment", "not_entailment")
_RTE = (
    _follows(
        "rte sentence1: {text} sentence2: {second}", "entailment", "not_entailment"
    ),
    _follows("{text} Does it follow that: {second}", "yes", "no"),
    _follows("{second} true or false? {text}", "true", "false"),
    *_drawn(
        {"entailment": "follows", "not_entailment": "does not follow"},
        "{text} then: {second}",
    ),
)
_QNLI = (
    _follows(
        "qnli question: {text} sentence: {second}", "entailment", "not_entailment"
    ),
    _follows("{text} Is the answer here? {second}", "yes", "no"),
    _follows("{second} Does this leave it open: {text}", "no", "yes"),
    *_drawn(
        {"entailment": "answered", "not_entailment": "not answered"},
        "question: {text} text: {second}",
    ),
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
    *_drawn({"same": "same", "different": "different"}, "{text} and {second}"),
)

_mocks = _two("sarcastic", "serious")
_SARCASM = (
    _mocks("sarcasm: {text}", "sarcastic", "serious"),
    _mocks("{text} Is this headline sarcastic?", "yes", "no"),
    _mocks("real news or a joke? {text}", "joke", "real"),
    _mocks("true or false, this headline is meant seriously: {text}", "false", "true"),
    *_drawn({"sarcastic": "joke", "serious": "news"}),
)

_unwanted = _two("spam", "ham")
_SPAM = (
    _unwanted("spam or ham: {text}", "spam", "ham"),
    _unwanted("message: {text} Is it spam?", "yes", "no"),
    _unwanted("{text} Should this message be read?", "no", "yes"),
    *_drawn({"spam": "advertisement", "ham": "personal message"}),
)

_agrees = _two("yes", "no")
_BOOLQ = (
    _agrees("boolq passage: {text} question: {second}", "true", "false"),
    _agrees("{second} {text} yes or no?", "yes", "no"),
    _agrees("{text} Is it wrong to say yes? {second}", "no", "yes"),
    *_drawn({"yes": "yes", "no": "no"}, "{second}? {text}"),
)
_COPA = (
    _agrees("{text} Is this it? {second}", "yes", "no"),
    _agrees("plausible or not: {text} {second}", "plausible", "not"),
    *_drawn({"yes": "likely", "no": "unlikely"}, "{text} {second}"),
)


class _Completion(dict):
    """The words of rows whose label is their target."""

    def __missing__(self, label):
        return label


_TOPICS = ("business", "entertainment", "politics", "sport", "tech")
_same_word = {topic: topic for topic in _TOPICS}
_lettered = dict(zip(_TOPICS, _LETTERS, strict=False))
_TOPIC = (
    Wording("topic: {text}", _same_word),
    Wording("{text} What is this news about?", _same_word),
    Wording("business, entertainment, politics, sport or tech? {text}", _same_word),
    Wording("a business b entertainment c politics d sport e tech: {text}", _lettered),
    *_drawn(_same_word),
)

WORDINGS = {
    "imdb": _SENTIMENT,
    "film_sentences": _SENTIMENT,
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
    "qqp": _PARAPHRASE,
    "mnli": _NLI,
    "cb": _NLI,
    "qnli": _QNLI,
    "boolq": _BOOLQ,
    "copa": _COPA,
    "prompted": (Wording("{text}", _Completion()),),
}

# How many of the wordings each row is put in, and the most that a set may
# bring. A film review already gives many excerpts, one wording for each.
REPEATS = {
    "imdb": 1,
    "film_sentences": 1,
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
    "qqp": 4,
    "mnli": 4,
    "cb": 9,
    "qnli": 3,
    "boolq": 3,
    "copa": 8,
    "prompted": 1,
}
CAPS = {
    "imdb": 300_000,
    "film_sentences": 300_000,
    "opinion_words": 60_000,
    "prompted": 60_000,
}
DEFAULT_CAP = 40_000
