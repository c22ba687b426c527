# SPDX-License-Identifier: Apache-2.0
"""``infer``: answers texts with a tuned prompt, or a file of rows with many."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from prompt_tuning import decoding, files, report
from prompt_tuning.checkpoints import base_models, prompt_formats
from prompt_tuning.data import rows
from prompt_tuning.devices.partitioner import Partitioner
from prompt_tuning.errors import UserError
from prompt_tuning.inference import batch_jobs
from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.store import PromptStore, name_of
from prompt_tuning.network.transformer import T5Config
from prompt_tuning.types import (
    ActivationDtype,
    BatchSize,
    PositiveInt,
    Seed,
    TokenLength,
    WeightDtype,
)


def infer(
    *,
    config: T5Config,
    initial_checkpoint_path: str,
    prompt_file: str | None = None,
    prompts: str | None = None,
    texts: Sequence[str] = (),
    input_file: str | None = None,
    output_file: str | None = None,
    columns: Sequence[str] | None = None,
    batch_size: BatchSize = 32,
    max_input_length: TokenLength = 1024,
    max_decode_length: TokenLength = 32,
    strategy: Callable[..., decoding.Strategy] = decoding.Greedy,
    seed: Seed = 0,
    prompt_rows: PositiveInt = 65_536,
    frozen_dtype: WeightDtype = "auto",
    activation_dtype: ActivationDtype = "auto",
    partitioner: Partitioner | None = None,
    force: bool = False,
) -> list[dict[str, Any]]:
    """Answers texts with a tuned prompt, or a file of rows with many.

    Args:
      config: sizes of the model.
      initial_checkpoint_path: the base model (see `formats.open_model`), or
        ``embedded:NAME``.
      prompt_file: the prompt; its card says which labels and vocabulary it has.
      prompts: a folder of prompts, in place of one; rows name theirs.
      texts: texts to answer.
      input_file: more of them, one a line of a ``.txt`` file; or the rows of a table or
        of JSONL (see `data.rows`, `engine.Engine.prepare`), which are answered by a job
        that can be resumed (see `batch_jobs`).
      output_file: JSONL of the answers; None or ``-`` prints them.
      columns: names of a table's columns, where its first line is a row already.
      batch_size: rows of a batch.
      max_input_length: longest input in tokens, its prompt included.
      max_decode_length: longest answer where the prompt has no label set.
      strategy: makes the strategy for free text from its ``max_decode_len``, such as
        `decoding.Beam`; label sets are ranked.
      seed: for strategies that draw.
      prompt_rows: prompt positions that the device has room for; prompts beyond them
        wait on the host.
      frozen_dtype: dtype of the weights.
      activation_dtype: dtype of the computation.
      partitioner: how to spread over devices; by default a whole model on each.
      force: take a prompt that was tuned on another model or vocabulary.

    Returns:
      For each text ``input``, ``answer`` and, with a label set, ``scores``: the
      probability of each label among them. Nothing for a file of rows.

    Raises:
      UserError: something is missing or does not fit.
      RowsRejectedError: the file of rows is answered but for some of them.
    """
    if (prompt_file is None) == (prompts is None):
        raise UserError("give either PROMPT_FILE, a prompt, or PROMPTS, a folder")
    rows_file, read_too = None, [prompt_file, prompts, initial_checkpoint_path]
    if input_file is not None and rows.kind_of(input_file) is not rows.Kind.TEXT:
        if texts:
            raise UserError(f"{input_file} holds rows: give no texts beside them")
        rows_file = input_file
    else:
        texts = _texts(texts, input_file, prompts)
        if output_file is not None and not files.is_stream(output_file):
            files.refuse_same([input_file, *read_too], [output_file])
            files.replaceable_file(output_file)
    job = None
    if rows_file is not None:
        job = batch_jobs.Job(
            rows_file, output_file or "-", columns=columns, read_too=read_too
        )
    source = base_models.load(
        config,
        initial_checkpoint_path,
        frozen_dtype=frozen_dtype,
        activation_dtype=activation_dtype,
        partitioner=partitioner,
    )
    only = ""
    if prompt_file is not None:
        saved = prompt_formats.load_with_slots(prompt_file)
        only = name_of(prompt_file)
        store = PromptStore(source, max(1, len(saved.array)), force=force)
        store.add(only, saved.array, saved.card, slots=saved.slots)
    else:
        store = PromptStore(source, prompt_rows, force=force)
        for reason in store.load_folder(prompts).values():  # pyright: ignore[reportArgumentType]
            report.say(f"left out {reason}")
    for name in store.names():
        for note in store.get(name).card.get("notes", ()):
            report.say(f"{name}: {note}")
    chosen = strategy(max_decode_len=max_decode_length)
    engine = Engine(
        source,
        store,
        batch_sizes=(batch_size,),
        longest=max_input_length,
        strategy=chosen,
        seed=seed,
    )
    if job is None:
        return _answer_texts(engine, only, texts, output_file)
    settings = {
        "base_model": source.fingerprint,
        "prompts": store.digest(),
        "batch_size": batch_size,
        "max_input_length": max_input_length,
        "strategy": repr(chosen),
        "seed": seed,
        "dtypes": f"{frozen_dtype}, {activation_dtype}"
        + (", int8 products" if config.int8_products else ""),
    }
    progress = job.run(engine, settings, only)
    report.say(f"answered {progress.answered} rows in {_name(job.output)}")
    if progress.rejected:
        raise batch_jobs.RowsRejectedError(
            f"{progress.rejected} of {progress.rows} rows could not be answered; "
            f"{_name(job.rejected)} holds them, each with the reason"
        )
    return []


def _name(path: pathlib.Path) -> str:
    return "standard output" if str(path) == "-" else str(path)


def _answer_texts(
    engine: Engine, prompt: str, texts: Sequence[str], output_file: str | None
) -> list[dict[str, Any]]:
    requests = []
    said = []
    for number, text in enumerate(texts, start=1):
        try:
            requests.append(engine.prepare({"prompt": prompt, "text": text}))
        except UserError as error:
            raise UserError(f"text {number}: {error}") from error
    for text, answer in zip(texts, engine.run(requests), strict=True):
        found = batch_jobs.rounded(answer)
        said.append({"input": text} | {k: found[k] for k in found if k != "prompt"})
    if output_file is None:
        return said
    lines = "".join(json.dumps(row) + "\n" for row in said)
    if files.is_stream(output_file):
        with files.stream(output_file) as stream:
            stream.write(lines.encode())
        return []
    files.write_text(pathlib.Path(output_file), lines)
    return said


def _texts(
    texts: Sequence[str], input_file: str | None, prompts: str | None
) -> list[str]:
    """What there is to answer, if it is not rows."""
    lines = rows.read(input_file) if input_file else ()
    texts = [*texts, *(record.values["text"] for record in lines)]
    if not texts:
        raise UserError("no text to answer: give texts or --gin.INPUT_FILE=FILE")
    if prompts is not None:
        raise UserError(
            "texts do not say which of the PROMPTS is theirs: give PROMPT_FILE, or an "
            'INPUT_FILE called *.jsonl with rows {"prompt": NAME, "text": TEXT}'
        )
    if empty := [i + 1 for i, text in enumerate(texts) if not text.strip()]:
        raise UserError(f"text {empty[0]} is empty; leave it out")
    return texts
