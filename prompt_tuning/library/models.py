# SPDX-License-Identifier: Apache-2.0
"""Base models, opened by where they lie; their sizes are found in the checkpoint."""

import dataclasses

from prompt_tuning import dtypes, files, trees
from prompt_tuning.checkpoints import base_models, formats
from prompt_tuning.checkpoints.base_models import BaseModel
from prompt_tuning.data import vocabularies
from prompt_tuning.devices import compilation_cache
from prompt_tuning.devices.partitioner import Partitioner
from prompt_tuning.errors import UserError
from prompt_tuning.network import quantization

# So many layers compile fast enough without a scan, and run faster on CPUs.
FEW_LAYERS = 4


def load(
    path: files.Path,
    *,
    vocabulary: str | None = None,
    dtype: str = "auto",
    int8_products: bool = False,
    partitioner: Partitioner | None = None,
) -> BaseModel:
    """Loads a frozen base model with its vocabulary.

    Programs that are compiled from then on are kept for later processes, unless JAX was
    told otherwise (see `compilation_cache`).

    Args:
      path: a folder that T5X, transformers or this package wrote, a name of the Hugging
        Face hub such as ``google/t5-v1_1-base``, ``gs://...`` of a T5X checkpoint, or
        ``embedded:t5_1_1_mini``, the small model inside the package (its assets hold
        still smaller ones).
      vocabulary: 't5', 'mt5', 'byt5' or the path of a SentencePiece file, for a
        checkpoint that does not hold its own, as T5X's do not.
      dtype: of the weights: 'float32', 'bfloat16', 'int8', or 'auto', which is bfloat16
        on accelerators and float32 on CPUs.
      int8_products: with int8 weights, round what they are multiplied with to int8, too
        (see `T5Config`).
      partitioner: how to spread over devices; by default a whole copy on each.

    Raises:
      UserError: there is no such model, it is damaged, or nothing says its vocabulary.
    """
    source = base_models.open_checkpoint(path)
    if vocabulary is None:
        found = formats.vocabulary(source.path)
        if found is None:
            raise UserError(
                f"{path} does not say its vocabulary: give load(..., vocabulary='t5') "
                f"or another of {', '.join(vocabularies.NAMES)}, or the path of its "
                "SentencePiece file"
            )
    else:
        found, own = vocabularies.load(vocabulary), formats.vocabulary(source.path)
        if own is not None and own.pieces != found.pieces:
            raise UserError(
                f"{path} holds a vocabulary of its own, {own.name}, which is not "
                f"{found.name}: leave vocabulary out"
            )
    config = formats.architecture(source)
    if found.vocab_size > config.vocab_size:
        raise UserError(
            f"the vocabulary {found.name} has {found.vocab_size} ids, the model "
            f"{config.vocab_size} rows for them: give load(..., vocabulary=...) its own"
        )
    if max(config.num_encoder_layers, config.num_decoder_layers) <= FEW_LAYERS:
        config = dataclasses.replace(config, unroll=FEW_LAYERS)
    config = dataclasses.replace(config, int8_products=int8_products)
    compilation_cache.use()
    base = base_models.load(config, source, frozen_dtype=dtype, partitioner=partitioner)
    return dataclasses.replace(base, named_vocabulary=found)


def vocabulary_of(base: BaseModel) -> vocabularies.Vocabulary:
    """The vocabulary of a loaded model.

    Raises:
      UserError: it is no model that `load` gave, or nothing says its vocabulary.
    """
    if not isinstance(base, BaseModel):
        raise UserError(
            f"base is {type(base).__name__}, not a model: give load('embedded:"
            "t5_1_1_mini') or another model"
        )
    if base.vocabulary is None:
        raise UserError(f"{base.name} does not say its vocabulary: give load one")
    return base.vocabulary


def frozen_dtype(base: BaseModel) -> str:
    """What the weights are kept in, as `load` calls it."""
    leaves = trees.flatten(base.params)
    is_int8 = any(name.endswith(quantization.SCALE) for name in leaves)
    return dtypes.INT8 if is_int8 else str(base.table.dtype)
