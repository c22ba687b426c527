# SPDX-License-Identifier: Apache-2.0
"""A run's records go to its trackers, each once.

That holds for a run, too, that is resumed from a checkpoint before its last record: a
tracker cannot take back what it was sent, and need not, since a resumed run gives the
same records again. What every tracker has is kept in the run's folder; one that joins
late, or was out of reach for a while, is sent what it lacks.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

from prompt_tuning import files, processes, report
from prompt_tuning.errors import UserError
from prompt_tuning.training.trackers import Session, Tracker

# In the run's folder: which run of a tracker goes on, and the last step that each kind of
# record was sent of.
FILE = "trackers.json"


@dataclasses.dataclass
class _Open:
    """A tracker that takes part.

    Attributes:
      kind: its name.
      session: its run; None once it failed.
      sent: the last step that it has, by kind of record.
    """

    kind: str
    session: Session | None
    sent: dict[str, int]
    run: str | None


class Records:
    """Sends the records of a run to trackers; a context manager that ends their runs.

    Of several processes the first alone sends.
    """

    def __init__(
        self,
        trackers: Sequence[Tracker],
        folder: pathlib.Path,
        hparams: Mapping[str, Any],
    ):
        """Nothing is opened yet.

        Args:
          trackers: where to.
          folder: of the run, whose name theirs get.
          hparams: what the run follows from, nested.
        """
        self._trackers = trackers if processes.is_first() else ()
        self._folder = folder
        self._hparams = _flat(hparams)
        self._open: list[_Open] = []

    def begin(self, first: int) -> None:
        """Opens the trackers, and sends what they lack of a run that is resumed.

        It must come before `report.Log`, which drops records from beyond ``first``: that
        they were written says that they were sent.

        Args:
          first: the step that the run goes on from.

        Raises:
          UserError: a tracker cannot be opened.
        """
        if not self._trackers:
            return
        known = self._read()
        records = report.read_metrics(self._folder)
        for tracker in self._trackers:
            old = known.get(tracker.kind, {})
            run, sent = old.get("run"), dict(old.get("sent", {}))
            if old and not old["failed"]:
                for record in records:
                    key = _key(record)
                    sent[key] = max(sent.get(key, -1), record["step"])
            try:
                session = tracker.open(self._folder.resolve().name, run, self._hparams)
            except Exception as error:
                cure = (
                    f"; {self._folder / FILE} says that this run is its run {run}: "
                    "delete that file to begin another"
                )
                raise UserError(
                    f"{tracker.kind} cannot be opened: {files.first_line(error)}{cure if run else ''}"
                ) from error
            self._open.append(_Open(tracker.kind, session, sent, session.run))
            report.say(f"{tracker.kind}: {session.where}")
        self._write()
        for record in records:
            if record["step"] <= first:
                self.send(record)

    def send(self, record: Mapping[str, Any]) -> None:
        """Sends a record to those who do not have it.

        One that fails is sent no more; the run goes on without it.

        Args:
          record: a line of ``metrics.jsonl``.
        """
        key, step = _key(record), record["step"]
        for each in self._open:
            if each.session is None or step <= each.sent.get(key, -1):
                continue
            try:
                each.session.write_scalars(step, report.scalars(record))
            except Exception as error:  # noqa: BLE001  Theirs may be of any kind.
                each.session = None
                self._write()
                report.say(
                    f"WARNING: {each.kind} failed: {files.first_line(error)}; it gets what it lacks "
                    "when the run is resumed, and metrics.jsonl has all of it"
                )
            else:
                each.sent[key] = step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        for each in self._open:
            if each.session is not None:
                try:
                    each.session.end(whole=kind is None)
                except Exception as error:  # noqa: BLE001
                    report.say(
                        f"WARNING: {each.kind} failed: {files.first_line(error)}"
                    )
        if self._open:
            self._write()

    def _read(self) -> dict[str, Any]:
        path = self._folder / FILE
        return json.loads(path.read_text()) if path.exists() else {}

    def _write(self) -> None:
        """Notes which runs are the trackers', and what they have.

        That of trackers which do not take part this time stays.
        """
        own = {
            each.kind: {
                "run": each.run,
                "sent": each.sent,
                "failed": each.session is None,
            }
            for each in self._open
        }
        files.write_json(self._folder / FILE, {**self._read(), **own})


def _key(record: Mapping[str, Any]) -> str:
    """What kind of record it is: a step has one of each kind."""
    return "/".join(filter(None, (record["split"], record.get("member"))))


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by their '/'-joined keys."""
    if not isinstance(tree, Mapping):
        return {path: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{path}/{key}" if path else str(key))
    return found
