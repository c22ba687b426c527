# SPDX-License-Identifier: Apache-2.0
"""Token ids in files of NumPy: what is no row of ids of the model is refused."""

import pathlib

import numpy as np

from prompt_tuning import files
from prompt_tuning.errors import UserError


def read(path: pathlib.Path, vocab_size: int) -> np.ndarray:  # [N]
    """The ids in an ``.npy`` file, which stay on the disk until they are needed.

    Raises:
      UserError: the file is missing or damaged, or see `check`.
    """
    if not path.exists():
        raise UserError(f"{path} is missing; ARRAYS_DIR must hold the token ids")
    try:
        ids = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} is no array of numbers: {files.first_line(error)}"
        ) from error
    check(ids, str(path), vocab_size)
    return ids


def check(ids: np.ndarray, what: str, vocab_size: int) -> None:
    """Refuses what is no row of token ids.

    Raises:
      UserError: it has another shape, other numbers, none, or ids that the model has no
        rows for.
    """
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(
            f"{what} holds {ids.dtype} of shape {ids.shape}: token ids are one row of "
            "whole numbers"
        )
    if not len(ids):
        raise UserError(f"{what} holds no token ids")
    if int(ids.min()) < 0:
        raise UserError(f"{what} has ids down to {int(ids.min())}: none is below 0")
    if int(ids.max()) >= vocab_size:
        raise UserError(
            f"{what} has ids up to {int(ids.max())} but the model only {vocab_size} "
            "embedding rows; use the model file of its vocabulary"
        )


def check_offsets(offsets: np.ndarray, count: int, what: str) -> None:
    """Refuses what does not cut ``count`` ids into pieces.

    Raises:
      UserError: it does not start at 0, falls, or does not end at the count.
    """
    sound = (
        offsets.ndim == 1
        and np.issubdtype(offsets.dtype, np.integer)
        and len(offsets) > 1
        and offsets[0] == 0
        and offsets[-1] == count
        and bool((np.diff(offsets.astype(np.int64)) >= 0).all())
    )
    if not sound:
        raise UserError(
            f"{what} must rise from 0 to the {count} ids that it cuts into pieces"
        )
