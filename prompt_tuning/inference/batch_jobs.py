# SPDX-License-Identifier: Apache-2.0
"""A file of rows answered into a file of answers: in order, whole, and resumable.

Rows are those of JSONL files and of tables (see `data.rows`). Until the job is done its
answers lie in ``OUTPUT.part`` and those rows that cannot be answered in
``REJECTED.part``; ``OUTPUT.job`` says how far both go. A job that was interrupted cuts
both back to that point and goes on behind it, in the same batches, and so ends with the
files of a job that was not. Then they get their names.

Answers may also go to a stream, such as standard output, as they come. There they stand
in the order of the rows, those that cannot be answered among them, and nothing is kept.
"""

import base64
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from prompt_tuning import files, report
from prompt_tuning.data import rows as row_files
from prompt_tuning.data.rows import Record
from prompt_tuning.errors import UserError
from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.prepared_rows import Request

# Rows between two points from which a job can go on.
CHUNK = 1024
DIGITS = 4
CHECKSUM = "sha256"


class RowsRejectedError(UserError):
    """The job is done, but some rows could not be answered."""

    exit_code = 3


@dataclasses.dataclass
class Progress:
    """How far a job got, and what it is a job of.

    Attributes:
      input: SHA-256 of the input file.
      settings: what beside the input decides the answers.
      answered: rows that were answered.
      rejected: rows that were written aside.
      answers_size: bytes of these rows' answers.
      rejected_size: bytes of what was written aside.
    """

    input: str
    settings: dict[str, Any]
    answered: int = 0
    rejected: int = 0
    answers_size: int = 0
    rejected_size: int = 0

    @property
    def rows(self) -> int:
        """Rows that are done with."""
        return self.answered + self.rejected

    def to_json(self) -> str:
        """The whole of it, with a checksum."""
        content = dataclasses.asdict(self)
        return json.dumps({**content, CHECKSUM: _digest(content)})

    @classmethod
    def read(cls, path: pathlib.Path) -> "Progress":
        """Reads what `to_json` wrote.

        Raises:
          UserError: it is damaged, or of another version.
        """
        content = files.read_json(path)
        found = content.pop(CHECKSUM, None)
        names = [field.name for field in dataclasses.fields(cls)]
        if found != _digest(content) or sorted(content) != sorted(names):
            raise UserError(
                f"{path} is damaged or not of this version; delete it to begin anew"
            )
        return cls(**content)


