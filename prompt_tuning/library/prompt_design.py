# SPDX-License-Identifier: Apache-2.0
"""Prompts in words: the best of candidate templates and verbalizers, without training.

A template is a pattern around the columns of a row, a verbalizer the word that stands for a
label; the frozen model ranks the words. For each template the model reads every validation
row once and every word once for it, however many words there are for a label: all their
combinations follow from these scores.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning import files, prompt_names, report
from prompt_tuning.checkpoints.base_models import BaseModel
from prompt_tuning.data import label_sets
from prompt_tuning.data.label_sets import LabelNames
from prompt_tuning.data.splits import VALIDATION
from prompt_tuning.data.template import Template
from prompt_tuning.errors import UserError
from prompt_tuning.inference import prompt_view
from prompt_tuning.library import models, rows
from prompt_tuning.library.rows import TEXT, Rows
from prompt_tuning.library.tuned_prompt import TunedPrompt
from prompt_tuning.runs import baselines
from prompt_tuning.runs.baselines import HandWritten

METHOD = "prompt_design"
# One word for each label: so many ways to choose them are compared at most.
MOST_COMBINATIONS = 10_000


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A template and a word for each label, measured.

    Attributes:
      template: the inputs.
      verbalizers: the word of each label.
      accuracy: of the validation rows, in percent.
      log_likelihood: the mean log-probability of the right label among all.
    """

    template: str
    verbalizers: Mapping[str, str]
    accuracy: float
    log_likelihood: float


@dataclasses.dataclass(frozen=True)
class Design:
    """What `search` found.

    Attributes:
      prompt: the best candidate, to be saved, predicted with and served as tuned ones are.
      candidates: all, the best first.
      encoder_passes: rows that the encoder read in this search, those that its folder
        already knew left out.
      decoder_passes: words that the decoder read for them.
    """

    prompt: TunedPrompt
    candidates: Sequence[Candidate]
    encoder_passes: int
    decoder_passes: int


def search(
    base: BaseModel,
    validation: Any,
    *,
    templates: Sequence[str],
    labels: LabelNames | None = None,
    verbalizers: Mapping[str, str | Sequence[str]] | None = None,
    target_column: str = "label",
    label_scores: str = label_sets.SUM,
    name: str = "words",
    folder: files.Path | None = None,
) -> Design:
    """Measures candidates on validation rows and keeps the best.

    The best has the highest accuracy and, among equals, the highest likelihood of the
    right labels.

    Args:
      base: what `load` gave.
      validation: the rows, see `tune`.
      templates: patterns, ``{column}`` standing for a value; pairs have ``{text}``.
      labels: the answers to choose from, see `tune`.
      verbalizers: of each label its word, or several to choose from; by default its name.
      target_column: of dicts, frames and data sets, the column of the answer.
      label_scores: how words are compared, one of `label_sets.SCORES`.
      name: what the prompt is called.
      folder: keeps the scores of each template, so that a search that was interrupted, or
        is given more templates, goes on.

    Raises:
      UserError: rows, templates or words are unsound, or there are too many combinations.
    """
    vocabulary = models.vocabulary_of(base)
    labels = rows.found_labels(validation, target_column, labels)
    names = rows.label_names(labels)
    if names is None:
        raise UserError("labels is None: give the answers to choose from")
    label_sets.check_scores(label_scores, "label_scores")
    if (
        isinstance(templates, str)
        or not templates
        or len({*templates}) < len(templates)
    ):
        raise UserError("templates must be a list of different texts")
    candidates = _verbalizers(names, verbalizers)
    words = list(dict.fromkeys(word for each in candidates for word in each))
    for template in templates:
        check_template(template)
    asked = [
        rows.read(
            validation,
            VALIDATION,
            template=template,
            target_column=target_column,
            labels=labels,
        )
        for template in templates
    ]
    known = _Scores(folder, base, words)
    waiting = [
        i for i, each in enumerate(asked) if known.of(templates[i], each) is None
    ]
    compute = baselines.log_likelihoods(
        base,
        [HandWritten(templates[i], tuple(words)) for i in waiting],
        [asked[i].columns for i in waiting],
        vocabulary,
    )
    for i, scores in zip(waiting, compute, strict=True):
        known.keep(templates[i], asked[i], scores)
        report.say(
            f"template {i + 1} of {len(templates)}: {templates[i]!r} is measured"
        )
    found: list[Candidate] = []
    lengths = np.count_nonzero(label_sets.label_tokens(words, vocabulary), axis=-1)
    for template, each in zip(templates, asked, strict=True):
        scores = known.kept(template, each)
        if label_scores == label_sets.MEAN:
            scores = scores / lengths
        right = np.array([names.index(answer) for answer in each.answers])
        found += _measured(template, names, candidates, words, scores, right)
    found.sort(key=lambda one: (-one.accuracy, -one.log_likelihood))
    passes = len(waiting) * len(asked[0])
    report.say(
        f"{len(found)} candidates by {passes} passes of the encoder and "
        f"{passes * len(words)} of the decoder; the best is right in "
        f"{found[0].accuracy:.1f} %"
    )
    best = found[0]
    card = {
        "method": METHOD,
        "length": 0,
        "width": base.config.emb_dim,
        "template": best.template,
        "labels": names,
        "verbalizers": [best.verbalizers[label] for label in names],
        **({} if label_scores == label_sets.SUM else {"label_scores": label_scores}),
        "vocabulary": vocabulary.name,
        "vocabulary_fingerprint": vocabulary.fingerprint,
        "base_model": base.identity,
        "recipe": {"templates": len(templates), "candidates": len(found)},
        "metric": {"accuracy": best.accuracy, "log_likelihood": best.log_likelihood},
        "versions": report.versions(),
    }
    nothing = np.zeros((0, base.config.emb_dim), np.float32)
    prompt = TunedPrompt(prompt_names.check(name), nothing, card)
    return Design(prompt, tuple(found), passes, passes * len(words))


