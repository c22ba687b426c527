# SPDX-License-Identifier: Apache-2.0
"""``tune``: a prompt or adapter from examples in memory, by the command line's loop."""

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from prompt_tuning import files, plots, prompt_names, report
from prompt_tuning.checkpoints import cards
from prompt_tuning.checkpoints.base_models import BaseModel
from prompt_tuning.data import label_sets
from prompt_tuning.data import metrics as task_metrics
from prompt_tuning.data.label_sets import LabelNames
from prompt_tuning.data.metrics import Metric
from prompt_tuning.data.splits import TRAIN, VALIDATION
from prompt_tuning.errors import UserError
from prompt_tuning.library import checks, models, rows
from prompt_tuning.library.memory_task import MemoryData, MemoryTask
from prompt_tuning.library.tuned_prompt import TunedPrompt
from prompt_tuning.methods.method import Method
from prompt_tuning.network import losses
from prompt_tuning.runs import identity, rate_trial
from prompt_tuning.runs import tune as runs
from prompt_tuning.runs.settings import Base, Objective, Settings, Tuning
from prompt_tuning.training import optimizers, prompt_starts
from prompt_tuning.training.prompt_starts import PromptInit
from prompt_tuning.training.schedule import Schedule
from prompt_tuning.training.trackers import Given

LENGTH = 20


class Picture(bytes):
    """A picture, PNG, which notebooks show."""

    def _repr_png_(self) -> bytes:
        return bytes(self)


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What `tune` ends with.

    Attributes:
      prompts: the tuned prompts by name, the best first.
      results: metrics, best steps, versions: what ``results.json`` says.
      learning_rate: what it was tuned with, where all prompts share one.
      folder: where its records lie.
    """

    prompts: Mapping[str, TunedPrompt]
    results: Mapping[str, Any]
    learning_rate: float
    folder: pathlib.Path
    _temporary: tempfile.TemporaryDirectory | None = None

    @property
    def prompt(self) -> TunedPrompt:
        """The best prompt."""
        return next(iter(self.prompts.values()))

    @property
    def metrics(self) -> dict[str, float]:
        """The best prompt's on the validation split; empty without one."""
        return dict(self.prompt.card["metric"])

    @property
    def records(self) -> list[dict[str, Any]]:
        """Loss, metrics and pace by step."""
        return report.read_metrics(self.folder)

    def save(self, path: files.Path, format: str = "native") -> pathlib.Path:
        """Writes the best prompt; see `TunedPrompt.save`."""
        return self.prompt.save(path, format)

    def plot(self, path: files.Path | None = None) -> Picture:
        """The learning curve, as a picture that notebooks show.

        Args:
          path: a PNG to write it to, as well.

        Raises:
          UserError: the picture cannot be written.
        """
        drawn = plots.learning_curve(self.folder, self.results["members"])
        if drawn is None:
            raise UserError("the run has no records, so there is nothing to draw")
        picture = Picture(drawn.read_bytes())
        if path is not None:
            with files.replacing(path) as temporary:
                temporary.write_bytes(picture)
        return picture

    def __repr__(self) -> str:
        return f"Run({', '.join(map(repr, self.prompts.values()))})"


