# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's names for T5 1.0, 1.1, LM-adapted, Flan-T5, mT5 and ByT5.

Tables of files, tensors and fields of config.json, and under them the functions that
look names and values up in both directions.
"""

import re
from collections.abc import Mapping
from typing import Any

from prompt_tuning.errors import UserError
from prompt_tuning.network.transformer import T5Config

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-{:05d}-of-{:05d}.safetensors"
VOCABULARY = "spiece.model"
# What is fetched from the hub, and how it names models: `NAME` or `ORGANISATION/NAME`.
HUB_FILES = (
    CONFIG,
    "*.safetensors",
    "*.index.json",
    VOCABULARY,
    "tokenizer*",
    "special_tokens_map.json",
)

SAME, TRANSPOSED = "same", "transposed"

# Leaves: name there, name in T5X, orientation. PyTorch's linear maps are [out, in],
# Flax's [in, out]; the bias of relative positions is [buckets, heads] and [heads,
# buckets].
TABLE = (("shared.weight", "token_embedder/embedding", SAME),)
HEAD = (("lm_head.weight", "decoder/logits_dense/kernel", TRANSPOSED),)
NORM = (("weight", "scale", SAME),)
BIAS = (("weight", "rel_embedding", TRANSPOSED),)
ATTENTION = (
    ("q.weight", "query/kernel", TRANSPOSED),
    ("k.weight", "key/kernel", TRANSPOSED),
    ("v.weight", "value/kernel", TRANSPOSED),
    ("o.weight", "out/kernel", TRANSPOSED),
)
MLP = (
    ("wi.weight", "wi/kernel", TRANSPOSED),
    ("wi_0.weight", "wi_0/kernel", TRANSPOSED),
    ("wi_1.weight", "wi_1/kernel", TRANSPOSED),
    ("wo.weight", "wo/kernel", TRANSPOSED),
)
# Modules of a side: name there, name in T5X, leaves; `{}` is the number of a layer. The
# first block's bias of relative positions serves all blocks.
ENCODER = (
    ("block.0.layer.0.SelfAttention.relative_attention_bias.", "relpos_bias/", BIAS),
    ("block.{}.layer.0.layer_norm.", "layers_{}/pre_attention_layer_norm/", NORM),
    ("block.{}.layer.0.SelfAttention.", "layers_{}/attention/", ATTENTION),
    ("block.{}.layer.1.layer_norm.", "layers_{}/pre_mlp_layer_norm/", NORM),
    ("block.{}.layer.1.DenseReluDense.", "layers_{}/mlp/", MLP),
    ("final_layer_norm.", "encoder_norm/", NORM),
)
DECODER = (
    ("block.0.layer.0.SelfAttention.relative_attention_bias.", "relpos_bias/", BIAS),
    ("block.{}.layer.0.layer_norm.", "layers_{}/pre_self_attention_layer_norm/", NORM),
    ("block.{}.layer.0.SelfAttention.", "layers_{}/self_attention/", ATTENTION),
    ("block.{}.layer.1.layer_norm.", "layers_{}/pre_cross_attention_layer_norm/", NORM),
    (
        "block.{}.layer.1.EncDecAttention.",
        "layers_{}/encoder_decoder_attention/",
        ATTENTION,
    ),
    ("block.{}.layer.2.layer_norm.", "layers_{}/pre_mlp_layer_norm/", NORM),
    ("block.{}.layer.2.DenseReluDense.", "layers_{}/mlp/", MLP),
    ("final_layer_norm.", "decoder_norm/", NORM),
)
# All of them in full.
TENSORS: tuple[tuple[str, str, str], ...] = tuple(
    (f"{side}{there}{leaf}", f"{t5x_side}{here}{t5x_leaf}", orientation)
    for side, t5x_side, modules in (
        ("", "", (("", "", TABLE), ("", "", HEAD))),
        ("encoder.", "encoder/", ENCODER),
        ("decoder.", "decoder/", DECODER),
    )
    for there, here, leaves in modules
    for leaf, t5x_leaf, orientation in leaves
)
# Names that the embedding table is saved under, each alone or beside others.
TABLE_NAMES = (
    "shared.weight",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
)
# In files that early versions of transformers converted; no network reads it.
LEFTOVERS = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)

# `model_type`: T5 1.0, 1.1, LM-adapted, Flan-T5 and ByT5 are "t5".
ARCHITECTURES = {
    "t5": "T5ForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
}
# Relatives that look like a T5 and are none.
REFUSED = {"umt5": "whose layers each have a bias of relative positions of their own"}
# Sizes: field of config.json, field of `T5Config`.
SIZES = (
    ("vocab_size", "vocab_size"),
    ("d_model", "emb_dim"),
    ("num_heads", "num_heads"),
    ("num_layers", "num_encoder_layers"),
    ("num_decoder_layers", "num_decoder_layers"),
    ("d_kv", "head_dim"),
    ("d_ff", "mlp_dim"),
    ("relative_attention_num_buckets", "relpos_buckets"),
    ("relative_attention_max_distance", "relpos_max_distance"),
)
# What transformers takes where config.json is silent, its first versions having had no
# such field. `num_decoder_layers` is `num_layers` then; other sizes have to be there.
SIZE_DEFAULTS = {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
}
DROPOUT_DEFAULT = 0.1
LAYER_NORM_EPSILON = 1e-6  # The network has no other.
# Activations: name there, name here. Its plain `gelu` is the exact function, ours is
# the approximation by tanh that T5 was trained with.
ACTIVATIONS = (("relu", "relu"), ("gelu_new", "gelu"), ("silu", "silu"))
FEED_FORWARD_DEFAULTS = {"t5": "relu", "mt5": "gated-gelu"}
# The one `feed_forward_proj` that does not mean what it says.
GATED_GELU, GATED_GELU_ACTIVATION = "gated-gelu", "gelu_new"
# What generation needs to know; the same in every T5.
SPECIAL_IDS = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
# Facts of config.json that a `Source` keeps as metadata.
METADATA = ("model_type", "architectures", "tokenizer_class", "transformers_version")


def _compile(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{\}", "(0|[1-9][0-9]*)"))


_TO_T5X = [(_compile(there), here, how) for there, here, how in TENSORS]
_FROM_T5X = [(_compile(here), there, how) for there, here, how in TENSORS]


def to_t5x(name: str) -> tuple[str, bool] | None:
    """A tensor's T5X name and whether T5X has it transposed; None if T5X lacks it.

    >>> to_t5x("encoder.block.3.layer.0.SelfAttention.q.weight")
    ('encoder/layers_3/attention/query/kernel', True)
    """
    return _rename(name, _TO_T5X)


def from_t5x(name: str) -> tuple[str, bool]:
    """Inverse of `to_t5x`.

    Raises:
      ValueError: transformers has no such tensor.
    """
    if (found := _rename(name, _FROM_T5X)) is None:
        raise ValueError(f"{name!r} is no tensor of a T5 of transformers")
    return found


def _rename(
    name: str, rules: list[tuple[re.Pattern[str], str, str]]
) -> tuple[str, bool] | None:
    for pattern, template, orientation in rules:
        if match := pattern.fullmatch(name):
            return template.format(*match.groups()), orientation == TRANSPOSED
    return None


def sizes_of(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of `T5Config`, all but ``logits_via_embedding``, from config.json's.

    Args:
      config: the content of config.json.
      where: its path, for messages.

    Raises:
      UserError: it describes no T5, or one that the network does not compute.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        why = REFUSED.get(str(kind), "which is no T5")
        raise UserError(
            f"{where} has model_type {kind!r}, {why}; give a T5, mT5 or ByT5 "
            "(model_type 't5' or 'mt5')"
        )
    result: dict[str, Any] = {}
    for field, size in SIZES:
        value = config.get(field)
        if value is None:
            depth = config.get("num_layers") if field == "num_decoder_layers" else None
            value = SIZE_DEFAULTS.get(field, depth)
        if type(value) is not int or value < 1:
            raise _unusable(where, field, value, "a whole number from 1 on")
        result[size] = value
    dropout = config.get("dropout_rate", DROPOUT_DEFAULT)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise _unusable(where, "dropout_rate", dropout, "a number from 0 to below 1")
    epsilon = config.get("layer_norm_epsilon", LAYER_NORM_EPSILON)
    if epsilon != LAYER_NORM_EPSILON:
        raise _unusable(where, "layer_norm_epsilon", epsilon, "1e-06, as of every T5")

    projection = config.get("feed_forward_proj", FEED_FORWARD_DEFAULTS[kind])
    gated, activation = str(projection).startswith("gated-"), str(projection)
    activation = activation.removeprefix("gated-")
    if projection == GATED_GELU:
        activation = GATED_GELU_ACTIVATION
    # Where transformers saved what it resolved the field to, it reads that.
    gated = config.get("is_gated_act", gated)
    activation = config.get("dense_act_fn", activation)
    known = [here for there, here in ACTIVATIONS if there == activation]
    if not known:
        names = ", ".join(there for there, _ in ACTIVATIONS)
        raise _unusable(where, "dense_act_fn", activation, f"one of {names}")
    activations = (*known, "linear") if gated else (*known,)
    return {**result, "mlp_activations": activations, "dropout_rate": float(dropout)}


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether config.json lets the output layer be the embedding table.

    Where it is silent, transformers up to version 4 takes T5 as tied and mT5 as not.
    Version 5 writes True for every model, also beside an output layer of its own.
    """
    return bool(config.get("tie_word_embeddings", config["model_type"] == "t5"))