class Job:
    """The files of one job."""

    def __init__(
        self,
        input_file: files.Path,
        output_file: files.Path,
        *,
        columns: Sequence[str] | None = None,
        read_too: Iterable[files.Path | None] = (),
    ):
        """Names the files and looks at the input's first row; writes nothing.

        Args:
          input_file: rows; its name says of which kind (see `data.rows.kind_of`).
          output_file: JSONL of the answers, or a stream (see `files.is_stream`).
          columns: of a table whose first line is a row already.
          read_too: further files that the job reads.

        Raises:
          UserError: the input cannot be read or is of no known kind, it would be
            written over, or no file can have the output's name.
        """
        self.input = pathlib.Path(input_file)
        self.output = pathlib.Path(output_file)
        self._columns = columns
        self._to_stream = files.is_stream(output_file)
        next(row_files.scan(self.input, columns), None)
        if self._to_stream:
            self.rejected = self.output
            return
        self._target = files.replaceable_file(self.output)
        self.rejected = self.output.with_suffix(".rejected.jsonl")
        self._rejected_target = files.replaceable_file(self.rejected)
        self._state = self._target.with_name(f"{self._target.name}.job")
        self._parts = [
            path.with_name(f"{path.name}.part")
            for path in (self._target, self._rejected_target)
        ]
        outputs = [self._target, self._rejected_target, self._state, *self._parts]
        files.refuse_same([self.input, *read_too], outputs)

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
          where the row begins in the input, its ``id`` if it has one, and what the
          engine answers; a line of the rejected has ``line``, ``error``, and the ``row``
          (or ``row_base64``, where it is no UTF-8).

        Raises:
          UserError: the input cannot be read or has no rows, the output cannot be
            written, another process is writing it, or what is there belongs to another
            input or to other settings.
        """
        digest, total = self._survey()
        fresh = Progress(digest, {**settings, "columns": self._columns})
        if self._to_stream:
            with files.stream(self.output) as stream:
                for chunk in self._chunks(0, total):
                    answered, rejected = _answer(engine, chunk, default_prompt)
                    both = sorted([*answered, *rejected], key=lambda row: row["line"])
                    stream.write(_encode(both))
                    stream.flush()
                    fresh.answered += len(answered)
                    fresh.rejected += len(rejected)
            return fresh
        try:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as stack:
                parts = [stack.enter_context(_open_part(p)) for p in self._parts]
                self._lock(parts[0])
                stack.callback(self._leave)
                progress = self._resume(fresh, parts)
                self._work(engine, progress, parts, total, default_prompt)
                self._finish(progress)
        except OSError as error:
            raise files.unwritable(self.output, error) from error
        return progress

    def _survey(self) -> tuple[str, int]:
        """Hash of the input and the number of its lines, empty ones left out."""
        digest, count = hashlib.sha256(), 0
        try:
            with self.input.open("rb") as file:
                for line in file:
                    digest.update(line)
                    count += bool(line.strip())
        except OSError as error:
            raise UserError(
                f"cannot read {self.input}: {files.first_line(error)}; give a file of "
                "rows"
            ) from error
        if not count:
            raise UserError(f"{self.input} is empty; give a file with rows")
        return digest.hexdigest(), count

    def _chunks(self, done: int, total: int) -> Iterator[list[Record]]:
        """The rows behind those that are done with."""
        rows = row_files.scan(self.input, self._columns)
        rows = itertools.islice(rows, done, None)
        with report.counting("answering", -(-total // CHUNK)) as advance:
            for _ in range(done // CHUNK):
                advance()
            while chunk := list(itertools.islice(rows, CHUNK)):
                yield chunk
                advance()

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
            progress = Progress.read(self._state)
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
        if progress.rows:
            report.say(f"resuming after row {progress.rows} of {self.input}")
        return progress

    def _work(
        self,
        engine: Engine,
        progress: Progress,
        parts: Sequence[BinaryIO],
        total: int,
        default_prompt: str | None,
    ) -> None:
        """Answers chunk by chunk, and moves the point to go on from behind each."""
        try:
            for chunk in self._chunks(progress.rows, total):
                answered, rejected = _answer(engine, chunk, default_prompt)
                texts = _encode(answered), _encode(rejected)
                for part, text in zip(parts, texts, strict=True):
                    part.write(text)
                    part.flush()
                    os.fsync(part.fileno())
                progress.answered += len(answered)
                progress.rejected += len(rejected)
                progress.answers_size += len(texts[0])
                progress.rejected_size += len(texts[1])
                with files.replacing(self._state) as temporary:
                    temporary.write_text(progress.to_json())
        except KeyboardInterrupt:
            report.say(f"{progress.rows} rows are done; repeat the command to go on")
            raise

    def _finish(self, progress: Progress) -> None:
        """Gives the files their names; what an earlier job left under them goes."""
        # First, so that what is killed from here on begins anew rather than midway.
        self._state.unlink(missing_ok=True)
        os.replace(self._parts[0], self._target)
        if progress.rejected:
            os.replace(self._parts[1], self._rejected_target)
        else:
            self._parts[1].unlink()
            self.rejected.unlink(missing_ok=True)

    def _leave(self) -> None:
        """Leaves no parts that no job can go on from."""
        if not self._state.exists():
            for part in self._parts:
                part.unlink(missing_ok=True)


def _answer(
    engine: Engine, chunk: Sequence[Record], default_prompt: str | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What the output and the rejected say of a chunk of rows."""
    sound: list[tuple[Record, dict[str, Any], Request]] = []
    rejected: list[dict[str, Any]] = []
    for record in chunk:
        try:
            if record.error is not None:
                raise UserError(record.error)
            row = dict(record.values)
            if row.get("prompt") is None:
                row["prompt"] = default_prompt
            kept = {"id": row["id"]} if "id" in row else {}
            sound.append((record, kept, engine.prepare(row)))
        except UserError as error:
            rejected.append(_rejected(record, str(error)))
    answered = []
    answers = engine.run([request for _, _, request in sound])
    for (record, kept, _), answer in zip(sound, answers, strict=True):
        if _is_finite(answer):
            answered.append({"line": record.line, **kept, **rounded(answer)})
        else:
            rejected.append(_rejected(record, "the model's scores are no numbers"))
    return answered, rejected


def _rejected(record: Record, reason: str) -> dict[str, Any]:
    return {"line": record.line, "error": reason, **_kept(record.raw)}


def _encode(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _open_part(path: pathlib.Path) -> BinaryIO:
    # Never through a link: what it leads to is nobody's part.
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    return os.fdopen(os.open(path, flags, 0o666), "ab")


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_finite(answer: Mapping[str, Any]) -> bool:
    return all(map(math.isfinite, (answer.get("scores") or {}).values()))


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
