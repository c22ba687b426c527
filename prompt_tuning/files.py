# SPDX-License-Identifier: Apache-2.0
"""Files and folders: whole or not at all, and errors that a user can read."""

import contextlib
import json
import math
import os
import pathlib
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_dtypes  # noqa: F401  Registers bfloat16 with NumPy.
import numpy as np
import safetensors
import safetensors.numpy

from prompt_tuning import dtypes, processes
from prompt_tuning.errors import UserError

Path = str | os.PathLike[str]
# The text of a file's header that has the checksums.
CRC = "crc32"
# What is done with a folder before anything else is written to it.
OnStart = Callable[[pathlib.Path], None]
# How long network file systems may take to show others what a process wrote.
SECONDS_TO_APPEAR = 5.0


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[pathlib.Path]:
    """Yields a temporary name beside ``path``, renamed to it if the block succeeds.

    The block makes a file or a folder of that name. Missing parent folders are created.
    After a failure nothing of it is left.

    Raises:
      UserError: the file cannot be written.
    """
    path = pathlib.Path(path)
    made = [folder for folder in path.parents if not folder.exists()]
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError | safetensors.SafetensorError):
            raise unwritable(path, error) from error
        raise


def unwritable(path: Path, error: Exception) -> UserError:
    """The error of a file or folder that could not be written."""
    return UserError(
        f"cannot write {path}: {first_line(error)}; choose a folder that you may write "
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
    """Writes a safetensors file, atomically."""
    with replacing(path) as temporary:
        arrays = {name: np.ascontiguousarray(leaf) for name, leaf in tensors.items()}
        safetensors.numpy.save_file(arrays, temporary, metadata=metadata)


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
      specs: shape and dtype (float32, bfloat16 or int8) of every tensor.
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
            data = memoryview(array.reshape(-1).view(np.uint8))
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
        raise _unwritable(folder, error) from error


def _remove(probe: pathlib.Path) -> None:
    try:
        probe.unlink()
    except OSError as error:
        raise _unwritable(probe.parent, error) from error


def _unwritable(folder: pathlib.Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write to {folder} ({error.strerror}); choose another folder"
    )


def _appears(path: pathlib.Path) -> bool:
    """Whether a file is there; network file systems may show it a little later."""
    end = time.monotonic() + SECONDS_TO_APPEAR
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
