# SPDX-License-Identifier: Apache-2.0
"""A training run from its settings to its results: plan, load, run, write.

Each is a function of what the one before gave, and writes nothing outside of the
folder that `run` and `write` are given::

    plan = tune.plan(settings)          # checks all that can be checked before loading
    loaded = tune.load(plan)            # base model, data, starts
    folder = identity.open_folder(model_dir, loaded.identity)
    found = tune.run(loaded, folder)    # trains; resumes from what the folder holds
    results = tune.write(loaded, found, folder)
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning import dtypes, files, plots, processes, report, trees
from prompt_tuning.checkpoints import base_models, formats, loading
from prompt_tuning.checkpoints.base_models import BaseModel
from prompt_tuning.checkpoints.prompt_formats import Saved
from prompt_tuning.data import label_sets
from prompt_tuning.devices import sharding, topologies
from prompt_tuning.errors import UserError
from prompt_tuning.methods import registry
from prompt_tuning.methods.method import HELD, Start
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import Transformer
from prompt_tuning.planning import checks
from prompt_tuning.planning.workload import Workload
from prompt_tuning.runs import costs, identity, member_specs, outcomes
from prompt_tuning.runs.member_specs import MemberSpec
from prompt_tuning.runs.member_tasks import MemberTasks
from prompt_tuning.runs.settings import Settings
from prompt_tuning.training import loop, prompt_starts, trackers
from prompt_tuning.training.members import Batches, Member, Result
from prompt_tuning.training.tracked_records import Records
from prompt_tuning.types import Params


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run that has been found sound as far as its settings go.

    Attributes:
      settings: what it was told.
      members: those that it tunes.
      weights_dtype: what the base model's weights are kept in.
      work: its largest step.
    """

    settings: Settings
    members: tuple[MemberSpec, ...]
    weights_dtype: str
    work: Workload


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A run that is ready to start.

    Attributes:
      plan: what it was made of.
      base: the base model.
      model: network and objective.
      frozen: the leaves that nobody moves, with what methods hold (see `Method.held`).
      members: with their starts, optimizers and data, in the order of the plan.
      tasks: theirs.
    """

    plan: Plan
    base: BaseModel
    model: Model
    frozen: Params
    members: tuple[Member, ...]
    tasks: MemberTasks

    @property
    def identity(self) -> dict[str, Any]:
        """What the run's numbers follow from (see `identity`)."""
        settings = self.plan.settings
        return {
            "base_model": self.base.fingerprint,
            "weights_dtype": self.plan.weights_dtype
            + ", int8 products" * self.base.config.int8_products,
            "objective": settings.objective.identity,
            "seed": settings.seed,
            **self._held,
            identity.STEPS: settings.schedule.steps,
            "members": {
                spec.name: member_specs.identity(spec, self.tasks.content(spec))
                for spec in self.plan.members
            },
        }

    @property
    def _held(self) -> dict[str, str]:
        """What tells arrays that methods hold from others."""
        if any(spec.method.result == "model" for spec in self.plan.members):
            return {}  # Parts of the base model, whose own fingerprint says all.
        own = self.frozen.get(HELD)
        return {} if own is None else {HELD: trees.fingerprint(own)}

    @property
    def facts(self) -> dict[str, Any]:
        """What results and cards say of the whole run."""
        settings = self.plan.settings
        trial = settings.rate_trial
        return {
            "method": registry.named(settings.tuning.method).describe(),
            "base_model": self.base.identity,
            "seed": settings.seed,
            **({} if trial is None else {"learning_rate": dict(trial)}),
            "versions": report.versions(),
        }


