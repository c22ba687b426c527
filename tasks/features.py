# SPDX-License-Identifier: Apache-2.0
"""Vocabularies, and the output features that go with them.

A vocabulary reads its file when it is first used, so naming one costs nothing and needs
no network.
"""

import functools
import hashlib
import importlib.resources
import os
from collections.abc import Iterator, Mapping

import seqio

from prompt_tuning.errors import UserError

EXTRA_IDS = 100
BYT5_EXTRA_IDS = 125
# Where T5 publishes its vocabularies. A local copy is named by an environment variable,
# because tasks are registered when their module is imported.
_PUBLISHED = {
    "t5": (
        "T5_VOCABULARY",
        "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model",
    ),
    "mt5": (
        "MT5_VOCABULARY",
        "gs://t5-data/vocabs/mc4.250000.100extra/sentencepiece.model",
    ),
}
NAMES = ("mini", "t5", "mt5", "byt5")


@functools.cache
def vocabulary(name: str) -> seqio.Vocabulary:
    """A vocabulary by name (see `NAMES`) or by the path of its SentencePiece file.

    T5's sentinels are 100 ids behind the last piece. They are added unless the file
    holds them: those in a folder called ``...100extra`` do, and mT5's do.

    Raises:
      UserError: neither a name nor a file.
    """
    if name == "byt5":
        return seqio.ByteVocabulary(extra_ids=BYT5_EXTRA_IDS)
    if name in _PUBLISHED:
        variable, published = _PUBLISHED[name]
        path = os.environ.get(variable, published)
    elif name == "mini":
        assets = importlib.resources.files("prompt_tuning") / "assets"
        path = str(assets / "t5_1_1_mini" / "spiece.model")
    elif os.path.isfile(name) or "://" in name:
        path = name
    else:
        raise UserError(
            f"no vocabulary is called {name!r}: choose one of {', '.join(NAMES)} or "
            "give the path of a SentencePiece file"
        )
    holds_sentinels = name == "mt5" or "100extra" in path
    return seqio.SentencePieceVocabulary(path, 0 if holds_sentinels else EXTRA_IDS)


def name_of(found: seqio.Vocabulary) -> str:
    """The name that `vocabulary` knows a vocabulary by, or the path of its file."""
    for name in NAMES:
        if vocabulary(name) is found:
            return name
    return str(getattr(found, "sentencepiece_model_file", type(found).__name__))


def fingerprint(found: seqio.Vocabulary) -> str:
    """SHA-256 of what decides a vocabulary's ids, as hexadecimal.

    A copy of a vocabulary under another name has the same one.
    """
    # Byte vocabularies have no file: their class says it all.
    pieces = getattr(found, "sp_model", None) or type(found).__name__.encode()
    return hashlib.sha256(pieces + f":{found.vocab_size}".encode()).hexdigest()


def output_features(name: str) -> Mapping[str, seqio.Feature]:
    """Inputs and targets, both ended by EOS, in the vocabulary ``name``."""
    both = vocabulary(name)
    return {
        # Text to continue may have no inputs, but never no targets.
        "inputs": seqio.Feature(vocabulary=both, add_eos=True, required=False),
        "targets": seqio.Feature(vocabulary=both, add_eos=True),
    }


def variants(usual: str) -> Iterator[tuple[str, Mapping[str, seqio.Feature]]]:
    """Prefixes of task names and the features that each stands for.

    >>> [prefix for prefix, _ in variants("t5")]
    ['mini_', '', 'mt5_', 'byt5_']
    """
    for name in NAMES:
        yield "" if name == usual else f"{name}_", output_features(name)
