# SPDX-License-Identifier: Apache-2.0
"""Memory of the host in pages of 2 MiB, for computing on a CPU.

XLA takes the temporaries of every step anew and gives them back after it. Linux hands
memory out, zeroed, by pages of 4 KiB as they are touched: some hundred thousand times a
step, a tenth to a quarter of its time. With huge pages it is some hundred times. glibc
asks for them if an environment variable says so when a process starts, so the command
line starts itself anew. In programs of your own, set it yourself:

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python program.py
"""

import contextlib
import os
import pathlib
import platform
import sys
from collections.abc import Mapping

VARIABLE, NAME = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
# glibc before this one ignores the variable.
SINCE = (2, 35)
SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def on_request() -> bool:
    """Whether this system has huge pages for those who ask, and glibc can ask."""
    library, version = platform.libc_ver()
    if library != "glibc" or tuple(map(int, version.split("."))) < SINCE:
        return False
    try:
        return "[madvise]" in SETTING.read_text()
    except OSError:
        return False


def environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of a process that asks for huge pages; a user's own word stays."""
    given = environ.get(VARIABLE, "")
    if NAME in given:
        return dict(environ)
    return {**environ, VARIABLE: f"{given}:{NAME}=1".lstrip(":")}


def restart() -> None:
    """Starts this program anew, as the same process, unless it has huge pages already.

    To be called before anything else is done. Nothing happens on systems without them.
    """
    variables = environment()
    if variables == dict(os.environ) or not on_request():
        return
    # It goes on in small pages if it cannot start itself.
    with contextlib.suppress(OSError):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], variables)
