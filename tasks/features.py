# SPDX-License-Identifier: Apache-2.0
"""Vocabularies, and the output features that go with them.

A vocabulary reads its file when it is first used, so naming one costs nothing and needs
no network.
"""

import functools
import hashlib
import os
from collections.abc import Iterator, Mapping

import seqio

from prompt_tuning.data import vocabularies


@functools.cache
def vocabulary(name: str) -> seqio.Vocabulary:
    """A vocabulary by name or by the path of its file, as seqio has it.

    Its ids are those of `vocabularies.load`; see there for names and sentinels.

    Raises:
      UserError: neither a name nor a file, or the file is none of a vocabulary.
    """
    if name == vocabularies.BYTES:
        return seqio.ByteVocabulary(extra_ids=vocabularies.BYT5_EXTRA_IDS)
    path, extra_ids = vocabularies.path_of(name), 0
    # What T5 publishes holds its sentinels; it is read when it is used.
    if os.path.isfile(path) or name not in vocabularies.PUBLISHED:
        extra_ids = vocabularies.load(name).extra_ids
    return seqio.SentencePieceVocabulary(path, extra_ids)


def plain(found: seqio.Vocabulary) -> vocabularies.Vocabulary | None:
    """The same vocabulary without seqio; None where its class is none of T5's."""
    if isinstance(found, seqio.ByteVocabulary):
        return vocabularies.ByteVocabulary(found.extra_ids)
    if isinstance(found, seqio.SentencePieceVocabulary):
        return vocabularies.SentencePieceVocabulary(found.sp_model, name_of(found), 0)  # pyright: ignore[reportArgumentType]
    return None


def name_of(found: seqio.Vocabulary) -> str:
    """The name that `vocabulary` knows a vocabulary by, or the path of its file."""
    for name in vocabularies.NAMES:
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
    for name in vocabularies.NAMES:
        yield "" if name == usual else f"{name}_", output_features(name)
