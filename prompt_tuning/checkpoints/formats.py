# SPDX-License-Identifier: Apache-2.0
"""One door for base models of every format, in and out."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

from prompt_tuning import files
from prompt_tuning.checkpoints import (
    huggingface,
    layout,
    model_file,
    t5x_native,
    t5x_orbax,
)
from prompt_tuning.checkpoints.keys import huggingface as keys
from prompt_tuning.checkpoints.source import Source
from prompt_tuning.data import vocabularies
from prompt_tuning.errors import UserError
from prompt_tuning.network.transformer import T5Config

FORMATS = ("native", "t5x", "huggingface")
# What transformers' folders have where there is no SentencePiece model, or beside it.
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
BYTE_TOKENIZER = "ByT5Tokenizer"


def open_model(path: files.Path) -> Source:
    """Opens a base model, whatever its format; reads no tensor.

    Args:
      path: a folder that T5X (its own format or orbax's), transformers or this package
        wrote; ``gs://BUCKET/PATH`` of a T5X checkpoint; or a name of the Hugging Face
        hub such as ``google/t5-v1_1-base``.

    Raises:
      UserError: there is no model of these formats, or it is damaged.
    """
    where = os.fspath(path)
    if not where:
        raise UserError("the path is empty: give the folder that holds a model")
    cloud = _is_cloud(where)
    if not cloud and not os.path.exists(where):
        # Not on this machine: it may be a name of the hub.
        return huggingface.open_checkpoint(huggingface.resolve(where))
    reader = _reader(where)
    if reader is None and cloud:
        raise UserError(
            f"{where} holds no T5X checkpoint; copy a model of another format to this "
            "machine first"
        )
    if reader is None:
        raise UserError(
            f"{where} is no model that T5X, transformers or this package wrote; give "
            "the folder that holds its weights"
        )
    return reader.open_checkpoint(where)


def is_model(path: files.Path) -> bool:
    """Whether a base model lies at ``path``, a folder or in the cloud."""
    return _reader(os.fspath(path)) is not None


def _reader(where: str) -> Any:
    # Theirs and ours are both called model.safetensors; theirs has config.json, too.
    local = () if _is_cloud(where) else (huggingface, model_file)
    for reader in (t5x_native, t5x_orbax, *local):
        if reader.is_checkpoint(where):
            return reader
    return None


def _is_cloud(where: str) -> bool:
    return t5x_native.CLOUD.fullmatch(where) is not None


def architecture(source: Source) -> T5Config:
    """The sizes of a checkpoint, from what it says or from its tensors' shapes.

    Shapes do not tell the activation nor the distance from which positions share a
    bucket: those of T5 1.0 and T5 1.1 are taken, by whether the MLP has a gate.

    Raises:
      UserError: the tensors are not those of a T5.
    """
    found: dict[str, Any] = layout.sizes(
        {name: tuple(spec.shape) for name, spec in source.specs.items()}
    )
    gated = "encoder/layers_0/mlp/wi_0/kernel" in source.specs
    found["mlp_activations"] = ("gelu", "linear") if gated else ("relu",)
    found["logits_via_embedding"] = "decoder/logits_dense/kernel" not in source.specs
    try:
        return T5Config(**{**found, **source.sizes})
    except TypeError as error:
        raise UserError(
            f"{source.path} lacks tensors that every T5 has ({error}); give a whole "
            "model"
        ) from error


def write_model(
    folder: files.Path,
    source: Source,
    format: str,
    *,
    dtype: str | None = None,
    vocabulary: files.Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Writes a model in one of `FORMATS`, tensor by tensor.

    Args:
      folder: must not exist; for 't5x' the folder in which ``checkpoint_N`` is made,
        N being the step that the source says it is of, or 0.
      source: the model.
      format: one of `FORMATS`.
      dtype: 'float32' or 'bfloat16'; None keeps the dtype of each tensor.
      vocabulary: SentencePiece model to put beside the weights; T5X's format has no
        place for it.
      progress: told the name of each tensor.

    Raises:
      UserError: an unknown format or dtype, or the folder cannot be written.
    """
    if format == "t5x":
        step = int(source.metadata.get("step", 0))
        t5x_native.write_checkpoint(
            os.fspath(folder), source, step=step, dtype=dtype, progress=progress
        )
    elif format == "huggingface":
        huggingface.write_checkpoint(
            folder,
            source,
            sizes=vars(architecture(source)),
            dtype=dtype,
            vocabulary=vocabulary,
            progress=progress,
        )
    elif format == "native":
        if os.path.lexists(folder):
            raise UserError(f"{folder} exists already; choose another folder")
        with files.replacing(folder) as temporary:
            model_file.write_checkpoint(
                temporary,
                source,
                metadata=source.metadata,
                dtype=dtype,
                vocabulary=vocabulary,
                progress=progress,
            )
    else:
        raise UserError(f"no format {format!r}; choose one of {', '.join(FORMATS)}")


def find_vocabulary(path: files.Path) -> pathlib.Path | None:
    """The SentencePiece model beside a model's weights, if there is one."""
    if _is_cloud(os.fspath(path)):
        return None
    found = sorted(pathlib.Path(path).glob("*.model"))
    return found[0] if found else None


def vocabulary(path: files.Path) -> vocabularies.Vocabulary | None:
    """The vocabulary of the model in a folder, or None where nothing there says it.

    It is the SentencePiece model beside the weights, or bytes where transformers' folder
    names ByT5's tokenizer. T5X's checkpoints do not say theirs.

    Raises:
      UserError: the file beside the weights is no vocabulary.
    """
    if (found := find_vocabulary(path)) is not None:
        return vocabularies.load(str(found))
    if _is_cloud(os.fspath(path)):
        return None
    for name in (TOKENIZER_CONFIG, keys.CONFIG):
        file = pathlib.Path(path) / name
        if file.is_file():
            config = files.read_json(file)
            if config.get("tokenizer_class") == BYTE_TOKENIZER:
                return vocabularies.load(vocabularies.BYTES)
    return None


def needed_vocabulary(path: files.Path) -> vocabularies.Vocabulary:
    """The vocabulary of the model in a folder, which has to be there.

    Raises:
      UserError: there is none; the message says which file is needed.
    """
    found = vocabulary(path)
    if found is not None:
        return found
    beside = "has no vocabulary beside its weights"
    if not _is_cloud(os.fspath(path)) and (pathlib.Path(path) / TOKENIZER).is_file():
        beside = f"has its vocabulary as {TOKENIZER} alone, which is not read here"
    raise UserError(
        f"{path} {beside}: put the model's {model_file.VOCABULARY} (T5's "
        "sentencepiece.model) there, or name the vocabulary in VOCABULARY"
    )