def is_rescaled(config: Mapping[str, Any]) -> bool:
    """Whether the decoder's output is rescaled before the output layer, as in T5 1.0.

    Only together with the embedding table as output layer is this a T5:
    ``logits_via_embedding``. Up to version 4 of transformers it goes with being tied.
    Version 5 never rescales in mT5, and has a field of its own for T5.
    """
    if config["model_type"] == "mt5":
        version = str(config.get("transformers_version")).split(".")[0]
        return is_tied(config) and not (version.isdecimal() and int(version) >= 5)
    return bool(config.get("scale_decoder_outputs", is_tied(config)))


def config_of(sizes: T5Config, kind: str, dtype: str) -> dict[str, Any]:
    """The content of config.json for transformers of versions 4 and 5.

    Args:
      sizes: the architecture.
      kind: 't5' or 'mt5'. A tied mT5 becomes a 't5', which computes what it should in
        all versions.
      dtype: what `from_pretrained` makes of the weights.

    Raises:
      UserError: transformers has no such MLP.
    """
    names = {here: there for there, here in ACTIVATIONS}
    first, *rest = sizes.mlp_activations
    if first not in names or rest not in ([], ["linear"]):
        raise UserError(
            f"mlp_activations={sizes.mlp_activations} has no name in Hugging Face's "
            f"config.json; it has {', '.join(names)}, alone or followed by linear"
        )
    projection = f"gated-{names[first]}" if rest else names[first]
    if projection == f"gated-{GATED_GELU_ACTIVATION}":
        projection = GATED_GELU
    if sizes.logits_via_embedding:
        kind = "t5"
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        **{field: getattr(sizes, size) for field, size in SIZES},
        "dropout_rate": sizes.dropout_rate,
        "feed_forward_proj": projection,
        "is_encoder_decoder": True,
        "layer_norm_epsilon": LAYER_NORM_EPSILON,
        "tie_word_embeddings": sizes.logits_via_embedding,
        "torch_dtype": dtype,
        "use_cache": True,
        **SPECIAL_IDS,
    }


def _unusable(where: str, field: str, value: Any, cure: str) -> UserError:
    return UserError(f"{where} says {field}={value!r}, which must be {cure}")
