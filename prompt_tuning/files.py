# SPDX-License-Identifier: Apache-2.0
"""Files and folders: whole or not at all, never over their own input.

What cannot be read or written is said in one line. What is written lies under a temporary
name until it is whole. That name says which process on which machine writes it, so that
what a killed writer left is known for what it is and removed by whoever writes into that
folder next.
"""

import contextlib
import json
import math
import os
import pathlib
import re
import shutil
import socket
import stat
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import jax
import ml_dtypes  # noqa: F401  Registers bfloat16 with NumPy.
import numpy as np
import safetensors

from prompt_tuning import dtypes, processes
from prompt_tuning.errors import UserError

Path = str | os.PathLike[str]
# Ends of names of what a batch job reads back or replaces when it is repeated.
_OF_JOBS = (".jsonl", ".part", ".job")
# The text of a file's header that has the checksums.
CRC = "crc32"
# What is done with a folder before anything else is written to it.
OnStart = Callable[[pathlib.Path], None]
# How long network file systems may take to show others what a process wrote.
SECONDS_TO_APPEAR = 5.0
# Names of this process's own streams; what they lead to may even be a regular file.
_STANDARD = {"-": "stdout", "/dev/stdout": "stdout", "/dev/stderr": "stderr"}
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d{1,6})")
_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8})-(\d{1,10})-[0-9a-f]{8}\.tmp", re.DOTALL)
# After so long without a change, the writer on another machine is dead, too.
_ABANDONED = 86_400.0


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[pathlib.Path]:
    """Yields a temporary name beside ``path``, renamed to it if the block succeeds.

    The block makes a file or a folder of that name. Missing parent folders are created.
    After a failure nothing of it is left. Where ``path`` is a link, the link stays and
    what it leads to is replaced.

    Raises:
      UserError: the file cannot be written, or what has its name is neither a file nor
        a folder.
    """
    target = replaceable(path)
    made = [folder for folder in target.parents if not folder.exists()]
    mark = f"{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    temporary = target.with_name(f".{target.name}.{mark}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(target.parent)
        yield temporary
        os.replace(temporary, target)
    except BaseException as error:
        _remove(temporary)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError | safetensors.SafetensorError):
            raise unwritable(path, error) from error
        raise


def replaceable(path: Path) -> pathlib.Path:
    """Where a new file goes that is to be called ``path``: links are followed.

    Raises:
      UserError: what has the name is a device, a pipe or the like.
    """
    target = pathlib.Path(os.path.realpath(path))
    try:
        mode = os.stat(target).st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = stat.S_IFREG
    except OSError as error:
        raise unwritable(path, error) from error
    if is_stream(path) or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{path} is no file that can be replaced; give a file's name")
    return target


def replaceable_file(path: Path) -> pathlib.Path:
    """As `replaceable`, for what is a file and no folder.

    Raises:
      UserError: what has the name is no file.
    """
    target = replaceable(path)
    if target.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    return target