def plan(settings: Settings) -> Plan:
    """Checks all that can be checked before anything is loaded.

    Raises:
      UserError: a value is none, or does not fit the devices.
    """
    tuning, base, partitioner = settings.tuning, settings.base, settings.partitioner
    weights_dtype = registry.weights_dtype(tuning.method, base.frozen_dtype)
    members = member_specs.specs(settings)
    if settings.schedule.patience and all(
        spec.data.eval_split is None for spec in members
    ):
        raise UserError(
            f"EARLY_STOPPING_PATIENCE={settings.schedule.patience} waits for evaluations, "
            "and there is no split for them: leave it out, or give one"
        )
    if settings.objective.label_loss and any(spec.data.pack for spec in members):
        raise UserError(
            "LABEL_LOSS compares the labels of whole rows, and PACK=True puts several "
            "examples into each: leave one out"
        )
    for spec in members:
        member_specs.check_groups(settings, spec)
    trackers.named(settings.trackers)
    if len(members) == 1:
        # The rows of several are filled up to what the devices share.
        partitioner.check_batch(members[0].batch_size, settings.num_microbatches)
    partitioner.check_eval_batch(settings.eval_batch_size)
    longest = {
        name: max(spec.data.task_feature_lengths.get(name, 0) for spec in members)
        for name in ("inputs", "targets")
    }
    floats = weights_dtype != dtypes.INT8
    frozen_dtype = base_models.resolve_dtype(weights_dtype) if floats else weights_dtype
    dtype = base_models.resolve_dtype(base.activation_dtype)
    # Rows are as long as the longest prompt makes them.
    first, *others = sorted(members, key=lambda spec: -spec.prompt_length)
    work = Workload(
        config=dataclasses.replace(base.config, dtype=dtype),
        batch_size=sum(spec.batch_size for spec in members),
        inputs=longest["inputs"],
        targets=longest["targets"],
        optimizer=tuning.optimizer,
        method=first.method,
        prompt_length=first.prompt_length,
        others=tuple((spec.method, spec.prompt_length) for spec in others),
        frozen_dtype=frozen_dtype,
        num_partitions=partitioner.mesh.shape[sharding.MODEL],
        parameter_partitioning_dims=partitioner.parameter_partitioning_dims,
        num_microbatches=settings.num_microbatches,
        label_loss=settings.objective.label_loss,
    )
    checks.check_room(work, topologies.parse(topologies.LOCAL))
    return Plan(settings, members, weights_dtype, work)


def load(
    planned: Plan, base: BaseModel | None = None, tasks: MemberTasks | None = None
) -> Loaded:
    """Reads the data and the base model, unless they are given, and the members' starts.

    Raises:
      UserError: the data or the model are missing, or do not fit.
    """
    settings, specs = planned.settings, planned.members
    config = settings.base.config
    checkpoint: Any = settings.base.initial_checkpoint_path
    if base is None:
        # Opened before the data is read, loaded after it: what is wrong is said early.
        checkpoint = base_models.open_checkpoint(checkpoint)
        loading.check_sizes(checkpoint, config)
    vocabulary = base.vocabulary if base else formats.vocabulary(checkpoint.path)
    tasks = tasks or MemberTasks(config.vocab_size, vocabulary)
    batches = []
    for spec in specs:
        with report.doing(f"reading {spec.data.mixture_or_task_name}"):
            draw = _draw(tasks, spec)
            if settings.objective.label_loss is not None:
                draw = _with_labels(draw, tasks, spec)
            batches.append(draw)
    if base is None:
        with report.doing(f"loading {settings.base.initial_checkpoint_path}"):
            base = base_models.load(
                config,
                checkpoint,
                frozen_dtype=planned.weights_dtype,
                activation_dtype=settings.base.activation_dtype,
                partitioner=settings.partitioner,
            )
    bank = tuple(
        Prompt(spec.name, spec.prompt_length) for spec in specs if spec.prompt_length
    )
    model = Model(
        Transformer(base.config, bank),
        members=tuple(spec.name for spec in specs) if len(specs) > 1 else (),
        mean_scores=any(s.data.label_scores == label_sets.MEAN for s in specs),
        **dataclasses.asdict(settings.objective),
    )
    frozen = base.params
    starts: dict[str, Params] = {}
    held: dict[str, Params] = {}
    for spec in specs:
        if spec.method.result == "model":
            starts[spec.name], frozen = spec.method.split(base.params)
        else:
            starts[spec.name], own = start(base, tasks, spec)
            if own:
                held[spec.name] = own
    if held:
        own = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), held)
        if base.mesh is not None:
            own = sharding.replicate(own, base.mesh)
        frozen = {**frozen, HELD: own}
    members = [
        Member(
            name=spec.name,
            tuned=starts[spec.name],
            tx=spec.method.optimizer(spec.optimizer),
            batches=draw,
            evaluate=tasks.evaluate(
                spec,
                model,
                base.mesh,
                settings.eval_batch_size,
                settings.num_eval_examples,
                by_likelihood=settings.by_likelihood,
            ),
            materialize=spec.method.materialize,
            **spec.method.beside_examples,
        )
        for spec, draw in zip(specs, batches, strict=True)
    ]
    return Loaded(planned, base, model, frozen, tuple(members), tasks)


