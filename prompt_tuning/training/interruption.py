# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C end a run between two steps, after a checkpoint.

Machines that are taken away send SIGTERM a while before; what the run has reached since
its last checkpoint would be lost.
"""

import os
import pathlib
import signal
import threading
from types import FrameType
from typing import Any, Self

from prompt_tuning import processes
from prompt_tuning.errors import UserError


class Interrupted(UserError):
    """The run was asked to stop, and what it had reached is saved.

    Attributes:
      exit_code: what shells expect of a process that the signal ended.
    """

    def __init__(self, number: int, step: int, where: pathlib.Path | None):
        """Says which signal it was, the step that is saved, and the folder."""
        self.exit_code = 128 + number
        super().__init__(
            f"stopped by {signal.Signals(number).name} at step {step}, which is saved "
            f"in {where}; the same command goes on from there"
        )


class Interruption:
    """Notes signals in place of ending the process; a context manager.

    A second signal has the effect that it would have had without. Outside of the main
    thread, where Python forbids it, and where nothing can be saved, signals are left as
    they are.
    """

    def __init__(self, *, can_save: bool):
        """Notes nothing yet."""
        self._catches = can_save
        self._number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if self._catches and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        self.__exit__()
        if processes.is_first():
            # A handler must not print: it may have interrupted a print.
            name = signal.Signals(number).name
            os.write(
                2, f"{name}: saving after this step; again to stop at once\n".encode()
            )

    def number(self) -> int:
        """The signal that came to any process of the run; 0 for none.

        All processes must call it together.
        """
        if processes.count() == 1:
            return self._number
        return int(processes.gather(self._number).max())
