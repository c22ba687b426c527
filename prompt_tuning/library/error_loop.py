# SPDX-License-Identifier: Apache-2.0
"""From errors to the next prompt in words: score, look at what costs most, propose, repeat.

A template is asked on rows to look at; the errors that cost most are shown, and whoever
proposes makes templates of them. These are compared on validation rows, which nobody
looks at, and the best takes the place of the template that it beats. Nothing is tuned:
the frozen model is asked, and how often it was is counted.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning import decoding, files, prompt_names, report
from prompt_tuning.checkpoints.base_models import BaseModel
from prompt_tuning.data import label_sets, reach, text_metrics
from prompt_tuning.data.label_sets import LabelNames
from prompt_tuning.data.splits import TRAIN, VALIDATION
from prompt_tuning.data.template import Template
from prompt_tuning.errors import UserError
from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.store import PromptStore
from prompt_tuning.library import checks, models, prompt_design, rows
from prompt_tuning.library.rows import Rows
from prompt_tuning.library.tuned_prompt import TunedPrompt

METHOD = "error_loop"
ACCURACY, LOG_LIKELIHOOD, ROUGE = "accuracy", "log_likelihood", "rougeLsum"
BATCH_SIZE = 64
# A probability that a float cannot tell from none costs this: -log of it.
LEAST = 1e-30


@dataclasses.dataclass(frozen=True)
class Error:
    """A row that was answered wrong.

    Attributes:
      row: its number among the rows that were looked at, from 0.
      columns: its texts.
      target: the right answer.
      answer: what was answered.
      cost: minus the log-probability of the right label or, of free text, what ROUGE-L
        lacks to 100.
    """

    row: int
    columns: Mapping[str, str]
    target: str
    answer: str
    cost: float


@dataclasses.dataclass(frozen=True)
class Score:
    """A template on rows.

    Attributes:
      template: the inputs.
      metrics: of label sets ``accuracy`` in percent and the mean ``log_likelihood`` of
        the right label; of free text ``accuracy`` (the very answer) and ROUGE. The best
        template has the highest `value`.
      answers: of each row.
      costs: of each row, see `Error`.
    """

    template: str
    metrics: Mapping[str, float]
    answers: Sequence[str]
    costs: Sequence[float]

    @property
    def value(self) -> tuple[float, float]:
        """What templates are compared by: the higher the better."""
        last = LOG_LIKELIHOOD if LOG_LIKELIHOOD in self.metrics else ACCURACY
        first = ACCURACY if last == LOG_LIKELIHOOD else ROUGE
        return self.metrics[first], self.metrics[last]


@dataclasses.dataclass(frozen=True)
class Round:
    """A turn of the loop.

    Attributes:
      errors: those that were shown, the costliest first.
      proposed: the templates on validation rows, the best first.
      kept: whether the best took the place of the one before.
    """

    errors: Sequence[Error]
    proposed: Sequence[Score]
    kept: bool


@dataclasses.dataclass(frozen=True)
class Refined:
    """What `refine` ends with.

    Attributes:
      prompt: the best template as a prompt, to be saved, predicted with and served.
      before: the first template on validation rows.
      after: the best one.
      rounds: what happened between them.
      encoder_passes: rows that the encoder read in this call; what its folder knew
        already is left out.
      decoder_passes: labels that the decoder read, or answers that it wrote.
    """

    prompt: TunedPrompt
    before: Score
    after: Score
    rounds: Sequence[Round]
    encoder_passes: int
    decoder_passes: int

    def record(self) -> dict[str, Any]:
        """The report of before and after, as JSON."""
        metrics = lambda one: {"template": one.template, "metrics": dict(one.metrics)}
        return {
            "before": metrics(self.before),
            "after": metrics(self.after),
            "gain": {
                name: self.after.metrics[name] - value
                for name, value in self.before.metrics.items()
            },
            "rounds": [
                {
                    "errors": [dataclasses.asdict(error) for error in each.errors],
                    "proposed": [metrics(one) for one in each.proposed],
                    "kept": each.kept,
                }
                for each in self.rounds
            ],
            "encoder_passes": self.encoder_passes,
            "decoder_passes": self.decoder_passes,
        }


# From the template at hand and the costliest errors to templates that may be better.
Propose = Callable[[str, Sequence[Error]], Sequence[str]]


def worked_examples(
    pattern: str, words: Mapping[str, str] | None = None, between: str = " "
) -> Propose:
    """Proposes to show an error with its right answer before the text.

    >>> error = Error(0, {"text": "A fine film."}, "good", "bad", 1.2)
    >>> worked_examples("{text} It was", {"good": "great"})("{text} It was", [error])
    ['A fine film. It was great {text} It was']

    Args:
      pattern: how an example is written, a template without examples.
      words: what is said for an answer, where that is another word.
      between: what stands between an example and what follows.
    """
    parsed = Template.parse(pattern)

    def propose(template: str, errors: Sequence[Error]) -> list[str]:
        found = []
        for error in errors:
            said = (words or {}).get(error.target, error.target)
            example = "".join([*parsed.render(error.columns), f" {said}"])
            example = example.replace("{", "{{").replace("}", "}}") + between
            if example not in template:
                found.append(example + template)
        return found

    return propose


def refine(
    base: BaseModel,
    train: Any,
    validation: Any,
    *,
    template: str,
    labels: LabelNames | None = None,
    verbalizers: Mapping[str, str] | None = None,
    propose: Propose | None = None,
    rounds: int = 3,
    shown: int = 5,
    target_column: str = "label",
    max_answer_length: int = 32,
    name: str = "words",
    folder: files.Path | None = None,
) -> Refined:
    """Betters a template by its own errors, as long as that helps.

    Args:
      base: what `load` gave.
      train: the rows whose errors are looked at, see `tune`.
      validation: those that templates are compared on.
      template: the first one, ``{column}`` standing for a value.
      labels: the answers to choose from; None writes free text.
      verbalizers: the word that stands for each label; by default its name.
      propose: makes templates of the errors; by default `worked_examples`.
      rounds: turns at most. The loop ends before where nothing better is proposed.
      shown: errors that each turn shows.
      target_column: of dicts, frames and data sets, the column of the answer.
      max_answer_length: tokens of a free answer.
      name: what the prompt is called.
      folder: keeps the answers of each template, so that a loop that was interrupted
        goes on.

    Raises:
      UserError: rows, templates or words are unsound.
    """
    labels = rows.found_labels(validation, target_column, labels)
    names = rows.label_names(labels)
    words = _words(names, verbalizers)
    checks.whole(rounds, "rounds")
    checks.whole(shown, "shown")
    prompt_design.check_template(template)
    read = lambda given, what: rows.read(
        given, what, template=template, target_column=target_column, labels=labels
    )
    looked_at, held_out = read(train, TRAIN), read(validation, VALIDATION)
    if message := reach.shared_rows(looked_at.texts, held_out.texts):
        report.say(f"{VALIDATION}: {message}")
    judge = _Judge(base, names, words, max_answer_length, folder)
    propose = propose or worked_examples(template, words)
    columns = set(Template.parse(template).columns)
    best = before = judge.score(template, held_out)
    turns = []
    for number in range(1, rounds + 1):
        errors = _costliest(judge.score(best.template, looked_at), looked_at, shown)
        candidates = [
            each
            for each in dict.fromkeys(propose(best.template, errors) if errors else ())
            if each != best.template
        ]
        for each in candidates:
            prompt_design.check_template(each)
            if set(Template.parse(each).columns) != columns:
                raise UserError(
                    f"the proposed template {each!r} must have the columns "
                    f"{', '.join(sorted(columns))}"
                )
        found = _scored(judge, candidates, held_out)
        found.sort(key=lambda one: one.value, reverse=True)
        kept = bool(found) and found[0].value > best.value
        turns.append(Round(errors, found, kept))
        report.say(
            f"round {number}: {len(errors)} errors shown, {len(found)} templates "
            f"proposed, {'the best is kept' if kept else 'none is better'}"
        )
        if not kept:
            break
        best = found[0]
    prompt = TunedPrompt(
        prompt_names.check(name),
        np.zeros((0, base.config.emb_dim), np.float32),
        judge.card(best.template)
        | {
            "method": METHOD,
            "length": 0,
            "width": base.config.emb_dim,
            "base_model": base.identity,
            "recipe": {"rounds": len(turns), "first_template": before.template},
            "metric": dict(best.metrics),
            "versions": report.versions(),
        },
    )
    return Refined(
        prompt, before, best, turns, judge.encoder_passes, judge.decoder_passes
    )


def _words(
    names: Sequence[str] | None, given: Mapping[str, str] | None
) -> dict[str, str] | None:
    """The word of each label.

    Raises:
      UserError: one is missing, or stands for two.
    """
    if names is None:
        if given is not None:
            raise UserError("verbalizers stand for labels: give labels, too")
        return None
    given = {label: label for label in names} if given is None else given
    words = [given.get(label) for label in names]
    sound = all(isinstance(word, str) and word.strip() for word in words)
    if set(given) != set(names) or not sound or len(set(words)) < len(words):
        raise UserError(
            f"verbalizers must have one word of its own for each of {', '.join(names)}"
        )
    return {label: given[label] for label in names}


def _costliest(score: Score, asked: Rows, most: int) -> list[Error]:
    """The wrong answers that cost most."""
    wrong = [
        Error(i, dict(asked.columns[i]), target, answer, cost)
        for i, (target, answer, cost) in enumerate(
            zip(asked.answers, score.answers, score.costs, strict=True)
        )
        if answer.strip() != target.strip()
    ]
    return sorted(wrong, key=lambda error: -error.cost)[:most]


def _scored(judge: "_Judge", templates: Sequence[str], asked: Rows) -> list[Score]:
    """What was proposed, on rows; what they do not fit in is said and left out."""
    found = []
    for template in templates:
        try:
            found.append(judge.score(template, asked))
        except UserError as error:
            report.say(f"left out a template of {len(template)} characters: {error}")
    return found


class _Judge:
    """Asks the frozen model, and remembers what it said."""

    def __init__(
        self,
        base: BaseModel,
        names: Sequence[str] | None,
        words: Mapping[str, str] | None,
        max_answer_length: int,
        folder: files.Path | None,
    ):
        self._names, self._words = names, words
        self._vocabulary = models.vocabulary_of(base)
        self._folder = None if folder is None else pathlib.Path(folder)
        self._store = PromptStore(base, 1)
        self._engine = Engine(
            base,
            self._store,
            batch_sizes=(BATCH_SIZE,),
            strategy=decoding.Greedy(max_decode_len=max_answer_length),
        )
        if words is not None:
            label_sets.label_tokens(list(words.values()), self._vocabulary)
        said = [base.fingerprint, self._vocabulary.fingerprint, words]
        self._common = [*said, None if names else max_answer_length]
        self.encoder_passes = self.decoder_passes = 0

    def card(self, template: str) -> dict[str, Any]:
        """What a template is answered by."""
        own: dict[str, Any] = {}
        if self._words is not None:
            own = {
                "labels": list(self._words),
                "verbalizers": list(self._words.values()),
            }
        return {
            "template": template,
            **own,
            "vocabulary": self._vocabulary.name,
            "vocabulary_fingerprint": self._vocabulary.fingerprint,
        }

    def score(self, template: str, asked: Rows) -> Score:
        """A template on rows, whose answers may be known."""
        said = self._asked(template, asked)
        answers = [each["answer"] for each in said]
        if self._names is None:
            each = [
                text_metrics.rouge([target], [answer])[ROUGE]
                for target, answer in zip(asked.answers, answers, strict=True)
            ]
            metrics = text_metrics.rouge(asked.answers, answers)
            costs = [100.0 - value for value in each]
        else:
            right = [
                row["scores"][target]
                for row, target in zip(said, asked.answers, strict=True)
            ]
            costs = [-math.log(max(share, LEAST)) for share in right]
            metrics = {LOG_LIKELIHOOD: -float(np.mean(costs))}
        same = [
            answer.strip() == target.strip()
            for answer, target in zip(answers, asked.answers, strict=True)
        ]
        metrics = {ACCURACY: 100 * float(np.mean(same)), **metrics}
        return Score(template, metrics, answers, costs)

    def _asked(self, template: str, asked: Rows) -> list[dict[str, Any]]:
        """What the model says of each row, from the folder if it has it."""
        columns = [dict(row) for row in asked.columns]
        key = json.dumps([self._common, template, columns])
        path = None
        if self._folder is not None:
            digest = hashlib.sha256(key.encode()).hexdigest()[:32]
            path = self._folder / f"{digest}.json"
            if path.is_file():
                return files.read_json(path)["answers"]
        if template not in self._store.names():
            nothing = np.zeros((0, self._store.width), np.float32)
            card = self.card(template)
            self._store.add(template, nothing, card, self._vocabulary)
        said = self._engine.answer({**row, "prompt": template} for row in columns)
        kept = [{k: row[k] for k in ("answer", "scores") if k in row} for row in said]
        self.encoder_passes += len(columns)
        self.decoder_passes += len(columns) * len(self._names or (None,))
        if path is not None:
            files.write_json(path, {"template": template, "answers": kept})
        return kept
