# SPDX-License-Identifier: Apache-2.0
"""Lets T5X train, evaluate and infer with our network, converter and prompt.

T5X keeps its own `EncoderDecoderModel`, `PjitPartitioner`, optimizers and checkpoints.
What it needs of a network is here: T5X's tree of parameters with every layer apart, the
collection ``params_axes``, and the prompt under the name that the original prompt tuning
code gave it, so that checkpoints go both ways. configs/t5x/ puts the pieces together;
nothing else of this package imports this module, because T5X is not a requirement.
"""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import seqio
from flax import traverse_util
from flax.linen.partitioning import AxisMetadata

from prompt_tuning import report, trees
from prompt_tuning.checkpoints import formats, layout, prompt_formats
from prompt_tuning.data import examples
from prompt_tuning.data.feature_converter import Placement, PromptFeatureConverter
from prompt_tuning.errors import UserError
from prompt_tuning.methods import initializers, registry
from prompt_tuning.network import transformer
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import T5Config
from prompt_tuning.training.prompt_starts import PromptInit
from prompt_tuning.types import Array, Initializer, Params

try:
    from t5x import state_utils
except ImportError as error:
    raise ImportError(
        f"prompt_tuning.t5x_adapter needs T5X ({error}): install it from its git "
        "repository as docs/t5x.md says"
    ) from error

PROMPT = "prompt"
# The original project's name of the prompt, and ours.
T5X_PROMPT = "encoder/prompt/prompt/prompt"
_TO_T5X = {f"prompts/{PROMPT}": T5X_PROMPT}
_FROM_T5X = {T5X_PROMPT: f"prompts/{PROMPT}"}
TARGET = "target/"  # where T5X's states keep the parameters


def stack(params: Params) -> dict[str, Any]:
    """T5X's tree of parameters as the network has it; for use in traced programs."""
    flat = trees.flatten(params)
    return trees.unflatten(
        {
            _FROM_T5X.get(name, name): flat[name]
            if name in flat
            else jnp.stack([flat[layer] for layer in layers])
            for name, layers in layout.groups(flat).items()
        }
    )


def unstack(params: Params) -> dict[str, Any]:
    """Inverse of `stack`."""
    flat = layout.unstack(trees.flatten(params))
    return trees.unflatten({_TO_T5X.get(name, name): x for name, x in flat.items()})


def _prompts(length: int) -> tuple[Prompt, ...]:
    return (Prompt(PROMPT, length),) if length else ()


