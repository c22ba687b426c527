# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face hub, by its own client, which is imported when it is first asked."""

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from prompt_tuning import files
from prompt_tuning.errors import UserError

# What a name of the hub looks like: NAME or OWNER/NAME.
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?"
# A name that ends so is that of a file, misspelt.
_FILE_SUFFIXES = (
    *(".safetensors", ".npy", ".npz", ".model", ".gin", ".bin", ".png"),
    *(".json", ".jsonl", ".tsv", ".csv", ".txt", ".md"),
)


def is_name(name: str) -> bool:
    """Whether a path that is not there may be a name of the hub, worth a question to it.

    A path that begins with a folder of this machine, or ends as files do, is misspelt.
    """
    owner, slash, _ = name.partition("/")
    return (
        re.fullmatch(NAME, name) is not None
        and not (slash and os.path.isdir(owner))
        and pathlib.PurePath(name).suffix.lower() not in _FILE_SUFFIXES
    )


def download(
    name: str, patterns: Sequence[str], what: str, revision: str | None = None
) -> pathlib.Path:
    """The folder with the files of a repository, copied once and then found offline.

    Args:
      name: of the repository.
      patterns: which of its files.
      what: what it ought to hold, for messages: 'model' or 'prompt'.
      revision: a branch, tag or commit; the newest by default.

    Raises:
      UserError: the client is not installed, or the hub gives nothing of that name.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"there is no folder {name}; if it is a name of the Hugging Face hub, "
            "install what reads the hub: pip install huggingface_hub"
        ) from error
    try:
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=[*patterns], revision=revision
        )
    # Errors of its HTTP client come through, and each version has another client.
    except Exception as error:
        raise UserError(
            f"there is no folder {name}, and the Hugging Face hub gives no {what} of "
            f"that name ({files.first_line(error)}); check name and network, or give "
            "the folder of a copy"
        ) from error
    return pathlib.Path(folder)


def upload(
    name: str,
    contents: Mapping[str, bytes],
    message: str,
    *,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Puts files into a repository, made if need be, by one commit.

    Args:
      name: of the repository, OWNER/NAME.
      contents: of each file, by its path in the repository.
      message: of the commit.
      private: whether a repository that is made is private; None leaves it to the
        owner's settings.
      token: of the owner; by default the one that the client is logged in with.

    Returns:
      Where the repository is to be seen.

    Raises:
      UserError: the client is not installed, or the hub refuses.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            "install what writes to the hub: pip install huggingface_hub"
        ) from error
    client: Any = huggingface_hub.HfApi(token=token)
    operations = [
        huggingface_hub.CommitOperationAdd(path, content)
        for path, content in contents.items()
    ]
    try:
        repository = client.create_repo(name, private=private, exist_ok=True)
        client.create_commit(name, operations, commit_message=message)
    except Exception as error:
        raise UserError(
            f"the Hugging Face hub does not take {name} ({files.first_line(error)}); "
            "check the name (OWNER/NAME) and the network, and log in with a token that "
            "may write: hf auth login"
        ) from error
    return str(repository)
