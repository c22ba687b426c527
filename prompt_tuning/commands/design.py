# SPDX-License-Identifier: Apache-2.0
"""``design``: prompts in words for a frozen model, chosen or bettered on rows of files."""

import dataclasses
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from prompt_tuning import files, report
from prompt_tuning.checkpoints import base_models
from prompt_tuning.checkpoints.base_models import BaseModel
from prompt_tuning.checkpoints.prompt_file import FILE
from prompt_tuning.data.local_task import LocalTask
from prompt_tuning.data.splits import TRAIN, VALIDATION
from prompt_tuning.devices.partitioner import Partitioner
from prompt_tuning.errors import UserError
from prompt_tuning.library import error_loop, prompt_design, rows, token_swaps
from prompt_tuning.library.tuned_prompt import TunedPrompt, load_prompt
from prompt_tuning.network.transformer import T5Config
from prompt_tuning.types import (
    ActivationDtype,
    BatchSize,
    PathText,
    PositiveInt,
    Seed,
    WeightDtype,
)

# Where, within the output folder, what the model said is kept.
SCORES = "scores"
# Characters of a text in the table of errors.
WIDTH = 60
# Of each search the options that it has.
OPTIONS = {
    "templates": ("templates", "verbalizers", "examples", "label_scores"),
    "errors": ("verbalizers", "rounds", "errors_shown", "max_decode_length"),
    "tokens": ("prompt_length", "steps", "candidates", "batch_size", "seed"),
    "nearest": ("prompt_file",),
}
# Those that read the training split.
_TRAINED = ("errors", "tokens")


