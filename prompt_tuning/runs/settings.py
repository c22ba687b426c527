# SPDX-License-Identifier: Apache-2.0
"""What a training run is told, as plain values; gin fills them under T5X's macro names."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import optax

from prompt_tuning.data import label_sets
from prompt_tuning.data.local_task import LocalTask
from prompt_tuning.data.vocabularies import Vocabulary
from prompt_tuning.devices.partitioner import Partitioner
from prompt_tuning.errors import UserError
from prompt_tuning.methods.method import Method
from prompt_tuning.network.losses import LABEL_LOSSES, PERCEPTRON
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import T5Config
from prompt_tuning.training.prompt_starts import PromptInit
from prompt_tuning.training.schedule import Schedule
from prompt_tuning.types import (
    ActivationDtype,
    BatchSize,
    FeatureLengths,
    LearningRates,
    NonNegativeFloat,
    PositiveInt,
    PromptLength,
    Rate,
    Seed,
    WeightDtype,
)

if TYPE_CHECKING:
    from prompt_tuning.runs.task_data import TaskData


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """The base model.

    Attributes:
      config: its sizes.
      initial_checkpoint_path: the base model, of any format (see
        `formats.open_model`), or ``embedded:NAME``.
      frozen_dtype: dtype of frozen weights: 'auto', 'float32', 'bfloat16', 'int8'.
      activation_dtype: dtype of the computation: 'auto', 'float32', 'bfloat16'.
    """

    config: T5Config
    initial_checkpoint_path: str
    frozen_dtype: WeightDtype = "auto"
    activation_dtype: ActivationDtype = "auto"


class TaskSource(Protocol):
    """Where a member's examples come from; `Data` is one.

    What `open` gives must have the attributes and methods of `TaskData`.
    """

    # How to tune without an evaluation split, for messages.
    without_evaluation: ClassVar[str]
    # It is a dataclass: variants of it are made by `dataclasses.replace`.
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def mixture_or_task_name(self) -> str: ...

    @property
    def task_feature_lengths(self) -> Mapping[str, int]: ...

    @property
    def train_split(self) -> str: ...

    @property
    def eval_split(self) -> str | None: ...

    @property
    def pack(self) -> bool: ...

    @property
    def label_scores(self) -> str: ...

    @property
    def template(self) -> str | None:
        """How a row becomes the inputs, where the task is described by it."""
        ...

    @property
    def key(self) -> tuple:
        """Equal for sources whose opened tasks may be shared."""
        ...

    def open(
        self,
        prompts: Sequence[Prompt],
        vocab_size: int,
        placement: str,
        models_vocabulary: Vocabulary | None,
    ) -> "TaskData":
        """The task with the prompts that its rows may carry."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """A registered seqio task or mixture, or local files that become one.

    Attributes:
      mixture_or_task_name: name of the task or mixture.
      task_feature_lengths: text tokens of ``inputs`` and ``targets``.
      mixture_or_task_module: the module that registers it.
      local_task: files to register as the task, if it is not a module's.
      train_split: split to tune on.
      eval_split: split that chooses the best step; None keeps the last step.
      pack: several examples a row.
      label_scores: how labels are compared, one of `label_sets.SCORES`.
      group_column: of local files, the column that holds each row's group.
    """

    mixture_or_task_name: str
    task_feature_lengths: FeatureLengths
    mixture_or_task_module: str | None = None
    local_task: LocalTask | None = None
    train_split: str = "train"
    eval_split: str | None = "validation"
    pack: bool = False
    label_scores: str = label_sets.SUM
    group_column: str | None = None
    without_evaluation: ClassVar[str] = "EVAL_SPLIT=None tunes without one"

    @property
    def template(self) -> str | None:
        """How a row becomes the inputs, where the task is described by it."""
        return None if self.local_task is None else self.local_task.template

    @property
    def key(self) -> tuple:
        """Equal for sources whose opened tasks may be shared."""
        return (
            self.mixture_or_task_name,
            self.mixture_or_task_module,
            tuple(sorted(self.task_feature_lengths.items())),
        )

    def open(
        self,
        prompts: Sequence[Prompt],
        vocab_size: int,
        placement: str,
        models_vocabulary: Vocabulary | None,
    ) -> "TaskData":
        """The task with the prompts that its rows may carry; loads TensorFlow.

        Raises:
          UserError: see `TaskData`.
        """
        from prompt_tuning.runs.task_data import TaskData

        return TaskData(
            self.mixture_or_task_name,
            self.mixture_or_task_module,
            self.local_task,
            self.task_feature_lengths,
            prompts,
            vocab_size,
            placement,
            models_vocabulary,
            self.label_scores,
            self.group_column,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """What moves, how, and where it starts.

    Attributes:
      method: what moves: a method, or its kind, such as 'prompt_tuning', for that with
        its default options.
      optimizer: moves the tuned leaves.
      prompt_length: positions of the prompt; 0 for methods without one. None is 100
        where there is one.
      prompt_init: how the prompt's rows start (see `prompt_starts.named` for texts); sampled
        vocabulary by default, if the method starts from rows.
      placement: where the prompt stands: 'prepend', 'append' or 'after_bos'.
    """

    method: Method | str
    optimizer: optax.GradientTransformation
    prompt_length: PromptLength | None = None
    prompt_init: PromptInit | str | None = None
    placement: str = "prepend"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss.

    Attributes:
      z_loss: weight of the z-loss.
      label_smoothing: probability taken off the target.
      loss_normalizing_factor: see `losses.weights_and_divisor`.
      label_loss: None teaches target tokens; 'cross_entropy' or 'perceptron' compares a
        task's labels as wholes.
      hinge: by how much the perceptron wants the right label to be the best.
      gap_weight: weight of the gap between the groups of ``Data.group_column``, see
        `losses.group_gap`.
    """

    z_loss: NonNegativeFloat = 1e-4
    label_smoothing: Rate = 0.0
    loss_normalizing_factor: str | float | None = None
    label_loss: str | None = None
    hinge: NonNegativeFloat = 0.2
    gap_weight: NonNegativeFloat = 0.0

    def __post_init__(self):
        if self.label_loss is None:
            return
        if self.label_loss not in LABEL_LOSSES:
            raise UserError(
                f"LABEL_LOSS={self.label_loss!r} must be None or one of "
                f"{', '.join(LABEL_LOSSES)}"
            )
        factor = self.loss_normalizing_factor
        if self.label_smoothing or isinstance(factor, str):
            name = "label_smoothing" if self.label_smoothing else repr(factor)
            raise UserError(
                f"LABEL_LOSS={self.label_loss!r} compares labels as wholes, and {name} "
                "is of target tokens: leave one out"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """What a run's numbers follow from; without what has no part in them."""
        values = dataclasses.asdict(self)
        if self.label_loss is None:
            del values["label_loss"]
        if self.label_loss != PERCEPTRON:
            del values["hinge"]
        if not self.gap_weight:
            del values["gap_weight"]
        return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A training run.

    Attributes:
      base: the base model.
      data: what to tune on.
      tuning: what moves.
      schedule: lengths and periods.
      batch_size: rows of a batch over all hosts.
      objective: the loss.
      seed: of the prompt, the order of the data and dropout.
      eval_batch_size: rows of an evaluation batch.
      num_eval_examples: evaluate on the first so many examples only.
      num_microbatches: parts of a batch whose gradients are added up.
      partitioner: how to spread over devices; by default a whole model on each.
      prompts: several prompts to tune side by side: for each, the values in which it
        differs from this run's own (see `prompt_lists` and `member_specs.OWN_VALUES`).
      optimizer_at: makes the optimizer at another learning rate, for ``prompts`` that
        give one and for ``rates``.
      rates: learning rates to try before the run (see `rate_trial`), which takes the
        best of them; None tries none.
      rate_trial: what a trial found, for the records.
      by_likelihood: evaluate by that of the right answers, not by the task's metrics.
      trackers: where records go beside the run's folder: 'mlflow', 'wandb', or objects
        (see `training.trackers`).
    """

    base: Base
    data: TaskSource
    tuning: Tuning
    schedule: Schedule
    batch_size: BatchSize = 32
    objective: Objective = Objective()
    seed: Seed = 0
    eval_batch_size: BatchSize = 64
    num_eval_examples: PositiveInt | None = None
    num_microbatches: PositiveInt = 1
    partitioner: Partitioner = dataclasses.field(default_factory=Partitioner)
    prompts: Sequence[Mapping[str, Any]] | None = None
    optimizer_at: Callable[[float], optax.GradientTransformation] | None = None
    trackers: Sequence[Any] = ()
    rates: LearningRates | None = None
    rate_trial: Mapping[str, Any] | None = None
    by_likelihood: bool = False
