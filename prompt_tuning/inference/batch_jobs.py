# SPDX-License-Identifier: Apache-2.0
"""A file of rows answered into a file of answers: in order, whole, and resumable.

Until the job is done its answers lie in ``OUTPUT.part`` and those rows that cannot be
answered in ``REJECTED.part``; ``OUTPUT.job`` says how far both go. A job that was
interrupted cuts both back to that point and goes on behind it, in the same batches, and
so ends with the files of a job that was not. Then they get their names.
"""

import base64
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from prompt_tuning import files, report
from prompt_tuning.errors import UserError
from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.prepared_rows import Request

# Rows between two points from which a job can go on.
CHUNK = 1024
DIGITS = 4
BOM = b"\xef\xbb\xbf"
# A line of the input and its number, from 1.
Line = tuple[int, bytes]


class RowsRejectedError(UserError):
    """The job is done, but some rows could not be answered."""

    exit_code = 3


@dataclasses.dataclass
class Progress:
    """How far a job got, and what it is a job of.

    Attributes:
      input: SHA-256 of the input file.
      settings: what beside the input decides the answers.
      lines: lines that are done with.
      answered: rows that were answered.
      rejected: rows that were written aside.
      answers_size: bytes of these rows' answers.
      rejected_size: bytes of what was written aside.
    """

    input: str
    settings: dict[str, Any]
    lines: int = 0
    answered: int = 0
    rejected: int = 0
    answers_size: int = 0
    rejected_size: int = 0