def design(
    *,
    config: T5Config,
    initial_checkpoint_path: str,
    local_task: LocalTask | None,
    output_dir: PathText,
    search: Literal["templates", "errors", "tokens", "nearest"] = "templates",
    templates: Sequence[str] | None = None,
    verbalizers: Mapping[str, str | Sequence[str]] | None = None,
    examples: Sequence[tuple[str, str]] | None = None,
    label_scores: str | None = None,
    rounds: PositiveInt | None = None,
    errors_shown: PositiveInt | None = None,
    max_decode_length: PositiveInt | None = None,
    prompt_length: PositiveInt | None = None,
    steps: PositiveInt | None = None,
    candidates: PositiveInt | None = None,
    batch_size: BatchSize | None = None,
    seed: Seed | None = None,
    prompt_file: str | None = None,
    train_split: str = TRAIN,
    eval_split: str = VALIDATION,
    frozen_dtype: WeightDtype = "auto",
    activation_dtype: ActivationDtype = "auto",
    partitioner: Partitioner | None = None,
    on_start: files.OnStart | None = None,
) -> dict[str, Any]:
    """Finds a prompt in words, and leaves it and ``results.json`` in a folder.

    What the frozen model said is kept there, too: the same command goes on where it was
    interrupted, and one with more templates or rounds asks for these alone.

    Args:
      config: sizes of the model.
      initial_checkpoint_path: the model (see `formats.open_model`), or ``embedded:NAME``.
      local_task: the files, with the first template and the labels.
      output_dir: where the prompt, the report and what the model said go.
      search: 'templates' compares those that are given, with all ways to choose the
        words of labels; 'errors' betters the task's by worked examples of its costliest
        errors in the training split; 'tokens' swaps tokens by the loss's gradient;
        'nearest' takes the tokens nearest to a soft prompt. What follows goes with one
        of these, and None is what the search itself takes.
      templates: those to compare beside that of the task.
      verbalizers: of each label its word, or for 'templates' several to choose from; by
        default its name.
      examples: (text, word) pairs; each template is also tried with them in front.
      label_scores: how words are compared, one of `label_sets.SCORES`.
      rounds: turns of 'errors' at most; 3.
      errors_shown: how many errors each of them shows; 5.
      max_decode_length: tokens of an answer in free text; 32.
      prompt_length: tokens that are swapped; 5.
      steps: swaps that are tried; 100.
      candidates: pieces that each of them scores; 16.
      batch_size: rows that they are scored on; 32.
      seed: of the start, the batches and the positions; 0.
      prompt_file: the soft prompt.
      train_split: the rows whose errors are shown.
      eval_split: the rows that decide.
      frozen_dtype: dtype of the weights.
      activation_dtype: dtype of the computation.
      partitioner: how to spread over devices.
      on_start: called with ``output_dir`` before anything else is written to it.

    Returns:
      What ``results.json`` says: see docs/prompt_design.md.

    Raises:
      UserError: something is missing, does not fit, or does not go with ``search``.
    """
    if local_task is None:
        raise UserError("no rows: give --gin_file=tasks/local_file.gin and TASK_FILES")
    given: dict[str, Any] = {
        name: value
        for name, value in {
            "templates": templates,
            "verbalizers": verbalizers,
            "examples": examples,
            "label_scores": label_scores,
            "rounds": rounds,
            "errors_shown": errors_shown,
            "max_decode_length": max_decode_length,
            "prompt_length": prompt_length,
            "steps": steps,
            "candidates": candidates,
            "batch_size": batch_size,
            "seed": seed,
            "prompt_file": prompt_file,
        }.items()
        if value is not None
    }
    _check(search, given, local_task)
    splits = [train_split, eval_split] if search in _TRAINED else [eval_split]
    for split in splits:
        if split not in local_task.files:
            raise UserError(f"TASK_FILES has no {split!r}: give it a file of rows")
    soft = None
    if prompt_file is not None:
        soft = load_prompt(prompt_file)
        local_task = local_task.as_tuned(soft.card)
    # What is wrong with a file is said before a model is loaded.
    read = {split: local_task.columns_of(split) for split in splits}
    folder = files.writable_folder(output_dir, on_start)
    base = base_models.load(
        config,
        initial_checkpoint_path,
        frozen_dtype=frozen_dtype,
        activation_dtype=activation_dtype,
        partitioner=partitioner or Partitioner(),
    )
    if soft is not None:
        return _nearest(soft, base, local_task, read[eval_split], folder)
    renamed = {
        "errors_shown": "shown",
        "max_decode_length": "max_answer_length",
        "prompt_length": "length",
    }
    values: dict[str, Any] = {
        "labels": local_task.label_names,
        "target_column": local_task.target_column,
        "folder": folder / SCORES,
        **{renamed.get(name, name): value for name, value in given.items()},
    }
    train, validation = read.get(train_split), read[eval_split]
    if search == "templates":
        listed = _templates(local_task, values.pop("templates", ()))
        shown = values.pop("examples", ())
        listed += [prompt_design.few_shot(each, shown) for each in listed if shown]
        found = prompt_design.search(base, validation, templates=listed, **values)
        told = _of_design(found)
    elif search == "errors":
        template = local_task.template
        found = error_loop.refine(
            base,
            train,
            validation,
            template=template,  # pyright: ignore[reportArgumentType]
            **values,
        )
        told = found.record()
    else:
        found = token_swaps.search(
            base, train, validation, template=local_task.template, **values
        )
        told = _of_swaps(found)
    counts = {split: len(each) for split, each in read.items()}
    return _written(found.prompt, search, {"rows": counts, **told}, folder)


def _check(search: str, given: Mapping[str, Any], task: LocalTask) -> None:
    """Refuses what a search would have to ignore, and what it cannot do without.

    Raises:
      UserError: names it.
    """
    for name in given:
        if name not in OPTIONS[search]:
            kinds = [kind for kind, names in OPTIONS.items() if name in names]
            raise UserError(
                f"{name.upper()} goes with SEARCH={' or '.join(map(repr, kinds))}, and "
                f"this is {search!r}: leave it out"
            )
    if search == "nearest":
        if "prompt_file" not in given:
            raise UserError("SEARCH='nearest' is of a soft prompt: give PROMPT_FILE")
        return
    if not _templates(task, given.get("templates", ())):
        raise UserError("no template: give TEMPLATE, or for 'templates' TEMPLATES")
    if search == "templates" and task.label_names is None:
        raise UserError(
            "SEARCH='templates' ranks labels: give LABEL_NAMES, or take SEARCH='errors' "
            "for answers in free text"
        )
    if search == "errors":
        for label, word in given.get("verbalizers", {}).items():
            if not isinstance(word, str):
                raise UserError(
                    "SEARCH='errors' takes one word for a label, and VERBALIZERS have "
                    f"several for {label!r}: choose by SEARCH='templates' first"
                )