class Transformer(nn.Module):
    """Our network under T5X's names.

    `__call__`, `encode` and `decode` are those of `transformer.Transformer`. Its parameters
    lie here in T5X's tree and are stacked within the compiled program.

    Attributes:
      config: the sizes.
      prompt_length: length P of the prompt, 0 for none.
      prompt_init: how the prompt starts where no checkpoint holds it; by default
        uniform in ``[-0.5, 0.5]``.
    """

    config: T5Config
    prompt_length: int = 0
    prompt_init: Initializer | None = None
    # What T5X's decoding asks for: the cache has an axis of layers before the batch.
    scan_layers: ClassVar[bool] = True

    @property
    def wrapped(self) -> transformer.Transformer:
        """The network that does the work."""
        prompts = _prompts(self.prompt_length)
        return transformer.Transformer(self.config, prompts, parent=None)

    def __call__(self, *args: Array, **kwargs: Any) -> Array:
        """Teacher-forced logits ``[B, S, V]``."""
        if self.is_initializing():
            self._initialize()
        return self._run("__call__", *args, **kwargs)

    def encode(self, *args: Array, **kwargs: Any) -> Array:
        """The encoder's output ``[B, T, H]``."""
        return self._run("encode", *args, **kwargs)

    def decode(self, *args: Array, **kwargs: Any) -> Array:
        """Logits ``[B, S, V]`` from the encoder's output."""
        return self._run("decode", *args, **kwargs)

    def _run(self, method: str, *args: Array, **kwargs: Any) -> Array:
        variables: dict[str, Any] = {"params": stack(self.variables["params"])}
        # T5X makes its cache with inputs that are not the real ones, so what the
        # network remembers of the encoder's output must not outlive the call.
        mutable = ["memory"]
        if self.is_mutable_collection("cache"):
            variables["cache"] = self.variables.get("cache", {})
            mutable.append("cache")
        rngs = {name: self.make_rng(name) for name in ["dropout"] if self.has_rng(name)}
        result, changed = self.wrapped.apply(
            variables, *args, method=method, rngs=rngs, mutable=mutable, **kwargs
        )
        for name, value in ((changed or {}).get("cache") or {}).items():
            self.put_variable("cache", name, value)
        return result

    def _initialize(self) -> None:
        """Fills the collections ``params`` and ``params_axes``."""
        model = Model(self.wrapped)
        params = dict(model.init(self.make_rng("params")))
        if self.prompt_length and self.prompt_init is not None:
            shape = (self.prompt_length, self.config.emb_dim)
            prompt = self.prompt_init(self.make_rng("params"), shape, jnp.float32)
            params["prompts"] = {PROMPT: prompt}
        for name, subtree in unstack(params).items():
            self.put_variable("params", name, subtree)
        for name, subtree in _axes(model).items():
            self.put_variable("params_axes", name, subtree)


def _axes(model: Model) -> dict[str, Any]:
    """The logical axes of every parameter, as T5X expects them beside ``params``."""
    axes = {}
    for name, box in trees.flatten(model.abstract_params()).items():
        layers = layout.layer_names(name, box.value.shape)
        names = box.names if layers is None else box.names[1:]
        for one in layers or [_TO_T5X.get(name, name)]:
            axes[f"{one}_axes"] = AxisMetadata(tuple(names))
    return trees.unflatten(axes)


def tuned_params(method: str = "prompt_tuning") -> traverse_util.ModelParamTraversal:
    """Selects what a method tunes, for T5X's `MultiOptimizer`.

    What it does not select has no optimizer state and never changes.

    Raises:
      UserError: no method is called so, or it makes prompts of leaves that T5X's
        network has no place for.
    """
    found = registry.named(method)
    if not found.is_plain:
        raise UserError(
            f"T5X's network has no leaves for {method}; train it with `prompt-tuning "
            "train`, or choose prompt_tuning or model_tuning"
        )

    def is_tuned(path: str, _: Any) -> bool:
        name = path.removeprefix("/")
        if match := layout.LAYER.fullmatch(name):
            name = f"{match[1] or ''}layers/{match[3]}"
        label = trees.first_match(found.rules, _FROM_T5X.get(name, name))
        return label == registry.TUNED

    return traverse_util.ModelParamTraversal(is_tuned)


def restored(
    checkpoint: Mapping[str, Any],
    model: Mapping[str, Any],
    *,
    new_prompt: bool = True,
    is_resuming: bool = False,
) -> dict[str, Any]:
    """Lets T5X fill in the prompt of a restored state, and nothing else.

    It is one of the ``state_transformation_fns`` of T5X's `RestoreCheckpointConfig`,
    whose ``fallback_to_scratch`` would otherwise initialise whatever a checkpoint lacks.

    Args:
      checkpoint: the state that was found, as T5X read it.
      model: the state that the model needs.
      new_prompt: whether the prompt, with its optimizer state, starts anew instead of
        coming from the checkpoint.
      is_resuming: T5X says so of the run's own checkpoints, which are taken whole.

    Returns:
      The parameters and statistics of ``checkpoint`` that the model has a place for.

    Raises:
      UserError: parameters are missing, unused or of another shape; all are listed.
    """
    if is_resuming:
        return dict(checkpoint)
    found, wanted = (
        {
            name: leaf
            for name, leaf in state_utils.flatten_state_dict(state).items()
            if not (new_prompt and T5X_PROMPT in name)
        }
        for state in (checkpoint, model)
    )
    both = found.keys() & wanted.keys()
    kinds = {
        "missing": wanted.keys() - both,
        "unused": found.keys() - both,
        "of another shape": {
            n for n in both if _shape(found[n]) not in (None, _shape(wanted[n]))
        },
    }
    problems = []
    for kind, names in kinds.items():
        params = sorted(n.removeprefix(TARGET) for n in names if n.startswith(TARGET))
        if params:
            problems.append(f"{kind}: {', '.join(layout.collapse(params))}")
    if problems:
        raise UserError(
            f"the checkpoint does not fit the model; {'; '.join(problems)}; choose the "
            "checkpoint and the model file of one and the same size and architecture, "
            "and the PROMPT_LENGTH of its prompt"
        )
    return traverse_util.unflatten_dict({n: found[n] for n in both}, sep="/")


