# SPDX-License-Identifier: Apache-2.0
"""The table of commands: a new one is an entry here and a module in ``commands/``.

Functions are named, not imported, so that ``--help`` and a misspelt command answer at
once. What may follow a command on its line is read from its function (`signatures`):
the macros of its gin files or, without those, the function's own parameters.
"""

import enum
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prompt_tuning.command_line import signatures


class Processes(enum.Enum):
    """What a command does where several processes run it."""

    EACH = "each works by itself"
    JOINED = "all work on one thing together"
    ALONE = "refused: they would write one another's files"


@dataclass(frozen=True)
class Command:
    """One command of ``prompt-tuning``.

    Attributes:
      summary: one line for ``--help``.
      function: ``module:name`` below this package.
      defaults: gin files that are added unless one that is given binds the target:
        target -> file. None takes its values from plain flags instead.
      kind: the kind of gin files of which its first word names one.
      rest: the parameter that takes words which are neither flags nor their values.
      text: ``module:name`` of what makes text for people of the function's result;
        otherwise it is printed as JSON.
      processes: how it runs in several processes.
      loads_tensorflow: whether it reads data with it.
      compiles: whether it computes, by programs worth keeping.
    """

    summary: str
    function: str
    defaults: Mapping[str, str] = field(default_factory=dict)
    kind: str | None = None
    rest: str | None = None
    text: str | None = None
    processes: Processes = Processes.EACH
    loads_tensorflow: bool = False
    compiles: bool = False

    @property
    def configurable(self) -> str:
        """What gin files call the function."""
        return self.function.rpartition(":")[2]


_OPTIMIZER = {"OPTIMIZER": "optimizers/adafactor.gin"}
COMMANDS = {
    "train": Command(
        "tune a prompt (or the whole model) on a task",
        "commands.train:train",
        {"Base.config": "runs/train.gin", **_OPTIMIZER},
        processes=Processes.JOINED,
        loads_tensorflow=True,
        compiles=True,
    ),
    "eval": Command(
        "evaluate a prompt or a model on a split of a task",
        "commands.evaluate:evaluate",
        {"evaluate.config": "runs/eval.gin"},
        processes=Processes.JOINED,
        loads_tensorflow=True,
        compiles=True,
    ),
    "experiment": Command(
        "train a grid of the paper's, or your own, with its table and figure",
        "commands.experiment:experiment",
        {
            "Base.config": "runs/train.gin",
            "experiment.settings": "runs/experiment.gin",
            **_OPTIMIZER,
        },
        kind="experiments",
        processes=Processes.ALONE,
        loads_tensorflow=True,
        compiles=True,
    ),
    "audit": Command(
        "say whether prompts treat groups of rows alike, with an exit code for CI",
        "commands.audit:audit",
        {"audit.config": "runs/audit.gin"},
        rest="prompt_files",
        processes=Processes.ALONE,
        compiles=True,
    ),
    "design": Command(
        "find a prompt in words for a frozen model, by search or from its errors",
        "commands.design:design",
        {"design.config": "runs/design.gin"},
        text="commands.design:table",
        processes=Processes.ALONE,
        compiles=True,
    ),
    "tasks": Command(
        "list tasks, show what a model is given of them, check them",
        "commands.tasks:show_tasks",
        {"show_tasks.local_task": "runs/tasks.gin"},
        rest="filters",
        loads_tensorflow=True,
    ),
    "infer": Command(
        "answer texts with a tuned prompt, or rows of a file with many",
        "commands.infer:infer",
        {"infer.config": "runs/infer.gin"},
        rest="texts",
        compiles=True,
    ),
    "serve": Command(
        "answer over HTTP with many prompts on one model",
        "commands.serve:serve",
        processes=Processes.ALONE,
        compiles=True,
    ),
    "export": Command(
        "write a model as programs that run without this package",
        "commands.export:export_model",
        {"export_model.config": "runs/export.gin"},
        processes=Processes.ALONE,
    ),
    "pretrain": Command(
        "pre-train a model from arrays of token ids",
        "commands.pretrain:pretrain",
        {"pretrain.config": "runs/pretrain.gin", **_OPTIMIZER},
        processes=Processes.ALONE,
        compiles=True,
    ),
    "plan": Command(
        "say what training or inference needs on TPUs that need not be there",
        "commands.plan:plan",
        {"plan.config": "runs/plan.gin", **_OPTIMIZER},
        text="commands.plan:table",
    ),
    "inspect": Command("say what a file or folder holds", "commands.inspect:show"),
    "report": Command(
        "show runs, evaluations and experiments side by side on a page of HTML",
        "commands.report:write_report",
        rest="folders",
        processes=Processes.ALONE,
    ),
    "convert": Command(
        "write a model or a prompt in another format", "commands.convert:convert"
    ),
    "demo": Command(
        "tune prompts of the embedded model on two tasks",
        "commands.demo:run",
        processes=Processes.ALONE,
        loads_tensorflow=True,
        compiles=True,
    ),
}

# What gin files may name, and where it is.
CONFIGURABLES = {
    name: f"{module}:{name}"
    for module, names in {
        "network.transformer": ("T5Config",),
        "training.optimizers": ("adafactor", "adamw", "learning_rate_schedule"),
        "decoding.token_by_token": ("Greedy", "Sampling"),
        "decoding.beam": ("Beam",),
        "data.local_task": ("LocalTask",),
        "devices.partitioner": ("Partitioner",),
        "runs.settings": ("Settings", "Base", "Data", "Tuning", "Objective"),
        "training.schedule": ("Schedule",),
        # What trains at other rates makes its optimizers of the whole configuration.
        "config": ("optimizer_at",),
        "training.prompt_starts": (
            "random_init",
            "sampled_vocab_init",
            "class_labels_init",
            "text_init",
            "saved_init",
        ),
    }.items()
    for name in names
}
CONFIGURABLES |= signatures.methods()
CONFIGURABLES |= {
    command.configurable: command.function
    for command in COMMANDS.values()
    if command.defaults
}


def load(place: str) -> Callable[..., Any]:
    """Imports what ``module:name`` names below this package."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"prompt_tuning.{module}"), name)