def _draw(tasks: MemberTasks, spec: MemberSpec) -> Batches:
    """A member's training batches, once its splits have been found sound.

    Raises:
      UserError: a split cannot be used.
    """
    task, data = tasks.of(spec), spec.data
    batches = task.batches(data.train_split, spec.batch_size, spec.seed, pack=data.pack)
    tasks.fill(spec)
    if data.eval_split is not None:
        try:
            task.check(data.eval_split)
        except UserError as error:
            raise UserError(f"{error}; {data.without_evaluation}") from error
    return batches


def _with_labels(draw: Batches, tasks: MemberTasks, spec: MemberSpec) -> Batches:
    """Batches whose rows have their labels, too.

    Raises:
      UserError: the task has none.
    """
    task, name = tasks.of(spec), spec.data.mixture_or_task_name
    if not task.labels:
        raise UserError(
            f"LABEL_LOSS compares labels, and {name} has no label set: leave it out, or "
            "give a task of files its LABEL_NAMES"
        )
    tokens = label_sets.label_tokens(task.labels, task.vocabulary)
    return lambda start: label_sets.with_labels(draw(start), tokens, name)


def run(
    loaded: Loaded, folder: pathlib.Path | None = None, *, quiet: bool = False
) -> dict[str, Result]:
    """Trains, from where the folder's newest checkpoint stands.

    Returns:
      What each member ends with; one whose loss was not finite is left out.

    Raises:
      UserError: see `loop.fit`.
    """
    settings = loaded.plan.settings
    records = None
    if settings.trackers and folder is not None:
        records = Records(
            trackers.named(settings.trackers), folder, loaded.identity | loaded.facts
        )
    return loop.fit(
        loaded.model,
        loaded.frozen,
        loaded.members,
        settings.schedule,
        key=_keys(settings.seed)[1],
        model_dir=folder,
        num_microbatches=settings.num_microbatches,
        partitioner=loaded.base.partitioner,
        trackers=records,
        quiet=quiet,
    )


