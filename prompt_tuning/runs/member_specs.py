# SPDX-License-Identifier: Apache-2.0
"""What a training run knows of each of its members before it has loaded anything.

A run tunes one prompt, those that PROMPTS lists, each with values of its own, or the
whole model. All are members that differ in these values and in nothing else.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import optax

from prompt_tuning import values
from prompt_tuning.checkpoints import adapter_file, prompt_file
from prompt_tuning.data import splits
from prompt_tuning.data.label_sets import SUM
from prompt_tuning.data.splits import TRAIN
from prompt_tuning.errors import UserError
from prompt_tuning.methods import registry
from prompt_tuning.methods.method import Method
from prompt_tuning.runs.identity import describe_init, describe_optimizer
from prompt_tuning.runs.settings import Data, Settings, TaskSource
from prompt_tuning.training import prompt_lists, prompt_starts
from prompt_tuning.training.prompt_starts import PromptInit
from prompt_tuning.types import (
    BatchSize,
    FeatureLengths,
    LearningRate,
    PromptLength,
    Seed,
)

# The paper's.
USUAL_LENGTH = 100
# The name of every prompt where it is evaluated.
PROMPT = "prompt"
MODEL = MODEL_FOLDER = "model"
# What a run of one member writes, by what that is.
FILES = {
    "prompt": prompt_file.FILE,
    "adapter": adapter_file.FILE,
    MODEL: MODEL_FOLDER,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemberSpec:
    """The values of one member.

    Attributes:
      name: within the run.
      file: where its result goes, relative to MODEL_DIR.
      method: how it is tuned.
      data: what it is tuned on.
      batch_size: its rows of a batch.
      prompt_length: positions of its prompt; 0 where it is the model.
      prompt_init: how that starts.
      placement: where it stands in a row.
      optimizer: moves its leaves.
      seed: of its start and of the order of its data.
      own: the values that PROMPTS gives it.
    """

    name: str
    file: str
    method: Method
    data: TaskSource
    batch_size: int
    prompt_length: int
    prompt_init: PromptInit | str | None
    placement: str
    optimizer: optax.GradientTransformation
    seed: int
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_Start: TypeAlias = PromptInit | str | None
# What PROMPTS may set, and the values that it takes (see `values`).
OWN_VALUES: dict[str, Any] = {
    "mixture_or_task_name": str,
    "mixture_or_task_module": str | None,
    "task_feature_lengths": FeatureLengths,
    "train_split": str,
    "eval_split": str | None,
    "batch_size": BatchSize,
    "method": Method | str,
    "prompt_length": PromptLength,
    "prompt_init": _Start,
    "placement": str,
    "seed": Seed,
    "learning_rate": LearningRate,
}
_OF_PROMPTS = ("prompt_length", "prompt_init", "placement")
_OF_DATA = {field.name for field in dataclasses.fields(Data)}


def specs(settings: Settings) -> tuple[MemberSpec, ...]:
    """The members of a run.

    Raises:
      UserError: see `prompt_lists.expand`; a value is of the wrong kind or out of range;
        a method cannot do what is asked of it.
    """
    tuning = settings.tuning
    method = registry.named(tuning.method)
    common = MemberSpec(
        name=method.result,
        file=FILES[method.result],
        method=method,
        data=settings.data,
        batch_size=settings.batch_size,
        prompt_length=_length(settings, tuning.prompt_init) if method.has_prompt else 0,
        prompt_init=tuning.prompt_init,
        placement=tuning.placement,
        optimizer=tuning.optimizer,
        seed=settings.seed,
    )
    found = (common,)
    if settings.prompts is None:
        told = {
            "PROMPT_LENGTH": tuning.prompt_length,
            "PROMPT_INIT": tuning.prompt_init,
        }
        _refuse_unused(method, told, "")
    else:
        if method.result == "model":
            raise UserError(
                f"PROMPTS lists prompts, but {method.kind} tunes the model: leave "
                "PROMPTS out or use a method file of prompt tuning"
            )
        variants = prompt_lists.expand(settings.prompts, tuple(OWN_VALUES))
        found = tuple(_member(common, variant, settings) for variant in variants)
    for spec in found:
        if spec.method.has_prompt and spec.prompt_length < 1:
            raise UserError(
                f"PROMPT_LENGTH={spec.prompt_length} must be 1 or more: "
                f"{spec.method.kind} tunes a prompt"
            )
        if spec.prompt_length and spec.prompt_init and not spec.method.uses_rows:
            raise UserError(
                f"{spec.method.kind} has a start of its own: leave the file of prompts/ "
                "out, or prompt_init"
            )
    return found


def _member(
    common: MemberSpec, variant: prompt_lists.Variant, settings: Settings
) -> MemberSpec:
    """One of several prompts."""
    values.check_each(variant.values, OWN_VALUES, lambda key: f"PROMPTS: {key}")
    own = dict(variant.values)
    method = registry.named(own.get("method", common.method))
    if "learning_rate" in own:
        own["optimizer"] = _optimizer_at(
            own.pop("learning_rate"), variant.name, settings
        )
    if method.result == "model":
        raise UserError(
            f"PROMPTS: {variant.name!r} is no prompt: {method.kind} tunes the model"
        )
    told = {key: own.get(key) for key in _OF_PROMPTS}
    _refuse_unused(method, told, f"PROMPTS: {variant.name!r}: ")
    own["method"] = method
    length = own.get("prompt_length")
    if length is None and method.has_prompt:
        # A saved prompt of its own is as long as it is, however long others are.
        length = prompt_starts.length_of(own.get("prompt_init"))
        if length is None:
            length = _length(settings, common.prompt_init)
    own["prompt_length"] = length or 0
    of_data = {key: own.pop(key) for key in _OF_DATA & own.keys()}
    data = common.data
    if of_data.get("mixture_or_task_name", data.mixture_or_task_name) != (
        data.mixture_or_task_name
    ):
        # The files that a configuration describes are its own task's.
        of_data["local_task"] = None
    return dataclasses.replace(
        common,
        name=variant.name,
        file=f"{prompt_file.FOLDER}/{variant.name}.safetensors",
        data=dataclasses.replace(data, **of_data),
        own=variant.values,
        **own,
    )


def _length(settings: Settings, init: _Start) -> int:
    """The length of prompts that have none of their own, and start so."""
    given = settings.tuning.prompt_length
    if given is None:
        given = prompt_starts.length_of(init)
    return USUAL_LENGTH if given is None else given


def _refuse_unused(method: Method, told: Mapping[str, Any], where: str) -> None:
    """Refuses values of a prompt for a method that has none.

    Args:
      method: the method.
      told: the values that were given, by what they are called; others are None or 0.
      where: what stands before the message.

    Raises:
      UserError: names them.
    """
    unused = [f"{key}={word(value)!r}" for key, value in told.items() if value]
    if unused and not method.has_prompt:
        raise UserError(
            f"{where}{method.kind} has no prompt, so {' and '.join(unused)} would change "
            "nothing: leave out what is a prompt's"
        )


def _optimizer_at(
    rate: float, name: str, settings: Settings
) -> optax.GradientTransformation:
    """The optimizer of a prompt at its own rate.

    Raises:
      UserError: nothing makes an optimizer of it.
    """
    if settings.optimizer_at is None:
        raise UserError(
            f"prompt {name!r} has a learning_rate: give the settings an optimizer_at "
            "that makes the optimizer of it"
        )
    return settings.optimizer_at(rate)


def check_groups(settings: Settings, spec: MemberSpec) -> None:
    """Refuses groups that a member's batches cannot tell, or that do nothing.

    Raises:
      UserError: see there.
    """
    weight, data = settings.objective.gap_weight, spec.data
    column = data.group_column if isinstance(data, Data) else None
    local = data.local_task if isinstance(data, Data) else None
    balanced = None if local is None else local.balance
    if (column or balanced) and splits.name_of(data.train_split) != TRAIN:
        called = f"GROUP_COLUMN={column!r}" if column else f"BALANCE={balanced!r}"
        raise UserError(
            f"{called} is of the rows of {TRAIN!r}, and TRAIN_SPLIT is "
            f"{data.train_split!r}: call its file {TRAIN!r} in TASK_FILES"
        )
    if column is None:
        if weight:
            raise UserError(
                f"GAP_WEIGHT={weight} is of groups: name the column of your files that "
                "holds them in GROUP_COLUMN"
            )
    elif not weight:
        raise UserError(
            f"GROUP_COLUMN={column!r} does nothing in training without GAP_WEIGHT: "
            "give a weight, such as 1, or leave it out"
        )
    elif local is None:
        raise UserError(
            f"GROUP_COLUMN={column!r} is a column of local files, and "
            f"{data.mixture_or_task_name} is a registered task: leave it out"
        )
    elif data.pack or settings.num_microbatches > 1:
        cut = "PACK=True" if data.pack else "NUM_MICROBATCHES"
        raise UserError(
            f"GAP_WEIGHT compares groups over all rows of a batch, and {cut} leaves no "
            "such rows: leave one out"
        )


def identity(spec: MemberSpec, content: Mapping[str, str]) -> dict[str, Any]:
    """What a member's numbers follow from, as JSON.

    Args:
      spec: the member.
      content: what tells the data of each of its splits from others.
    """
    data = spec.data
    return {
        "task": data.mixture_or_task_name,
        "task_feature_lengths": dict(data.task_feature_lengths),
        "template": data.template,
        "pack": data.pack,
        **({} if data.label_scores == SUM else {"label_scores": data.label_scores}),
        "content": dict(content),
        "method": spec.method.describe(),
        "batch_size": spec.batch_size,
        "prompt_length": spec.prompt_length,
        "prompt_init": describe_init(spec.prompt_init) if spec.prompt_length else None,
        "placement": spec.placement,
        "seed": spec.seed,
        **describe_optimizer(spec.optimizer),
    }


def word(value: Any) -> Any:
    """A value of PROMPTS as JSON."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Method):
        return value.describe()
    return getattr(value, "__qualname__", value)