def _machine() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def remove_abandoned(folder: Path) -> None:
    """Removes from a folder what writers that were killed left under temporary names."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            match = _TEMPORARY.fullmatch(entry.name)
            if match and _is_abandoned(entry, match[1], int(match[2])):
                _remove(pathlib.Path(entry.path))


def _is_abandoned(entry: os.DirEntry, machine: str, process: int) -> bool:
    try:
        if machine != _machine():
            changed = entry.stat(follow_symlinks=False).st_mtime
            return time.time() - changed > _ABANDONED
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    # It is another user's, or gone already.
    except OSError:
        return False
    return False


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def is_stream(path: Path) -> bool:
    """Whether ``path`` is written as it comes, and not replaced by a whole file.

    So are ``-`` and ``/dev/stdout``, open descriptors, pipes and character devices.
    """
    text = os.fspath(path)
    if text in _STANDARD or _DESCRIPTOR.fullmatch(text):
        return True
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)


@contextlib.contextmanager
def stream(path: Path) -> Iterator[BinaryIO]:
    """Opens what `is_stream` knows, for writing.

    Raises:
      UserError: it cannot be written, e.g. because nobody reads it any more.
    """
    text = os.fspath(path)
    try:
        if text in _STANDARD:
            output = getattr(sys, _STANDARD[text])
            output.flush()
            yield output.buffer
            output.buffer.flush()
        elif match := _DESCRIPTOR.fullmatch(text):
            with os.fdopen(os.dup(int(match[1])), "wb") as file:
                yield file
        else:
            with open(path, "wb") as file:
                yield file
    except OSError as error:
        raise unwritable(path, error) from error


def refuse_same(inputs: Iterable[Path | None], outputs: Iterable[Path]) -> None:
    """Refuses to write over what is read, whatever names and links lead to it.

    Args:
      inputs: files, and folders whose files are read; what a batch job left there is not.
      outputs: files.

    Raises:
      UserError: an output is one of the inputs.
    """
    given = [each for path in inputs if path is not None for each in _read_at(path)]
    for output in outputs:
        for path in given:
            # Neither, where one of them is not there.
            same = False
            with contextlib.suppress(OSError):
                same = os.path.samefile(path, output)
            if same:
                raise UserError(
                    f"{output} would be written over {path}, which is read: give the "
                    "output another name"
                )


def _read_at(path: Path) -> Iterator[Path]:
    """A file, or the files of a folder."""
    yield path
    for folder, _, names in os.walk(path):
        for name in names:
            if not name.endswith(_OF_JOBS):
                yield os.path.join(folder, name)


def unwritable(path: Path, error: Exception) -> UserError:
    """The error of a file or folder that could not be written."""
    return UserError(
        f"cannot write to {path}: {first_line(error)}; choose a folder that you may write "
        "to, on a disk with room"
    )


def first_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()


def inside(folder: Path, name: str) -> pathlib.Path:
    """The path of a file in a folder.

    Raises:
      UserError: the name, or a link of that name, leads out of the folder.
    """
    root = pathlib.Path(os.path.realpath(folder))
    if root.parent.name == "snapshots":
        # In the Hugging Face hub's cache files are links to ../../blobs.
        root = root.parent.parent
    path = pathlib.Path(folder) / name
    plain = re.fullmatch(r"\w[\w.-]*", name, re.ASCII)
    if not plain or not pathlib.Path(os.path.realpath(path)).is_relative_to(root):
        raise UserError(
            f"{folder} names {name!r}, which leads out of it; put the file itself into "
            "the folder"
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: the file cannot be read, or holds something else.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read {path}: {first_line(error)}; copy it again"
        ) from (error)
    return parse_json(text, path)


def parse_json(
    text: str, where: Path, problem: str = "holds damaged JSON"
) -> dict[str, Any]:
    """The object that a text holds in JSON.

    Args:
      text: the JSON.
      where: the file it is from, for the message.
      problem: what is wrong with that file if the text is damaged.

    Raises:
      UserError: it is damaged, or something else.
    """
    try:
        content = json.loads(text)
    # Numbers and nested brackets without end are refused in their own ways.
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{where} {problem}; copy or write it again")
    return content


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]):
    """Writes a safetensors file of arrays that are in memory, atomically."""
    specs = {
        name: jax.ShapeDtypeStruct(np.shape(leaf), np.asarray(leaf).dtype)
        for name, leaf in tensors.items()
    }
    write_stream(path, specs, lambda name: np.asarray(tensors[name]), metadata)


def write_stream(
    path: Path,
    specs: Mapping[str, jax.ShapeDtypeStruct],
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
    *,
    checksums: bool = False,
) -> None:
    """Writes a safetensors file of which one tensor at a time is in memory, atomically.

    Args:
      path: the file.
      specs: shape and dtype of every tensor, one of `dtypes.CODES`.
      read: gives a tensor by its name.
      metadata: texts for the file's header.
      checksums: add to them the CRC-32 of every tensor, by name in JSON.

    Raises:
      UserError: the file cannot be written.
      ValueError: a tensor is not as its spec has it.
    """
    # The widest numbers first, as safetensors itself orders them: all are aligned then.
    names = sorted(specs, key=lambda name: -np.dtype(specs[name].dtype).itemsize)
    header: dict[str, Any] = {}
    # Checksums are known when the data is written, which comes after the header: zeros
    # keep their places.
    crcs = dict.fromkeys(names if checksums else (), f"{0:08x}")
    end = 0
    for name in names:
        shape, dtype = specs[name].shape, np.dtype(specs[name].dtype)
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": dtypes.CODES[dtype.name],
            "shape": list(shape),
            "data_offsets": [start, end],
        }

    def encoded() -> bytes:
        extra = {CRC: json.dumps(crcs)} if checksums else {}
        text = json.dumps({"__metadata__": {**metadata, **extra}, **header}).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(encoded())
        for name in names:
            array, spec = np.ascontiguousarray(read(name)), specs[name]
            if array.shape != tuple(spec.shape) or array.dtype != spec.dtype:
                raise ValueError(
                    f"{name} is {list(array.shape)} {array.dtype}, not {spec}"
                )
            data = memoryview(array.reshape(-1).view(np.uint8))  # pyright: ignore[reportArgumentType]
            file.write(data)
            if checksums:
                crcs[name] = crc32(data)
        file.seek(0)
        file.write(encoded())


def crc32(data: memoryview) -> str:
    """CRC-32 as eight hexadecimal digits."""
    return f"{zlib.crc32(data):08x}"


@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[safetensors.safe_open]:
    """Opens a safetensors file; tensors are read when they are asked for.

    Args:
      path: the file.
      what: what it ought to hold, for messages, e.g. ``'a model'``.

    Raises:
      UserError: there is no such file, or it is truncated or of another format.
    """
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path}; give the path of {what}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{path} is not {what}, or is cut short ({first_line(error)}); "
            "copy or write it again"
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Writes JSON under a temporary name, then renames it.

    Raises:
      UserError: the folder cannot be written or the disk is full.
    """
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes text under a temporary name, then renames it.

    Raises:
      UserError: the folder cannot be written or the disk is full.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def writable_folder(path: str, on_start: OnStart | None = None) -> pathlib.Path:
    """Makes a folder, tries to write into it and hands it to ``on_start``.

    Process 0 does all of it; the others look whether they see what it wrote.

    Raises:
      UserError: it is a URL, it cannot be written, or is not one and the same folder
        for all processes.
    """
    if "://" in path:
        raise UserError(
            f"cannot write to {path}: a folder of a file system is needed; mount the "
            "bucket and give its path there, or choose a folder on a disk"
        )
    folder = pathlib.Path(path)
    probe = folder / f".probe-{processes.agreed(os.getpid())}"
    processes.in_first(lambda: _make(folder, probe))
    seen = processes.gather(_appears(probe))
    processes.in_first(lambda: _remove(probe))
    if not seen.all():
        raise UserError(
            f"process {int(np.argmin(seen))} does not see what process 0 writes to "
            f"{folder}; choose a folder on a file system that all hosts share"
        )
    if on_start is not None:
        processes.in_first(lambda: on_start(folder))
    return folder


def _make(folder: pathlib.Path, probe: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
    except OSError as error:
        raise unwritable(folder, error) from error


def _appears(path: pathlib.Path) -> bool:
    """Whether a file is there; network file systems may show it a little later."""
    end = time.monotonic() + SECONDS_TO_APPEAR
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
