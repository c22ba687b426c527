# SPDX-License-Identifier: Apache-2.0
"""Vocabularies without TensorFlow: texts to ids and back, and who a vocabulary is.

The ids are those of seqio's vocabularies of the same file, which tasks tokenise with.
T5's sentinels are the last 100 ids: where a SentencePiece file does not hold them, they
follow its last piece, as in seqio.
"""

import abc
import functools
import hashlib
import importlib.resources
import os
import pathlib
import re
import threading
from collections.abc import Iterable

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from prompt_tuning import files
from prompt_tuning.errors import UserError

EXTRA_IDS = 100
BYT5_EXTRA_IDS = 125
# Where T5 publishes its vocabularies. A local copy is named by an environment variable,
# because tasks are registered when their module is imported.
PUBLISHED = {
    "t5": (
        "T5_VOCABULARY",
        "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model",
    ),
    "mt5": (
        "MT5_VOCABULARY",
        "gs://t5-data/vocabs/mc4.250000.100extra/sentencepiece.model",
    ),
}
EMBEDDED, BYTES = "mini", "byt5"
# That of a prompt whose card names none, on a model whose checkpoint names none.
USUAL = "t5"
NAMES = (EMBEDDED, *PUBLISHED, BYTES)
_SENTINEL = re.compile("▁?<extra_id_[0-9]+>")
_CLOUD = re.compile("gs://([^/]+)/+(.+)")
# SentencePiece must not read two models at the same moment.
_reading = threading.Lock()


class Vocabulary(abc.ABC):
    """How a model writes texts as ids.

    Attributes:
      name: what `load` knows it by: one of `NAMES`, or the path of its file.
      vocab_size: number of ids, sentinels included; a model's table may have more rows.
      pad_id: pads, and is 0 in every T5.
      eos_id: ends a text.
      unk_id: stands for what has no piece.
      fingerprint: SHA-256 of what decides the ids, as hexadecimal; a copy under another
        name has the same.
      pieces: digest of the pieces in their order, sentinels left out. Files with the
        same pieces give texts the same ids, also where only one of them holds sentinels.
    """

    name: str
    vocab_size: int
    pad_id: int = 0
    eos_id: int
    unk_id: int
    fingerprint: str
    pieces: str

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text, without EOS."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids up to the first EOS; ids beyond the pieces are unknown."""
        known = [int(i) if i < self.vocab_size else self.unk_id for i in ids]
        if self.eos_id in known:
            known = known[: known.index(self.eos_id) + 1]
        return self._decode(known)

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """The text of ids that are all within the vocabulary."""


class SentencePieceVocabulary(Vocabulary):
    """Pieces of a SentencePiece model, such as that of T5 or mT5."""

    def __init__(self, content: bytes, name: str, extra_ids: int | None = None):
        """Reads a model.

        Args:
          content: the bytes of its file.
          name: what to call it.
          extra_ids: sentinels behind its last piece; by default 100, or none where it
            holds them.

        Raises:
          UserError: this is no SentencePiece model, or one without T5's padding.
        """
        self.name = name
        model = sentencepiece_model_pb2.ModelProto()
        tokenizer = sentencepiece.SentencePieceProcessor()
        try:
            model.ParseFromString(content)
            pieces = [piece.piece for piece in model.pieces]
            if extra_ids is None:
                extra_ids = 0 if any(map(_SENTINEL.fullmatch, pieces)) else EXTRA_IDS
            for i in reversed(range(extra_ids)):
                model.pieces.add(
                    piece=f"▁<extra_id_{i}>",
                    score=0.0,
                    type=sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED,
                )
            content = model.SerializeToString()
            with _reading:
                tokenizer.LoadFromSerializedProto(content)
        # Damaged bytes make protobuf and SentencePiece raise classes of their own.
        except Exception as error:
            raise UserError(
                f"{name} is no SentencePiece model: give the vocabulary's own file, "
                "such as spiece.model or sentencepiece.model"
            ) from error
        if tokenizer.pad_id() != self.pad_id:
            raise UserError(
                f"{name} is no vocabulary of a T5: its padding has id "
                f"{tokenizer.pad_id()}, not {self.pad_id}; train it with pad_id=0, "
                "eos_id=1, unk_id=2"
            )
        self._tokenizer = tokenizer
        texts = [piece for piece in pieces if not _SENTINEL.fullmatch(piece)]
        self.pieces = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        self.extra_ids = extra_ids
        self.vocab_size = tokenizer.get_piece_size()
        self.eos_id, self.unk_id = tokenizer.eos_id(), tokenizer.unk_id()
        self.fingerprint = _fingerprint(content, self.vocab_size)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.EncodeAsIds(text)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.DecodeIds(ids)