def _templates(task: LocalTask, more: Sequence[str]) -> list[str]:
    """The task's template and others, each once."""
    first = [] if task.template is None else [task.template]
    return list(dict.fromkeys([*first, *more]))


def _of_design(found: prompt_design.Design) -> dict[str, Any]:
    """What is said of templates and words."""
    return {
        "candidates": [
            {
                "template": one.template,
                "verbalizers": dict(one.verbalizers),
                "accuracy": one.accuracy,
                "log_likelihood": one.log_likelihood,
            }
            for one in found.candidates
        ],
        "encoder_passes": found.encoder_passes,
        "decoder_passes": found.decoder_passes,
    }


def _of_swaps(found: token_swaps.Swapped) -> dict[str, Any]:
    """What is said of swaps."""
    return {
        "tokens": list(found.ids),
        "text": found.text,
        **_before_and_after({"loss": found.before}, {"loss": found.after}),
        "kept": found.kept,
        "forward_passes": found.forward_passes,
        "backward_passes": found.backward_passes,
    }


def _nearest(
    soft: TunedPrompt,
    base: BaseModel,
    task: LocalTask,
    read: Sequence[Any],
    folder: pathlib.Path,
) -> dict[str, Any]:
    """Projects a soft prompt, and measures both."""
    asked = rows.read(
        read,
        VALIDATION,
        template=task.template,
        target_column=task.target_column,
        labels=task.label_names,
    )
    hard = token_swaps.nearest(soft, base)
    before, after = (
        {"accuracy": token_swaps.accuracy(each, base, asked)} for each in (soft, hard)
    )
    hard = dataclasses.replace(hard, card={**hard.card, "metric": after})
    told = {
        "rows": {VALIDATION: len(asked)},
        "tokens": hard.card["tokens"],
        "text": hard.card["text"],
        **_before_and_after(before, after),
        "forward_passes": 2 * len(asked),
    }
    return _written(hard, "nearest", told, folder)


def _before_and_after(
    before: Mapping[str, float], after: Mapping[str, float]
) -> dict[str, Any]:
    gain = {name: after[name] - value for name, value in before.items()}
    return {
        "before": {"metrics": before},
        "after": {"metrics": after},
        "gain": gain,
    }


def _written(
    prompt: TunedPrompt, search: str, told: Mapping[str, Any], folder: pathlib.Path
) -> dict[str, Any]:
    """Saves the prompt, and what is said of the search."""
    prompt.save(folder / FILE)
    results = {
        "search": search,
        "base_model": prompt.card["base_model"],
        "template": prompt.card["template"],
        "metrics": prompt.card["metric"],
        **told,
        "versions": report.versions(),
    }
    files.write_json(folder / report.RESULTS_FILE, results)
    return results


def table(results: Mapping[str, Any]) -> str:
    """What was found, as lines for people."""
    lines = []
    for number, each in enumerate(results.get("rounds", ()), start=1):
        lines.append(f"round {number}: the errors that cost most")
        lines += [
            f"  {error['cost']:8.3f}  {error['answer']!r} for {error['target']!r}: "
            f"{textwrap.shorten(' '.join(error['columns'].values()), WIDTH)}"
            for error in each["errors"]
        ]
    if "before" in results:
        lines.append(f"{'':<16}{'before':>10}{'after':>10}{'gain':>10}")
        for name, value in results["before"]["metrics"].items():
            after, gain = results["after"]["metrics"][name], results["gain"][name]
            lines.append(f"{name:<16}{value:>10.3f}{after:>10.3f}{gain:>+10.3f}")
    if "candidates" in results:
        lines.append(f"{'accuracy':>10}{'likelihood':>12}  template, words")
        lines += [
            f"{one['accuracy']:>10.2f}{one['log_likelihood']:>12.4f}  "
            f"{one['template']!r}, {', '.join(one['verbalizers'].values())}"
            for one in results["candidates"][:10]
        ]
    if "text" in results:
        lines.append(f"the tokens: {results['text']!r}")
    else:
        lines.append(f"the prompt: {results['template']!r}")
    lines += [
        f"{name.replace('_', ' ')}: {count}"
        for name, count in results.items()
        if name.endswith("_passes")
    ]
    return "\n".join(lines)