class Job:
    """The files of one job."""

    def __init__(self, input_file: files.Path, output_file: files.Path):
        """Names the files; touches none."""
        self.input = pathlib.Path(input_file)
        self.output = pathlib.Path(output_file)
        self.rejected = self.output.with_suffix(".rejected.jsonl")
        self._state = self.output.with_name(f"{self.output.name}.job")
        self._parts = [
            path.with_name(f"{path.name}.part") for path in (self.output, self.rejected)
        ]

    def run(
        self,
        engine: Engine,
        settings: Mapping[str, Any],
        default_prompt: str | None = None,
    ) -> Progress:
        """Answers every row of the input, one JSON object a line.

        Args:
          engine: answers rows; see `Engine.prepare` for what they hold. ``id`` comes
            back as it is.
          settings: what beside the input decides the answers, in JSON; a job is not
            resumed with others.
          default_prompt: the prompt of rows that name none.

        Returns:
          How many rows were answered and rejected. A line of the output has ``line``,
          the row's number in the input, its ``id`` if it has one, and what the engine
          answers; a line of the rejected has ``line``, ``error``, and the ``row`` (or
          ``row_base64``, where it is no UTF-8).

        Raises:
          UserError: the input cannot be read or has no rows, the output cannot be
            written, another process is writing it, or what is there belongs to another
            input or to other settings.
        """
        digest, total = self._survey()
        fresh = Progress(digest, dict(settings))
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as stack:
                parts = [stack.enter_context(open(p, "ab")) for p in self._parts]
                self._lock(parts[0])
                stack.callback(self._leave)
                progress = self._resume(fresh, parts)
                with self._lines() as lines:
                    self._work(engine, progress, parts, lines, total, default_prompt)
                self._finish(progress)
        except OSError as error:
            raise files.unwritable(self.output, error) from error
        return progress

    def _survey(self) -> tuple[str, int]:
        """Hash of the input and the number of its lines."""
        digest, count = hashlib.sha256(), 0
        with self._lines() as lines:
            for _, line in lines:
                digest.update(line)
                count += 1
        if not count:
            raise UserError(f"{self.input} is empty; give a file with one row a line")
        return digest.hexdigest(), count

    @contextlib.contextmanager
    def _lines(self) -> Iterator[Iterator[Line]]:
        try:
            file = self.input.open("rb")
        except OSError as error:
            raise UserError(
                f"cannot read {self.input}: {files.first_line(error)}; give a file of "
                "rows in JSON"
            ) from error
        with file:
            yield enumerate(file, start=1)

    def _lock(self, part: BinaryIO) -> None:
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process is writing {self.output}; wait for it, or choose "
                "another OUTPUT_FILE"
            ) from error

    def _resume(self, fresh: Progress, parts: Sequence[BinaryIO]) -> Progress:
        """The point to go on from; the parts are cut back to it."""
        progress = fresh
        if self._state.exists():
            progress = self._read_state()
            for name, what in (("input", "input"), ("settings", "prompts or settings")):
                if getattr(progress, name) != getattr(fresh, name):
                    raise UserError(
                        f"{self.output} was begun with other {what}: give those again, "
                        f"choose another OUTPUT_FILE, or delete {self._state} to begin "
                        "anew"
                    )
        sizes = (progress.answers_size, progress.rejected_size)
        for part, size in zip(parts, sizes, strict=True):
            if os.fstat(part.fileno()).st_size < size:
                raise UserError(
                    f"{part.name} was cut short since: delete {self._state} to begin "
                    "anew"
                )
            part.truncate(size)
        if progress.lines:
            report.say(f"resuming after line {progress.lines} of {self.input}")
        return progress

    def _read_state(self) -> Progress:
        content = files.read_json(self._state)
        try:
            return Progress(**content)
        except TypeError as error:
            raise UserError(
                f"{self._state} is not of this version; delete it to begin anew"
            ) from error

    def _work(
        self,
        engine: Engine,
        progress: Progress,
        parts: Sequence[BinaryIO],
        lines: Iterator[Line],
        total: int,
        default_prompt: str | None,
    ) -> None:
        lines = itertools.islice(lines, progress.lines, None)
        with report.counting("answering", -(-total // CHUNK)) as advance:
            for _ in range(progress.lines // CHUNK):
                advance()
            try:
                while chunk := list(itertools.islice(lines, CHUNK)):
                    self._work_on(engine, progress, parts, chunk, default_prompt)
                    advance()
            except KeyboardInterrupt:
                report.say(
                    f"{progress.lines} of {total} lines are done; repeat the command "
                    "to go on"
                )
                raise

    def _work_on(
        self,
        engine: Engine,
        progress: Progress,
        parts: Sequence[BinaryIO],
        chunk: Sequence[Line],
        default_prompt: str | None,
    ) -> None:
        """Answers a chunk of lines, then moves the point to go on from behind them."""
        sound: list[tuple[dict[str, Any], Request]] = []
        rejected: list[dict[str, Any]] = []
        for number, line in chunk:
            line = line.removeprefix(BOM) if number == 1 else line
            if not line.strip():
                continue
            try:
                row = parse(line)
                row.setdefault("prompt", default_prompt)
                kept = {"id": row["id"]} if "id" in row else {}
                sound.append(({"line": number, **kept}, engine.prepare(row)))
            except UserError as error:
                rejected.append({"line": number, "error": str(error), **_kept(line)})
        answers = engine.run([request for _, request in sound])
        texts = [
            "".join(json.dumps(row) + "\n" for row in rows).encode()
            for rows in (
                [{**kept, **rounded(a)} for (kept, _), a in zip(sound, answers)],
                rejected,
            )
        ]
        for part, text in zip(parts, texts, strict=True):
            part.write(text)
            part.flush()
            os.fsync(part.fileno())
        progress.lines = chunk[-1][0]
        progress.answered += len(sound)
        progress.rejected += len(rejected)
        progress.answers_size += len(texts[0])
        progress.rejected_size += len(texts[1])
        with files.replacing(self._state) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(progress)))

    def _finish(self, progress: Progress) -> None:
        """Gives the files their names; what an earlier job left under them goes."""
        # First, so that what is killed from here on begins anew rather than midway.
        self._state.unlink(missing_ok=True)
        os.replace(self._parts[0], self.output)
        if progress.rejected:
            os.replace(self._parts[1], self.rejected)
        else:
            self._parts[1].unlink()
            self.rejected.unlink(missing_ok=True)

    def _leave(self) -> None:
        """Leaves no parts that no job can go on from."""
        if not self._state.exists():
            for part in self._parts:
                part.unlink(missing_ok=True)


def parse(line: bytes) -> dict[str, Any]:
    """The row that a line holds.

    Raises:
      UserError: it is not UTF-8, not JSON, or no object.
    """
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"the line is not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        place = f"character {error.pos}"
        raise UserError(f"the line is not JSON: {error.msg} ({place})") from error
    # Numbers and nested brackets without end are refused in their own ways.
    except (ValueError, RecursionError) as error:
        raise UserError("the line is not JSON that can be read") from error
    if not isinstance(row, dict):
        raise UserError('the line is no JSON object: write {"text": "..."}')
    return row


def rounded(answer: Mapping[str, Any]) -> dict[str, Any]:
    """An answer whose scores have as many digits as people read."""
    result = dict(answer)
    if "scores" in answer:
        result["scores"] = {k: round(v, DIGITS) for k, v in answer["scores"].items()}
    if "answers" in answer:
        result["answers"] = [rounded(each) for each in answer["answers"]]
    return result


def _kept(line: bytes) -> dict[str, str]:
    """The line itself, in a form from which it can be had again."""
    line = line.rstrip(b"\r\n")
    try:
        return {"row": line.decode()}
    except UnicodeDecodeError:
        return {"row_base64": base64.b64encode(line).decode()}