class ByteVocabulary(Vocabulary):
    """The bytes of UTF-8, behind padding, EOS and unknown (Xue et al. 2022).

    References: https://arxiv.org/abs/2105.13626
    """

    name = pieces = BYTES
    eos_id = 1
    unk_id = 2
    _first = 3

    def __init__(self, extra_ids: int = BYT5_EXTRA_IDS):
        """``extra_ids`` sentinels follow the bytes."""
        self.vocab_size = self._first + 256 + extra_ids
        # A byte vocabulary has no file: its kind says it all.
        self.fingerprint = _fingerprint(b"ByteVocabulary", self.vocab_size)

    def encode(self, text: str) -> list[int]:
        return [byte + self._first for byte in text.encode()]

    def _decode(self, ids: list[int]) -> str:
        kept = (i - self._first for i in ids)
        return bytes(i for i in kept if 0 <= i < 256).decode(errors="ignore")


def load(name: str) -> Vocabulary:
    """A vocabulary by name (see `NAMES`) or by the path of its SentencePiece file.

    A file is read once.

    Raises:
      UserError: neither a name nor a file; the file is none of a vocabulary, or cannot
        be read.
    """
    return _bytes() if name == BYTES else _read(path_of(name), name)


def path_of(name: str) -> str:
    """Where the file of a vocabulary lies, for a name other than 'byt5', or a path.

    Raises:
      UserError: neither a name nor a file.
    """
    if name in PUBLISHED:
        variable, published = PUBLISHED[name]
        return os.environ.get(variable, published)
    if name == EMBEDDED:
        assets = importlib.resources.files("prompt_tuning") / "assets"
        return str(assets / "t5_1_1_mini" / "spiece.model")
    if os.path.isfile(name) or "://" in name:
        return name
    raise UserError(
        f"no vocabulary is called {name!r}: choose one of {', '.join(NAMES)} or "
        "give the path of a SentencePiece file"
    )


@functools.cache
def _bytes() -> ByteVocabulary:
    return ByteVocabulary()


@functools.cache
def _read(path: str, name: str) -> SentencePieceVocabulary:
    try:
        content = _content(path)
    # tensorstore raises ValueError and classes of its own.
    except Exception as error:
        raise UserError(
            f"the vocabulary {path} cannot be read ({files.first_line(error)}): name a "
            "local copy of T5's in the environment variable T5_VOCABULARY, of mT5's in "
            "MT5_VOCABULARY"
        ) from error
    # A copy of the embedded one is called by its name, which cards keep.
    if content == pathlib.Path(path_of(EMBEDDED)).read_bytes():
        name = EMBEDDED
    return SentencePieceVocabulary(content, name)


def _content(path: str) -> bytes:
    if (match := _CLOUD.fullmatch(path)) is None:
        with open(path, "rb") as file:
            return file.read()
    import tensorstore as ts

    spec = {"driver": "gcs", "bucket": match[1], "path": match[2]}
    retries = {"gcs_request_retries": {"max_retries": 4}}
    value = ts.KvStore.open({**spec, **retries}).result().read("").result()
    if value.state != "value":
        raise FileNotFoundError(f"there is no file {path}")
    return value.value


def _fingerprint(content: bytes, vocab_size: int) -> str:
    return hashlib.sha256(content + f":{vocab_size}".encode()).hexdigest()
