# SPDX-License-Identifier: Apache-2.0
"""A model as programs that run without this package, with prompts as their inputs.

What is written runs wherever JAX does: two programs serialised by `jax.export`, the
weights as one safetensors file, and a note of their shapes. The programs take weights
and prompts as arguments, so a prompt that is tuned tomorrow runs on them, too.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from prompt_tuning import decoding, files, processes, trees
from prompt_tuning.checkpoints import model_file
from prompt_tuning.errors import UserError
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.types import Array, Params

PLATFORMS = ("cpu", "cuda", "tpu")
WEIGHTS = "weights.safetensors"
NOTE = "export.json"
# The leaf of the network's parameters that the argument `prompts` stands in for.
ROWS = "rows"


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What is fixed when programs are exported; the number of rows is not.

    Attributes:
      encoder_length: encoder tokens of a row, virtual ones included.
      label_length: tokens of a label, EOS included.
      max_decode_len: tokens of a decoded answer.
      prompt_rows: positions of all prompts that one call may name.
    """

    encoder_length: int
    label_length: int
    max_decode_len: int
    prompt_rows: int

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise UserError(f"{name}={value} must be 1 or more")


def programs(
    config: T5Config,
    weights: Params,
    shapes: Shapes,
    *,
    eos_id: int = 1,
    platforms: Sequence[str] = PLATFORMS,
) -> dict[str, jax_export.Exported]:
    """Exports ranking and greedy decoding.

    Args:
      config: sizes of the model.
      weights: leaf by '/'-joined name, arrays or shapes, in the dtype to run with.
      shapes: what is fixed.
      eos_id: token that ends an answer.
      platforms: where the programs shall run; none of them needs to be here.

    Returns:
      ``rank(weights, prompts [R, H], tokens [b, T], labels [c, S]) -> [b, c]``, the
      log-likelihood of every label, and ``decode(weights, prompts, tokens) ->
      [b, max_decode_len]``, token ids. Id V + i in ``tokens`` is row i of ``prompts``.

    Raises:
      UserError: an unknown platform.
    """
    unknown = [name for name in platforms if name not in PLATFORMS]
    if unknown or not platforms:
        raise UserError(
            f"PLATFORMS={list(platforms)} must be some of {', '.join(PLATFORMS)}"
        )
    model = Model(Transformer(config, (Prompt(ROWS, shapes.prompt_rows),)))
    strategy = decoding.Greedy(shapes.max_decode_len, eos_id=eos_id)

    def params(weights: dict[str, Array], prompts: Array) -> Params:
        return trees.unflatten({**weights, f"prompts/{ROWS}": prompts})

    def rank(weights, prompts, tokens, labels):
        return model.rank(params(weights, prompts), tokens, labels)

    def decode(weights, prompts, tokens):
        return model.predict(params(weights, prompts), tokens, strategy)[0][:, -1]

    batch, classes = jax_export.symbolic_shape("b, c")
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in weights.items()
    }
    arguments = (
        abstract,
        jax.ShapeDtypeStruct((shapes.prompt_rows, config.emb_dim), jnp.float32),
        jax.ShapeDtypeStruct((batch, shapes.encoder_length), jnp.int32),
    )
    labels = jax.ShapeDtypeStruct((classes, shapes.label_length), jnp.int32)

    def exported(fn: Callable[..., Array], *args: Any) -> jax_export.Exported:
        return jax_export.export(jax.jit(fn), platforms=list(platforms))(*args)

    return {
        "rank": exported(rank, *arguments, labels),
        "decode": exported(decode, *arguments),
    }


def write(
    folder: files.Path,
    config: T5Config,
    params: Params,
    shapes: Shapes,
    *,
    eos_id: int = 1,
    vocabulary: files.Path | None = None,
    platforms: Sequence[str] = PLATFORMS,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Writes programs, weights and a note into a folder, all of it or nothing.

    Args:
      folder: must not exist.
      config: sizes of the model.
      params: the frozen weights, without prompts.
      shapes: what is fixed.
      eos_id: token that ends an answer.
      vocabulary: SentencePiece model to put beside.
      platforms: see `programs`.
      metadata: more for the note, e.g. the identity of the base model.

    Raises:
      UserError: an unknown platform, or the folder exists or cannot be written.
    """
    if os.path.lexists(folder):
        raise UserError(f"{folder} exists already; choose another folder")
    weights = trees.flatten(params)
    made = programs(config, weights, shapes, eos_id=eos_id, platforms=platforms)
    note = {
        **dataclasses.asdict(shapes),
        "vocab_size": config.vocab_size,
        "emb_dim": config.emb_dim,
        "eos_id": eos_id,
        "platforms": list(platforms),
        "jax": jax.__version__,
        **(metadata or {}),
    }
    specs = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in weights.items()
    }
    with files.replacing(folder) as temporary:
        temporary.mkdir()
        for name, program in made.items():
            (temporary / f"{name}.jax").write_bytes(program.serialize())
        files.write_stream(
            temporary / WEIGHTS,
            specs,
            lambda name: np.asarray(processes.whole(weights[name])),
            {},
        )
        (temporary / NOTE).write_text(json.dumps(note, indent=2) + "\n")
        if vocabulary is not None:
            shutil.copyfile(vocabulary, temporary / model_file.VOCABULARY)
