# SPDX-License-Identifier: Apache-2.0
"""A tuned prompt or adapter in memory: from a run, a file or the hub, and to them."""

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from prompt_tuning import files, report
from prompt_tuning.checkpoints import (
    adapter_file,
    hub,
    prompt_file,
    prompt_formats,
)
from prompt_tuning.checkpoints.keys import peft as peft_keys
from prompt_tuning.checkpoints.prompt_formats import Saved
from prompt_tuning.errors import UserError
from prompt_tuning.inference.store import RUN_FILES, name_of
from prompt_tuning.library import readme
from prompt_tuning.network.adapters import Slot

# The files of a prompt on the hub: PEFT's layout or, where that has no place for the
# prompt, our own file.
README = "README.md"
HUB_FILES = (*RUN_FILES, peft_keys.CONFIG_FILE, peft_keys.TENSOR_FILE)


@dataclasses.dataclass(frozen=True, eq=False)
class TunedPrompt:
    """A soft prompt, or an adapter, and the card that says what it is for.

    Attributes:
      name: what rows call it.
      array: ``[P, H]`` float32; P is 0 for an adapter without a prompt.
      card: method, labels, template, vocabulary, base model, metric and more (see
        `prompt_file.save_prompt`).
      slots: what an adapter puts into the model's layers, by site.
    """

    name: str
    array: np.ndarray
    card: Mapping[str, Any]
    slots: Mapping[str, Slot] = dataclasses.field(default_factory=dict)

    def save(self, path: files.Path, format: str = "native") -> pathlib.Path:
        """Writes it as a file or, for PEFT, as a folder.

        Args:
          path: where to; by custom ``*.safetensors`` in our own format.
          format: one of `prompt_formats.FORMATS`, 'peft' among them.

        Raises:
          UserError: see `prompt_formats.save`; the format has no place for an adapter.
        """
        saved = Saved(self.array, self.card, self.slots)
        prompt_formats.save_as(path, saved, format)
        return pathlib.Path(path)

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        message: str = "Add a soft prompt",
    ) -> str:
        """Puts it into a repository of the Hugging Face hub, with a README card.

        The layout is PEFT's, which `peft.PeftModel.from_pretrained` reads, or our own
        file where the prompt does not stand in front of the text.

        Args:
          name: of the repository, OWNER/NAME; it is made if need be.
          private: whether a repository that is made is private; None leaves it to the
            owner's settings.
          token: by default that of ``hf auth login``.
          message: of the commit.

        Returns:
          Where the repository is to be seen.

        Raises:
          UserError: see `hub.upload`.
        """
        return hub.upload(
            name, self._contents(name), message, private=private, token=token
        )

    def _contents(self, name: str) -> dict[str, bytes]:
        """The files of a repository."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = pathlib.Path(temporary) / "prompt"
            try:
                self.save(folder, "peft")
            except UserError:
                # PEFT has no place for it; whatever else is wrong shows here, too.
                self.save(folder / self._file)
            contents = {path.name: path.read_bytes() for path in folder.iterdir()}
        text = readme.of(name, self.card, peft=self._file not in contents)
        return {**contents, README: text.encode()}

    @property
    def _file(self) -> str:
        """What a run calls its own file of it."""
        return adapter_file.FILE if self.slots else prompt_file.FILE

    def __repr__(self) -> str:
        length, width = self.array.shape
        labels = self.card.get("labels")
        answers = f"labels {', '.join(labels)}" if labels else "free text"
        metrics = (self.card.get("metric") or {}).items()
        shown = "".join(f", {k} {v:.4g}" for k, v in metrics if v is not None)
        size = f"{length} x {width}"
        if self.slots:
            size = f"{self.card.get('method', 'adapter')} at {len(self.slots)} sites"
        return f"TunedPrompt({self.name!r}, {size}, {answers}{shown})"


def load_prompt(path: files.Path, revision: str | None = None) -> TunedPrompt:
    """Reads a prompt of any format, or gets it from the Hugging Face hub.

    Args:
      path: a file or folder (see `prompt_formats.load`), the folder of a run, or a name
        of the hub such as ``user/name``.
      revision: a branch, tag or commit of the hub; the newest by default.

    Raises:
      UserError: there is no prompt, or it is damaged.
    """
    where = os.fspath(path)
    name = name_of(where)
    if not os.path.exists(where) and hub.is_name(where):
        where = os.fspath(hub.download(where, HUB_FILES, "prompt", revision))
    elif revision is not None:
        raise UserError(f"{where} is no name of the hub: leave 'revision' out")
    for file in RUN_FILES:
        if os.path.isfile(inside := os.path.join(where, file)):
            where = inside
            break
    array, card, slots = prompt_formats.load_with_slots(where)
    for note in card.get("notes", ()):
        report.say(note)
    return TunedPrompt(name, array, card, slots)
