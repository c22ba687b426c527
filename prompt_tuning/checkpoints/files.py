# SPDX-License-Identifier: Apache-2.0
"""Safetensors files: whole or not at all, and errors that a user can read."""

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator, Mapping

import ml_dtypes  # noqa: F401  Registers bfloat16 with NumPy.
import numpy as np
import safetensors
import safetensors.numpy

from prompt_tuning.errors import UserError

Path = str | os.PathLike[str]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[pathlib.Path]:
    """Yields a temporary name beside ``path``, renamed to it if the block succeeds.

    Missing parent folders are created. After a failure neither the temporary file nor
    a folder made for it is left.

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


def first_line(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]):
    """Writes a safetensors file, atomically."""
    with replacing(path) as temporary:
        arrays = {name: np.ascontiguousarray(leaf) for name, leaf in tensors.items()}
        safetensors.numpy.save_file(arrays, temporary, metadata=metadata)


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