def _shape(leaf: Any) -> tuple[int, ...] | None:
    """A tensor's shape; None in an Orbax checkpoint, where the network will check it."""
    if isinstance(leaf, Mapping):  # a TensorStore spec
        leaf = leaf.get("metadata", {})
        return tuple(leaf["shape"]) if "shape" in leaf else None
    return tuple(leaf.shape) if hasattr(leaf, "shape") else None


def feature_converter(
    pack: bool,
    use_custom_packing_ops: bool = False,
    *,
    config: T5Config,
    task_feature_lengths: Mapping[str, int],
    prompt_length: int,
    placement: str = Placement.PREPEND,
) -> PromptFeatureConverter:
    """The converter that T5X asks a model for; rows are never longer than in training.

    Args:
      pack: whether rows hold several examples.
      use_custom_packing_ops: T5X's flag; must be False.
      config: the sizes of the network.
      task_feature_lengths: text tokens of ``inputs`` and ``targets``.
      prompt_length: length P of the prompt, 0 for none.
      placement: where the prompt stands (see `feature_converter.Placement`).
    """
    if use_custom_packing_ops:
        raise UserError(
            "prompts are packed without: set use_custom_packing_ops = False"
        )
    prompts = _prompts(prompt_length)
    converter = PromptFeatureConverter(prompts, config.vocab_size, placement, pack=pack)
    return converter.limited_to(task_feature_lengths["inputs"])


def vocabulary(mixture_or_task_name: str, module: str | None) -> seqio.Vocabulary:
    """A task's vocabulary, so that the model's need not be written down again."""
    provider = examples.find(mixture_or_task_name, module)
    return provider.output_features["targets"].vocabulary


def initial_prompt(
    init: PromptInit, checkpoint_path: str, vocabulary: seqio.Vocabulary, seed: int = 0
) -> Initializer:
    """One of `prompt_starts`, with a checkpoint's embedding table and its vocabulary."""

    @functools.cache
    def start(shape: tuple[int, ...]) -> np.ndarray:
        # T5X asks while it traces. The prompt may become a constant of its program,
        # the table must not.
        with jax.ensure_compile_time_eval():
            source = formats.open_model(checkpoint_path)
            table = source.read("token_embedder/embedding").astype(np.float32)
            make = init(table, vocabulary.encode, vocabulary.unk_id)  # pyright: ignore[reportArgumentType]
            return np.asarray(make(jax.random.key(seed), shape, jnp.float32))

    return lambda key, shape, dtype: jnp.asarray(start(tuple(shape)), dtype)


def saved_prompt(path: str | None) -> Initializer | None:
    """A prompt from a file of any format that `prompt_formats` knows; None for none."""
    if path is None:
        return None
    array, card = prompt_formats.load(path)
    for note in card.get("notes", ()):
        report.say(note)
    return initializers.from_saved(array)  # pyright: ignore[reportArgumentType]