def report_on(
    loaded: Loaded, found: Mapping[str, Result], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Says what the members ended with, and what they answer.

    Returns:
      The content of ``results.json``: ``facts`` and what was measured.
    """
    tasks, metric = loaded.tasks, loaded.plan.settings.schedule.metric
    answers = {
        spec.name: tasks.answers(spec, found[spec.name].tuned, loaded.frozen)
        for spec in loaded.plan.members
        if spec.name in found
    }
    outcomes.say_answers(answers)
    rows = outcomes.ranked(
        [
            outcomes.row(
                spec,
                found.get(spec.name),
                tasks.fill(spec),
                metric,
                answers.get(spec.name),
            )
            for spec in loaded.plan.members
        ]
    )
    outcomes.print_table(rows)
    one, members = next(iter(found.values())), loaded.plan.members
    cost = costs.summary(one.usage, loaded.plan.work, tasks.label_shape(members))
    best = outcomes.best(rows)
    return {**facts, "pace": one.pace, "cost": cost, "best": best, "members": rows}


def saved(
    loaded: Loaded, found: Mapping[str, Result], facts: Mapping[str, Any]
) -> dict[str, Saved]:
    """The tuned prompts and adapters with their cards, by member."""
    width = loaded.base.config.emb_dim
    return {
        spec.name: outcomes.saved(
            spec.method.materialize(found[spec.name].tuned, loaded.frozen),
            spec,
            loaded.tasks.of(spec),
            found[spec.name],
            facts,
            width,
        )
        for spec in loaded.plan.members
        if spec.method.result != "model" and spec.name in found
    }


def whole_model(
    loaded: Loaded, spec: MemberSpec, found: Mapping[str, Result]
) -> Params:
    """The network's parameters with what a member that tunes the model moved in them."""
    rest = {name: tree for name, tree in loaded.frozen.items() if name != HELD}
    part = spec.method.materialize(found[spec.name].tuned, loaded.frozen)
    return trees.merge(part, rest)


def write(
    loaded: Loaded, found: Mapping[str, Result], folder: pathlib.Path
) -> dict[str, Any]:
    """Writes what the members ended with, and ``results.json``.

    Returns:
      The content of ``results.json``.

    Raises:
      UserError: a file cannot be written.
    """
    facts = loaded.facts
    if changes := identity.changes(folder):
        facts["changes"] = changes
    results = report_on(loaded, found, facts)
    rows = {row["name"]: row for row in results["members"]}
    tuned = saved(loaded, found, facts)
    for spec in loaded.plan.members:
        path = folder / spec.file
        if spec.name in tuned:
            outcomes.save_prompt(path, tuned[spec.name])
        elif spec.name in found:
            said = {**facts, **rows[spec.name]}
            whole = whole_model(loaded, spec, found)
            outcomes.save_model(path, whole, said, loaded.base.path)
    written = {spec.file.split("/")[0] for spec in loaded.plan.members}
    report.say(f"wrote {', '.join(str(folder / name) for name in written)}")
    processes.in_first(lambda: costs.count_bytes(results["members"], folder))
    processes.in_first(lambda: files.write_json(folder / report.RESULTS_FILE, results))
    processes.in_first(lambda: plots.learning_curve(folder, results["members"]))
    members = loaded.plan.members
    processes.in_first(lambda: outcomes.tell_tensorboard(folder, members, found))
    return results


def start(
    base: BaseModel, tasks: MemberTasks, spec: MemberSpec
) -> tuple[Params, Params]:
    """The leaves of a member at step 0, float32, and what its method holds.

    Raises:
      UserError: the initialisation does not fit the prompt or the vocabulary, or a
        prompt that the method reads cannot be read.
    """
    task = tasks.of(spec)
    key, _ = _keys(spec.seed)
    table = processes.whole(base.table)
    shape = (spec.prompt_length, base.config.emb_dim)
    rows = np.zeros(shape, np.float32)
    if spec.method.has_prompt and spec.method.uses_rows:
        make = spec.prompt_init or prompt_starts.sampled_vocab_init()
        if isinstance(make, str):
            make = prompt_starts.named(make, task.labels)
        init = make(table, task.vocabulary.encode, task.vocabulary.unk_id)  # pyright: ignore[reportArgumentType]
        rows = init(key, shape, np.float32)
    saved = [prompt_starts.rows_of(path, base) for path in spec.method.reads()]
    started = Start(rows, table, base.params, saved)  # pyright: ignore[reportArgumentType]
    leaves = spec.method.init(jax.random.fold_in(key, 1), started)
    return spec.method.place(spec.name, leaves), spec.method.held(started)


def _keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """The keys of a prompt's start and of dropout."""
    prompt_key, dropout_key = jax.random.split(jax.random.key(seed))
    return prompt_key, dropout_key
