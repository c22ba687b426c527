# SPDX-License-Identifier: Apache-2.0
"""Metrics of free text, in percent: of answers, summaries and translations.

A target is a text or several, of which the best counts. ROUGE, BLEU and chrF are calls of
rouge-score and sacrebleu, which the extra "metrics" installs; what they score a pair is
kept, so that resampled rows cost nothing.
"""

import collections
import functools
import importlib
import importlib.util
import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning.errors import UserError

Target = str | Sequence[str]
# What each metric needs beside this package.
PACKAGES = {"rouge": "rouge_score", "bleu": "sacrebleu", "chrf": "sacrebleu"}
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_PAIRS = 1 << 17


def check_installed(name: str) -> None:
    """Refuses a metric whose package is missing.

    Raises:
      UserError: it is.
    """
    package = PACKAGES.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(
            f"the metric {name} needs {package.replace('_', '-')}: "
            "pip install 'prompt-tuning[metrics]'"
        )


def em(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """Percentage of answers that are a target, as SQuAD compares them.

    >>> em(["The Beatles!", ["one", "two"]], ["beatles", "two"])
    {'em': 100.0}
    """
    return {"em": squad(targets, predictions)["em"]}


def squad(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """Exact match and the F1 of words, each with the target that is nearest.

    Without case, punctuation and articles, as SQuAD's own evaluation does it
    (Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250).

    >>> squad([["in the park", "a park"]], ["park"])
    {'em': 100.0, 'f1': 100.0}
    """
    pairs = np.array(
        [
            np.max([_answered(one, prediction) for one in _several(target)], axis=0)
            for target, prediction in zip(targets, predictions, strict=True)
        ]
    )
    exact, f1 = 100 * pairs.mean(axis=0)
    return {"em": float(exact), "f1": float(f1)}


@functools.lru_cache(_PAIRS)
def _answered(target: str, prediction: str) -> tuple[float, float]:
    """Exact match and F1 of words, from 0 to 1."""
    wanted, given = _words(target), _words(prediction)
    if not wanted or not given:
        same = float(wanted == given)
        return same, same
    common = sum((collections.Counter(wanted) & collections.Counter(given)).values())
    return float(wanted == given), 2 * common / (len(wanted) + len(given))


@functools.lru_cache(_PAIRS)
def _words(text: str) -> tuple[str, ...]:
    bare = text.lower().translate(_PUNCTUATION)
    return tuple(_ARTICLES.sub(" ", bare).split())


def math_accuracy(
    targets: Sequence[Target], predictions: Sequence[str]
) -> dict[str, float]:
    """Percentage of answers whose last number is the target's last number.

    A target may show its steps; GSM8K's ends with ``#### 72`` (Cobbe et al. 2021,
    https://arxiv.org/abs/2110.14168). An answer without a number is wrong.

    >>> math_accuracy(["48 / 2 = 24. #### 1,024"], ["so it is 1024.0"])
    {'math_accuracy': 100.0}
    """
    right = [
        any(_same_number(one, prediction) for one in _several(target))
        for target, prediction in zip(targets, predictions, strict=True)
    ]
    return {"math_accuracy": 100.0 * float(np.mean(right))}


def _same_number(target: str, prediction: str) -> bool:
    wanted, given = last_number(target), last_number(prediction)
    return wanted is not None and wanted == given


def last_number(text: str) -> float | None:
    """The last number of a text; thousands may be parted by commas."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def rouge(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """F-measures of ROUGE, means over the rows, without stemming, as T5 has them.

    ``rougeLsum`` takes `` . `` for the end of a sentence.

    Raises:
      UserError: rouge-score is not installed.
    """
    check_installed("rouge")
    pairs = [
        max((_rouge(one, prediction) for one in _several(target)), key=sum)
        for target, prediction in zip(targets, predictions, strict=True)
    ]
    means = 100 * np.mean(pairs, axis=0)
    return dict(zip(ROUGE_TYPES, means.tolist(), strict=True))


@functools.lru_cache(_PAIRS)
def _rouge(target: str, prediction: str) -> tuple[float, ...]:
    found = _rouge_scorer().score(_sentences(target), _sentences(prediction))
    return tuple(found[name].fmeasure for name in ROUGE_TYPES)


@functools.cache
def _rouge_scorer() -> Any:
    scorer = importlib.import_module("rouge_score.rouge_scorer")
    return scorer.RougeScorer(ROUGE_TYPES)


def _sentences(text: str) -> str:
    return text.replace(" . ", " .\n")


def bleu(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """BLEU of the corpus by sacrebleu's defaults (13a tokens, smoothing exp).

    Raises:
      UserError: sacrebleu is not installed.
    """
    check_installed("bleu")
    rows = zip(targets, predictions, strict=True)
    pairs = np.array([_bleu(tuple(_several(t)), p) for t, p in rows])
    # Counts of n-grams and lengths of all rows together make the corpus's score.
    hypothesis, reference, *counts = pairs.sum(axis=0).tolist()
    order = len(counts) // 2
    score = _sacrebleu().BLEU.compute_bleu(
        counts[:order], counts[order:], hypothesis, reference, smooth_method="exp"
    )
    return {"bleu": float(score.score)}


@functools.lru_cache(_PAIRS)
def _bleu(targets: tuple[str, ...], prediction: str) -> tuple[int, ...]:
    score = _sacrebleu().BLEU(effective_order=True).sentence_score(prediction, targets)
    return score.sys_len, score.ref_len, *score.counts, *score.totals


def chrf(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """chrF2 of the corpus by sacrebleu's defaults.

    Raises:
      UserError: sacrebleu is not installed.
    """
    return {"chrf": _chrf(targets, predictions).score}


def chrf_interval(
    targets: Sequence[Target], predictions: Sequence[str], samples: int
) -> tuple[float, float]:
    """Bootstrap interval of 95 % that sacrebleu gives chrF.

    Raises:
      UserError: sacrebleu is not installed.
    """
    score = _chrf(targets, predictions, n_bootstrap=samples)
    found = json.loads(score.format(width=6, signature="by:rows", is_json=True))
    # sacrebleu says nothing of a mean of 0.
    mean, half = found.get("confidence_mean", 0.0), found.get("confidence_var", 0.0)
    return mean - half, mean + half


def _chrf(targets: Sequence[Target], predictions: Sequence[str], **options) -> Any:
    check_installed("chrf")
    several = [_several(target) for target in targets]
    most = max(map(len, several))
    references = [
        [row[i] if i < len(row) else None for row in several] for i in range(most)
    ]
    return _sacrebleu().CHRF().corpus_score(list(predictions), references, **options)


def _sacrebleu() -> Any:
    return importlib.import_module("sacrebleu.metrics")


def _several(target: Target) -> Sequence[str]:
    return (target,) if isinstance(target, str) else target


METRICS: Mapping[str, Callable[..., Mapping[str, float]]] = {
    "em": em,
    "squad": squad,
    "math_accuracy": math_accuracy,
    "rouge": rouge,
    "bleu": bleu,
    "chrf": chrf,
}
