# SPDX-License-Identifier: Apache-2.0
"""Processes that wait for a line of input and answer it with a line of JSON.

Things that cannot share a process (packages, environments, huge pages) are measured in
turn by it: the one whose turn it is not waits.
"""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

# What asks glibc, from 2.35, for pages of 2 MiB where Linux gives them to those who ask.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
# What has glibc keep what a program frees. XLA asks for a step's room in one piece and frees
# it at the end; given back to Linux, it comes anew page by page, each cleared first.
KEPT_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
}


class Side:
    """A process as its parent sees it.

    Attributes:
      started: what it said of itself when it was ready.
    """

    def __init__(self, command: Sequence[str], environ: Mapping[str, str]):
        """Starts it, with ``environ`` beside the environment's own variables."""
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.started = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        # Libraries print too; an answer is a line of JSON.
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{self._process.args} ended without an answer")

    def ask(self, line: str) -> dict[str, Any]:
        """What the process answers to a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """Ends the process."""
        self._process.communicate()
