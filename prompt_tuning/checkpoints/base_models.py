# SPDX-License-Identifier: Apache-2.0
"""The frozen base model of a run: sizes, weights, identity."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from prompt_tuning import dtypes, files, report, trees
from prompt_tuning.checkpoints import formats, loading, prompt_file, prompt_formats
from prompt_tuning.checkpoints.source import Source
from prompt_tuning.data.vocabularies import Vocabulary
from prompt_tuning.devices import sharding
from prompt_tuning.devices.partitioner import Partitioner
from prompt_tuning.errors import UserError
from prompt_tuning.network import quantization
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.types import Params

EMBEDDED = "embedded:"
# As `Source.format` calls them.
WITHOUT_CHECKSUMS = ("huggingface",)
ASSETS = pathlib.Path(__file__).parents[1] / "assets"


def open_checkpoint(path: files.Path) -> Source:
    """Opens INITIAL_CHECKPOINT_PATH; ``embedded:NAME`` is a model inside the package.

    Raises:
      UserError: see `formats.open_model`.
    """
    if str(path).startswith(EMBEDDED):
        folder = ASSETS / str(path).removeprefix(EMBEDDED)
        if not folder.is_dir():
            names = ", ".join(sorted(p.name for p in ASSETS.iterdir()))
            raise UserError(f"no model {path!r} is embedded; there is {names}")
        path = folder
    return formats.open_model(path)


def embedded_base(card: Mapping[str, Any]) -> str:
    """The embedded model that a prompt was tuned on, as INITIAL_CHECKPOINT_PATH.

    Raises:
      UserError: it was tuned on another model, which has to be given.
    """
    base = card.get("base_model")
    name = base.get("name") if isinstance(base, Mapping) else None
    if isinstance(name, str) and name in {path.name for path in ASSETS.iterdir()}:
        return f"{EMBEDDED}{name}"
    raise UserError(
        f"the prompt was tuned on {name or 'a model without name'}, which is none of "
        "the embedded ones: say where it is by INITIAL_CHECKPOINT_PATH"
    )


def resolve_dtype(dtype: str) -> str:
    """'auto' is bfloat16 on accelerators and float32 on CPUs, which lack fast bfloat16.

    Raises:
      UserError: an unknown dtype.
    """
    if dtype == "auto":
        return dtypes.FLOAT32 if jax.default_backend() == "cpu" else dtypes.BFLOAT16
    return dtypes.floating(dtype).name


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A network without prompts, its weights, and who it is.

    Attributes:
      config: the sizes, with the activations' dtype.
      params: the weights in the dtype they are kept in.
      name: what people call the checkpoint.
      fingerprint: hash of the checkpoint's weights rounded to bfloat16; it is the same
        whichever dtype they are kept in.
      partitioner: how the weights are spread over devices, or None for one device.
      path: the folder of the checkpoint.
      named_vocabulary: what it was said to be written in, where its folder does not say.
    """

    config: T5Config
    params: Params
    name: str
    fingerprint: str
    partitioner: Partitioner | None
    path: str
    named_vocabulary: Vocabulary | None = None

    @functools.cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The vocabulary that the checkpoint or its loader names, if one does.

        Raises:
          UserError: see `formats.vocabulary`.
        """
        return self.named_vocabulary or formats.vocabulary(self.path)

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        """The devices the weights are spread over, or None for one device."""
        return None if self.partitioner is None else self.partitioner.mesh

    @property
    def identity(self) -> dict[str, str]:
        """What a prompt's card says of the model it was tuned on."""
        return {"name": self.name, "fingerprint": self.fingerprint}

    @property
    def table(self) -> jax.Array:
        """The embedding table, ``[V, H]``."""
        return self.params["token_embedder"]["embedding"]


def load(
    config: T5Config,
    checkpoint: str | pathlib.Path | Source,
    *,
    frozen_dtype: str = "auto",
    activation_dtype: str = "auto",
    partitioner: Partitioner | None = None,
) -> BaseModel:
    """Loads the weights that ``config`` describes.

    Args:
      config: the sizes.
      checkpoint: opened, or the path of one of any format (see `open_checkpoint`).
      frozen_dtype: dtype to keep the weights in (see `resolve_dtype`); 'int8'
        quantises kernels and keeps the other leaves as 'auto' does.
      activation_dtype: dtype to compute in.
      partitioner: how to spread over devices; by default a whole copy on each.

    Raises:
      UserError: the checkpoint is missing or does not fit the sizes, the sizes do not
        fit the devices, or products of int8 are asked for with other kernels.
    """
    if config.int8_products and frozen_dtype != dtypes.INT8:
        raise UserError(
            "products of int8 need int8 kernels: give FROZEN_DTYPE='int8' (in Python and "
            "to serve, dtype), or leave int8_products out"
        )
    opened = isinstance(checkpoint, Source)
    source = checkpoint if opened else open_checkpoint(checkpoint)
    loading.check_sizes(source, config)
    if source.prompts:
        report.say(
            f"{source.path} holds a prompt beside the model ({', '.join(source.prompts)}"
            "), which is left out; PROMPT_FILE takes it"
        )
    if source.format in WITHOUT_CHECKSUMS:
        report.say(
            f"{source.path} is in a format without checksums ({source.format}): damage "
            "to its numbers goes unnoticed"
        )
    config = dataclasses.replace(config, dtype=resolve_dtype(activation_dtype))
    abstract = Model(Transformer(config)).abstract_params()
    if frozen_dtype == dtypes.INT8:
        abstract = quantization.quantize_abstract(abstract)
        frozen_dtype = "auto"
    partitioner, shardings = partitioner or Partitioner(), None
    if partitioner.is_single:
        partitioner = None
    else:
        shardings = sharding.param_shardings(
            abstract, partitioner.mesh, partitioner.rules
        )
    digest = trees.Digest()
    params = loading.load_params(
        source, abstract, resolve_dtype(frozen_dtype), shardings, digest
    )
    return BaseModel(
        config, params, source.name, digest.hexdigest(), partitioner, source.path
    )


def attach(
    source: BaseModel, path: str | None, force: bool = False
) -> tuple[tuple[Prompt, ...], Params, Mapping[str, Any]]:
    """Loads a prompt beside a base model.

    Returns:
      The network's prompts, all parameters and the prompt's card.

    Raises:
      UserError: the prompt was tuned on another model (unless ``force``), or has
        another width.
    """
    if path is None:
        return (), source.params, {}
    array, card = prompt_formats.load(path)
    for note in card.get("notes", ()):
        report.say(note)
    prompt_file.check_compatible(
        card, source.fingerprint, source.config.emb_dim, force=force
    )
    prompt = Prompt(str(card.get("task") or "prompt").replace("/", "_"), len(array))
    prompts = {"prompts": {prompt.name: array}}
    if source.mesh is not None:
        prompts = sharding.replicate(prompts, source.mesh)
    params = trees.merge(source.params, prompts)
    return (prompt,), params, card