@checks.in_argument_names()
def tune(
    base: BaseModel,
    train: Any,
    *,
    validation: Any = None,
    labels: LabelNames | None = None,
    template: str | None = None,
    target_column: str = "label",
    name: str = "prompt",
    method: Method | str = "prompt_tuning",
    length: int | None = None,
    init: PromptInit | str | None = None,
    placement: str = "prepend",
    steps: int = 1000,
    batch_size: int = 32,
    learning_rate: float | Sequence[float] | None = None,
    learning_rate_factors: str = optimizers.DECAYED,
    seed: int = 0,
    prompts: Sequence[Mapping[str, Any]] | None = None,
    metrics: Sequence[str | Metric] = ("accuracy",),
    label_scores: str = label_sets.SUM,
    label_loss: str | None = losses.CROSS_ENTROPY,
    eval_period: int | None = None,
    patience: int = 0,
    input_length: int | None = None,
    folder: files.Path | None = None,
    allow_changes: bool = False,
    trackers: Sequence[Given] = (),
    quiet: bool = False,
) -> Run:
    """Tunes a soft prompt, an adapter, or several of them, on a frozen model.

    Args:
      base: what `load` gave.
      train: (text, answer) pairs, dicts, a pandas frame, or one split of a data set of
        Hugging Face's ``datasets``.
      validation: likewise; it chooses the best step. Without it the last one is kept.
      labels: the answers to choose from; value i of the examples may stand for label i,
        and a mapping says what values stand for. None takes the names that a data set
        gives its classes, or free text.
      template: the inputs, ``{column}`` standing for a value; by default ``{text}``.
      target_column: of dicts, frames and data sets, the column of the answer.
      name: what the prompt is called.
      method: what is tuned: the kind of a method, such as 'lora' or 'p_tuning', or one
        with options of its own, such as ``LoRA(rank=4)``.
      length: positions of the prompt, of methods that have one; by default those of a
        saved prompt that it starts from, else 20.
      init: how it starts (see `prompt_starts.named`), where the method starts from rows;
        by default at the labels, or at common pieces where there are none.
      placement: 'prepend', 'append' or 'after_bos', unless the template places it.
      steps: length of training.
      batch_size: rows of a batch.
      learning_rate: of Adafactor. None tries five around the method's usual one and a
        list its own values side by side, by successive halving, and takes the one with
        the highest likelihood of the right answers (see `runs.rate_trial`).
      learning_rate_factors: its course (see `optimizers.decayed`); by default it is
        warmed up over a tenth of the steps and falls to zero at the last one. A run that
        is to go on for more steps than it was begun with wants 'constant'.
      seed: of the start and the order of examples.
      prompts: several prompts to tune side by side, each a dict of what is its own
        (`checks.OWN_VALUES`); a list of values stands for a prompt of each.
      metrics: names among `metrics.METRICS`, or functions of targets and answers that
        give values by name, the higher the better.
      label_scores: how labels are compared: 'sum', by their likelihood, or 'mean', by
        its mean over a label's tokens, in which long labels do not lose for their length.
      label_loss: how examples with labels are taught: by comparing all labels of a row
        ('cross_entropy' or 'perceptron'), or None, by the tokens of the right one, which
        is cheaper with hundreds of labels. Free answers always are taught by their tokens.
      eval_period: steps between evaluations; by default a tenth of ``steps``.
      patience: evaluations without a better metric after which training stops; 0 trains
        to the end.
      input_length: text tokens that inputs are cut to; by default nothing is cut.
      folder: keeps checkpoints and records, so that the same call resumes.
      allow_changes: resume a run of the folder although it differs from this one.
      trackers: where records go as well: 'mlflow', 'wandb', or objects such as the
        writers of ``clu.metric_writers`` (see `training.trackers`).
      quiet: no progress bar.

    Raises:
      UserError: examples or a value are unsound, or do not fit the model.
    """
    vocabulary = models.vocabulary_of(base)
    objective = Objective(label_loss=label_loss)
    if isinstance(metrics, str):
        raise UserError(f"metrics={metrics!r} must be a list of names or functions")
    labels = rows.found_labels(train, target_column, labels)
    names = rows.label_names(labels)
    read = functools.partial(
        rows.read, template=template, target_column=target_column, labels=labels
    )
    splits = {TRAIN: read(train, TRAIN)}
    rows.check_labels(splits[TRAIN], names, TRAIN)
    if validation is not None:
        splits[VALIDATION] = read(validation, VALIDATION)
        task_metrics.check_targets(metrics, splits[VALIDATION].answers, VALIDATION)
        rows.warn_of_shared(splits[TRAIN], splits[VALIDATION])
    task = MemoryTask(
        prompt_names.check(name),
        splits,
        vocabulary,
        labels=names,
        template=template,
        metrics=task_metrics.by_name(metrics, names),
        input_length=input_length,
        label_scores=label_scores,
    )
    data = MemoryData(
        task=task, eval_split=VALIDATION if validation is not None else None
    )
    method, own_values = checks.method(method), checks.own_values(prompts)
    methods = checks.methods(method, own_values)
    own_starts = [
        each.kind for each in methods if not (each.has_prompt and each.uses_rows)
    ]
    if length is not None:
        length = checks.whole(length, "length", most=cards.LARGEST)
    elif any(each.has_prompt for each in methods):
        length = prompt_starts.length_of(init) or LENGTH
    if init is not None and own_starts:
        raise UserError(
            f"init={init!r} is for prompts that start from rows, and {own_starts[0]} has "
            "a start of its own: leave init out"
        )
    if init is None and not own_starts:
        init = (
            "class_labels"
            if names and len(names) <= (length or LENGTH)
            else "sampled_vocab"
        )
    schedule = Schedule(steps, eval_period, patience=patience)
    optimizer_at = functools.partial(
        optimizers.decayed, steps=steps, factors=learning_rate_factors
    )
    rates = checks.rates(learning_rate, optimizers.rates_around(method.learning_rate))
    tuning = functools.partial(
        Tuning,
        method=method,
        prompt_length=length,
        prompt_init=init,
        placement=placement,
    )
    settings = Settings(
        base=Base(
            config=base.config,
            initial_checkpoint_path=base.path,
            frozen_dtype=models.frozen_dtype(base),  # pyright: ignore[reportArgumentType]
            activation_dtype=str(base.config.dtype),  # pyright: ignore[reportArgumentType]
        ),
        data=data,  # pyright: ignore[reportArgumentType]
        tuning=tuning(optimizer=optimizer_at(rates[0])),
        objective=objective if names else Objective(),
        schedule=schedule,
        batch_size=checks.whole(batch_size, "batch_size"),
        seed=checks.whole(seed, "seed", 0, 2**32 - 1),
        prompts=own_values,
        optimizer_at=optimizer_at,
        trackers=trackers,
    )
    if base.partitioner is not None:
        settings = dataclasses.replace(settings, partitioner=base.partitioner)
    temporary = None
    if folder is None:
        temporary = tempfile.TemporaryDirectory(prefix="prompt_tuning_")
    place = pathlib.Path(temporary.name if temporary is not None else folder or "")
    own_rates = prompts is not None and all("learning_rate" in each for each in prompts)
    rate, tasks = rates[0], None
    if len(rates) > 1 and not own_rates:
        settings = dataclasses.replace(settings, rates=rates)
        trial = rate_trial.run(
            settings,
            None if temporary is not None else place,
            base,
            allow_changes=allow_changes,
            quiet=quiet,
        )
        settings, tasks = trial.settled(settings), trial.tasks
        rate = trial.record["chosen"]
    if temporary is not None:
        schedule = dataclasses.replace(
            settings.schedule, checkpoint_period=0, checkpoint_seconds=0
        )
        settings = dataclasses.replace(settings, schedule=schedule)
    loaded = runs.load(runs.plan(settings), base, tasks)
    identity.open_folder(str(place), loaded.identity, allow_changes=allow_changes)
    found = runs.run(loaded, place, quiet=quiet)
    if temporary is None:
        results = runs.write(loaded, found, place)
    else:
        results = runs.report_on(loaded, found, loaded.facts)
    facts = loaded.facts | {k: results[k] for k in ("changes",) if k in results}
    tuned = {
        own: TunedPrompt(name if prompts is None else own, *saved)
        for own, saved in runs.saved(loaded, found, facts).items()
    }
    ranked = [row["name"] for row in results["members"] if row["name"] in tuned]
    return Run(
        {tuned[own].name: tuned[own] for own in ranked}, results, rate, place, temporary
    )