def check_template(template: str) -> None:
    """Refuses a template of words that leaves room for virtual tokens.

    Raises:
      UserError: it does, or is no template.
    """
    if any(not isinstance(part, tuple) for part in Template.parse(template).parts):
        raise UserError(
            f"template {template!r} has a place for a soft prompt: leave it out"
        )


def few_shot(
    template: str, examples: Sequence[tuple[str, str]], between: str = " "
) -> str:
    """A template with answered examples before its own text.

    >>> few_shot("{text} It was", [("A {fine} film.", "great")])
    'A {{fine}} film. It was great {text} It was'

    Args:
      template: a pattern around ``{text}``.
      examples: texts, and the words that answer them.
      between: what stands between examples, and before the text.

    Raises:
      UserError: the template has other columns.
    """
    parsed = Template.parse(template)
    if parsed.columns != (TEXT,):
        raise UserError(f"template {template!r} must have the one column {{{TEXT}}}")
    shown = []
    for text, answer in examples:
        (written,) = parsed.render({TEXT: text})
        shown.append(f"{written} {answer}".replace("{", "{{").replace("}", "}}"))
    return between.join([*shown, template])


def nearest_words(prompt: TunedPrompt, base: BaseModel) -> str:
    """The text whose pieces lie nearest to a soft prompt's rows, by cosine.

    With braces doubled, so that it can stand in a template.

    Raises:
      UserError: the prompt is of another width than the model.
    """
    vocabulary = models.vocabulary_of(base)
    table = np.asarray(base.table, np.float32)[: vocabulary.vocab_size]
    if prompt.array.shape[1] != table.shape[1]:
        raise UserError(
            f"{prompt.name} has width {prompt.array.shape[1]}, the model {table.shape[1]}: "
            "give the model that it was tuned on"
        )
    ids, _ = prompt_view.nearest_tokens(prompt.array, table, 1)
    text = vocabulary.decode(ids[:, 0].tolist())
    return text.replace("{", "{{").replace("}", "}}")


def _verbalizers(
    names: Sequence[str], given: Mapping[str, str | Sequence[str]] | None
) -> list[tuple[str, ...]]:
    """The words to choose from of each label.

    Raises:
      UserError: a label has none, or there are too many ways to choose.
    """
    given = {label: label for label in names} if given is None else given
    if not isinstance(given, Mapping) or set(given) != set(names):
        raise UserError(f"verbalizers must have the words of {', '.join(names)}")
    found = []
    for label in names:
        own = [given[label]] if isinstance(given[label], str) else list(given[label])
        sound = all(isinstance(word, str) and word.strip() for word in own)
        if not own or not sound or len(set(own)) < len(own):
            raise UserError(
                f"verbalizers of {label!r} are {own!r}: give different words, one or more"
            )
        found.append(tuple(own))
    count = math.prod(map(len, found))
    if count > MOST_COMBINATIONS:
        raise UserError(
            f"there are {count} ways to choose the words, more than {MOST_COMBINATIONS}: "
            "give fewer for a label"
        )
    if not list(_choices(found)):
        raise UserError("the same word stands for several labels: give each its own")
    return found


def _choices(candidates: Sequence[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """The ways to choose a word of each label's, each its own."""
    for chosen in itertools.product(*candidates):
        if len(set(chosen)) == len(chosen):
            yield chosen


def _measured(
    template: str,
    names: Sequence[str],
    candidates: Sequence[tuple[str, ...]],
    words: Sequence[str],
    scores: np.ndarray,  # [N, W]
    right: np.ndarray,  # [N]
) -> Iterator[Candidate]:
    """The candidates of one template."""
    column = {word: number for number, word in enumerate(words)}
    for chosen in _choices(candidates):
        own = scores[:, [column[word] for word in chosen]]
        total = np.logaddexp.reduce(own, axis=1)
        yield Candidate(
            template,
            dict(zip(names, chosen, strict=True)),
            100 * float(np.mean(own.argmax(axis=1) == right)),
            float(np.mean(own[np.arange(len(own)), right] - total)),
        )


class _Scores:
    """Log-likelihoods [N, W] of words by template, in memory and in a folder."""

    def __init__(
        self, folder: files.Path | None, base: BaseModel, words: Sequence[str]
    ):
        self._folder = None if folder is None else pathlib.Path(folder)
        self._common = [
            base.fingerprint,
            models.vocabulary_of(base).fingerprint,
            *words,
        ]
        self._found: dict[str, np.ndarray] = {}

    def of(self, template: str, asked: Rows) -> np.ndarray | None:
        """Those that are known."""
        key = self._key(template, asked)
        path = self._path(key)
        if key not in self._found and path is not None and path.is_file():
            with files.reading(path, "the scores of a template") as file:
                self._found[key] = file.get_tensor("scores")
        return self._found.get(key)

    def keep(self, template: str, asked: Rows, scores: np.ndarray) -> None:
        """Remembers those of a template."""
        key = self._key(template, asked)
        self._found[key] = scores
        if (path := self._path(key)) is not None:
            files.write(path, {"scores": scores}, {"template": template})

    def kept(self, template: str, asked: Rows) -> np.ndarray:  # [N, W]
        """Those that `of` found or `keep` was given."""
        return self._found[self._key(template, asked)]

    def _key(self, template: str, asked: Rows) -> str:
        """What tells these scores from others."""
        said = [self._common, template, [dict(row) for row in asked.columns]]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]

    def _path(self, key: str) -> pathlib.Path | None:
        return None if self._folder is None else self._folder / f"{key}.safetensors"
