# SPDX-License-Identifier: Apache-2.0
"""``report``: runs, evaluations and experiments on one page that needs nothing else."""

import functools
import os
import pathlib
from collections.abc import Iterator, Sequence

from prompt_tuning import files, report
from prompt_tuning.checkpoints import base_models, prompt_formats
from prompt_tuning.errors import UserError
from prompt_tuning.inference import prompt_view
from prompt_tuning.runs import gathered, report_page
from prompt_tuning.runs.gathered import Run
from prompt_tuning.runs.html import Element, facts, folded, table, tag

# Prompts of a run that are shown; a page of hundreds would be read by nobody.
MOST_PROMPTS = 20


def write_report(
    folders: Sequence[str], output: str = "report.html", base: str | None = None
) -> None:
    """Writes a page that shows what is in folders.

    Args:
      folders: a MODEL_DIR, an EVAL_OUTPUT_DIR, an experiment's, or folders above them.
      output: the page.
      base: the base model, for prompts' nearest tokens; by default the embedded one of a
        prompt's card.

    Raises:
      UserError: a folder holds nothing of the kind, a file is damaged, BASE is no
        model, or the page cannot be written.
    """
    if not folders:
        raise UserError(
            "no folder to report on: give a MODEL_DIR, or one above several"
        )
    if base is not None:
        base_models.open_checkpoint(base)  # A wrong one is an error of the command.
    files.replaceable_file(output)
    files.refuse_same(folders, [output])
    found = gathered.gather(folders)
    text = report_page.page(found, functools.partial(_prompts, base=base))
    files.write_text(pathlib.Path(output), text)
    report.say(f"wrote {output}: {len(text.encode()) / 1e6:.2f} MB, {_counted(found)}")


def _counted(found: Sequence[gathered.Found]) -> str:
    kinds = (gathered.Run, gathered.Evaluation, gathered.Experiment)
    counts = {k.__name__.lower(): sum(isinstance(x, k) for x in found) for k in kinds}
    return ", ".join(
        f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in counts.items()
    )


def _prompts(run: Run, base: str | None) -> list[Element]:
    """Cards, norms and nearest tokens of a run's prompts."""
    paths = [
        run.folder / str(member["file"])
        for member in run.members
        if isinstance(member.get("file"), str) and _is_inside(run, member["file"])
    ]
    shown = [tag("h3", "Prompts")] if paths else []
    if len(paths) > MOST_PROMPTS:
        shown.append(tag("p", f"The first {MOST_PROMPTS} of {len(paths)} are shown."))
    for path in paths[:MOST_PROMPTS]:
        shown += _prompt(path, base)
    return shown


def _is_inside(run: Run, name: str) -> bool:
    """Whether a file that a run names is its own, and no other of the reader's files."""
    path, folder = os.path.realpath(run.folder / name), os.path.realpath(run.folder)
    return os.path.isfile(path) and pathlib.Path(path).is_relative_to(folder)


def _prompt(path: pathlib.Path, base: str | None) -> Iterator[Element]:
    try:
        if prompt_formats.detect(path) is None:
            return
        saved = prompt_formats.load_with_slots(path)
    except UserError as error:
        yield tag("p", f"{path.name} cannot be shown: {error}")
        return
    parts = [facts(report_page.flat(saved.card))]
    if len(saved.array):
        parts.append(facts(prompt_view.facts(saved.array).items()))
        try:
            model = base or base_models.embedded_base(saved.card)
            words = model and prompt_view.nearest_words(saved.array, model)
        except UserError as error:
            words = None
            parts.append(tag("p", f"No nearest tokens: {error}"))
        if words:
            lines = [
                [str(i), ", ".join(f"{token} {cosine:.2f}" for token, cosine in row)]
                for i, row in enumerate(words)
            ]
            parts.append(table(["position", "nearest tokens (cosine)"], lines))
    yield folded(path.stem, *parts)
