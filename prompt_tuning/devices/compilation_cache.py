# SPDX-License-Identifier: Apache-2.0
"""Compiled programs that outlive their process: the next one need not compile them.

JAX has the cache and names its settings (https://docs.jax.dev/en/latest/
persistent_compilation_cache.html); this gives it a folder where the user named none, since
compiling is most of the time of an answer to one text. A program is found again by its
instructions, the versions of JAX and its compiler, the flags, and the devices.
"""

import contextlib
import os
import pathlib
import platform
import stat
import sys
import tempfile
import warnings
import zlib
from collections.abc import Mapping

import filelock
import jax

from prompt_tuning import report

# Beyond this the programs that were not used for longest go.
MOST_BYTES = 2**29
# What compiles faster is compiled again: a file costs more than it saves.
LEAST_SECONDS = 0.1
# So much must fit in, or the disk is as good as full. Programs are smaller, compressed.
ROOM = 2**20  # bytes
# JAX's own names of its files in the folder: a program, when it was used, and the lock.
_PROGRAM, _USED, _LOCK = "-cache", "-atime", ".lockfile"
_LOCK_SECONDS = 5.0
_JAXS_OWN = {
    "jax_persistent_cache_min_compile_time_secs": (1.0, LEAST_SECONDS),
    "jax_compilation_cache_max_size": (-1, MOST_BYTES),
}


def use() -> None:
    """Has compiled programs kept below the user's cache folder, unless JAX is told.

    Nothing happens where JAX has a folder already (``JAX_COMPILATION_CACHE_DIR``, or its
    configuration) or was told to keep nothing (``JAX_ENABLE_COMPILATION_CACHE=false``).
    To be called before anything is compiled. A folder that cannot be used is a line on
    standard error, and programs are compiled each time.
    """
    config = jax.config
    named = config.jax_compilation_cache_dir is not None
    if named or not config.jax_enable_compilation_cache:
        return
    try:
        place = folder()
        _prepare(place)
    except (OSError, RuntimeError, filelock.Timeout) as error:
        report.say(
            f"compiled programs are not kept: {error}; JAX_COMPILATION_CACHE_DIR names "
            "another folder, JAX_ENABLE_COMPILATION_CACHE=false does without"
        )
        return
    for name, (default, ours) in _JAXS_OWN.items():
        if getattr(config, name) == default and name.upper() not in os.environ:
            config.update(name, ours)
    config.update("jax_compilation_cache_dir", str(place))
    # A disk that fills up while a run goes on costs nothing but the next start's time,
    # which says so then; JAX would say it of every program.
    warnings.filterwarnings(
        "ignore", "Error writing persistent compilation cache entry", UserWarning
    )


def folder(environ: Mapping[str, str] = os.environ) -> pathlib.Path:
    """The folder for programs of this machine's kind, which need not be there yet.

    ``XDG_CACHE_HOME`` names the folder of all caches, if it is an absolute path
    (https://specifications.freedesktop.org/basedir-spec/latest/); else it is what the
    system has for them. Machines that share it, but not their processors' instructions,
    have folders of their own, since programs hold these.

    Raises:
      RuntimeError: the user has no home folder.
    """
    given = pathlib.Path(environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():
        caches = given
    elif sys.platform == "darwin":
        caches = pathlib.Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        caches = pathlib.Path(environ.get("LOCALAPPDATA") or pathlib.Path.home())
    else:
        caches = pathlib.Path.home() / ".cache"
    return caches / "prompt_tuning" / "compiled" / _machine()


def _machine() -> str:
    told = platform.processor()
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        # As x86 and as ARM call what a processor can do.
        can = {line for line in lines if line.startswith(("flags", "Features"))}
        told = "\n".join(sorted(can))
    return f"{platform.machine()}-{zlib.crc32(told.encode()):08x}"


def _prepare(place: pathlib.Path) -> None:
    """Makes the folder, sees whether it can be trusted and written, and tidies it up.

    Raises:
      OSError: it cannot be made or written, or others could put programs there.
      filelock.Timeout: another process holds its lock.
    """
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = place.stat()
    # Its programs are run: nobody else may write them.
    if os.name == "posix" and (
        status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    ):
        raise PermissionError(f"others can write to {place}")
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(bytes(ROOM))
    except OSError as error:
        raise OSError(f"cannot write to {place} ({error.strerror})") from error
    # JAX writes a program and then when it was used, and holds this lock meanwhile. A
    # process that was killed, or found the disk full, leaves a program that is cut off,
    # which JAX would neither read nor replace, nor without the second file ever remove.
    with filelock.FileLock(place / _LOCK, timeout=_LOCK_SECONDS):
        for program in place.glob(f"*{_PROGRAM}"):
            name = program.name.removesuffix(_PROGRAM)
            if not program.with_name(f"{name}{_USED}").exists():
                program.unlink()
