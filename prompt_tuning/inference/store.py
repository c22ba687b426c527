# SPDX-License-Identifier: Apache-2.0
"""Many named prompts beside one model: kept on the host, checked when they are added.

Prompts come and go while rows are answered. A row holds on to its prompt, so one that
is removed, or another that is added under its name, changes no answer that is under way.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import pathlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from prompt_tuning import files, prompt_names, report
from prompt_tuning.checkpoints import adapter_file, cards, prompt_file, prompt_formats
from prompt_tuning.checkpoints.base_models import BaseModel
from prompt_tuning.data import vocabularies
from prompt_tuning.data.vocabularies import Vocabulary
from prompt_tuning.errors import UserError
from prompt_tuning.inference.encoding import Encoding, vocabulary_of
from prompt_tuning.inference.table import PromptTable
from prompt_tuning.network.adapters import Slot
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import Transformer
from prompt_tuning.types import Params

# What a run's folder may hold.
RUN_FILES = (prompt_file.FILE, adapter_file.FILE)
CAPACITY = 65_536
# The leaf of the network's parameters that the table is.
LEAF = "store"


@dataclasses.dataclass(frozen=True, eq=False)
class StoredPrompt:
    """A prompt on the host, which stays usable for those who hold it when it is removed.

    Attributes:
      name: what rows call it.
      array: ``[P, H]`` float32; P is 0 for a prompt that is all words.
      card: see `prompt_file`.
      encoding: how its rows become token ids.
      slots: what it puts into the model's layers, by site.
    """

    name: str
    array: np.ndarray
    card: Mapping[str, Any]
    encoding: Encoding
    slots: Mapping[str, Slot] = dataclasses.field(default_factory=dict)


class PromptStore:
    """Named prompts that fit one base model; every method may be called by any thread.

    Attributes:
      capacity: rows on the device.
      table: these rows; see `table`.
    """

    def __init__(
        self, base: BaseModel, capacity: int = CAPACITY, *, force: bool = False
    ):
        """Makes an empty store.

        Args:
          base: the model; it decides which prompts fit.
          capacity: rows on the device, H float32 each.
          force: take prompts that were tuned on another model or vocabulary.

        Raises:
          UserError: there is no room for any prompt.
        """
        if capacity < 1:
            raise UserError(f"a store of {capacity} rows holds no prompt: give it more")
        self.capacity = capacity
        self._base = base
        self._force = force
        self._names: dict[str, StoredPrompt] = {}
        self._refused: dict[str, str] = {}
        self._names_lock = threading.Lock()
        self.table = PromptTable(capacity, base.config.emb_dim, base.mesh)

    @property
    def width(self) -> int:
        """Width H of prompts and model."""
        return self._base.config.emb_dim

    @property
    def network(self) -> Transformer:
        """The base model's network with the store as its one prompt."""
        return Transformer(self._base.config, (Prompt(LEAF, self.capacity),))

    def params(self, table: Any) -> Params:
        """The network's parameters with this table, or with its shape."""
        return {**self._base.params, "prompts": {LEAF: table}}

    def add(
        self,
        name: str,
        array: np.ndarray,
        card: Mapping[str, Any],
        vocabulary: Vocabulary | None = None,
        slots: Mapping[str, Slot] = MappingProxyType({}),
    ) -> StoredPrompt:
        """Adds a prompt: `put` of what `make` makes of the same arguments.

        Raises:
          UserError: see these.
        """
        return self.put(self.make(name, array, card, vocabulary, slots))

    def make(
        self,
        name: str,
        array: np.ndarray,
        card: Mapping[str, Any],
        vocabulary: Vocabulary | None = None,
        slots: Mapping[str, Slot] = MappingProxyType({}),
    ) -> StoredPrompt:
        """A prompt that fits, which is not yet added.

        Args:
          name: what rows will call it.
          array: ``[P, H]``; ``[0, H]`` for a prompt that is all words.
          card: see `prompt_file`.
          vocabulary: the vocabulary of its rows, whose sameness with that of the card is
            known; by default as `encoding.vocabulary_of` finds it.
          slots: what it puts into the model's layers (see `adapter_file`).

        Raises:
          UserError: it does not fit the model, the store or its own card.
        """
        if len(array) == 0:
            array = np.zeros((0, self.width), np.float32)
        length, width = array.shape
        facts = {"length": length, "width": width}
        prompt_file.check_compatible(
            {**card, **facts},
            self._base.fingerprint,
            self.width,
            # A prompt without positions was tuned on nothing, unless it has slots.
            force=self._force or (length == 0 and not slots),
        )
        adapter_file.check_fits(slots, self._base.params)
        if length > self.capacity:
            raise UserError(
                f"the prompt has {length} positions, the store {self.capacity}: give "
                "the store more rows"
            )
        encoding = Encoding(
            card,
            length,
            self._base.config.vocab_size,
            vocabulary or vocabulary_of(card, self._base.vocabulary, force=self._force),
        )
        array = np.array(array, np.float32)
        array.flags.writeable = False
        return StoredPrompt(name, array, dict(card), encoding, dict(slots))

    def put(self, prompt: StoredPrompt) -> StoredPrompt:
        """Adds a prompt that `make` made, from when on rows may name it.

        Raises:
          UserError: the name is taken.
        """
        name = prompt.name
        with self._names_lock:
            prompt_names.check_free(name, self._names)
            self._names[name] = prompt
            self._refused.pop(name, None)
        return prompt

    def known_vocabulary(self, card: Mapping[str, Any]) -> Vocabulary:
        """The vocabulary of a prompt that may come from anyone: nothing is opened for it.

        Known are the model's, those of the prompts that are here, those inside the
        package, and published ones of which there is a local copy.

        Raises:
          UserError: the card names another, or one that has changed since.
        """
        fingerprint = card.get("vocabulary_fingerprint")

        def load(name: str) -> Vocabulary:
            for prompt in self.prompts():
                known = prompt.encoding.vocabulary
                if known.name == name or known.fingerprint == fingerprint:
                    return known
            if name == vocabularies.BYTES or (
                name in vocabularies.NAMES
                and os.path.isfile(vocabularies.path_of(name))
            ):
                return vocabularies.load(name)
            raise UserError(
                f"the vocabulary {name!r} is none of those that are in use here: start "
                "with a prompt that has it"
            )

        return vocabulary_of(card, self._base.vocabulary, force=self._force, load=load)

    def load(self, path: files.Path, name: str | None = None) -> StoredPrompt:
        """Adds the prompt of a file or folder of any format.

        Args:
          path: an adapter file, or see `prompt_formats.load`; a run's folder is its
            ``prompt.safetensors`` or ``adapter.safetensors``.
          name: what to call it; by default as `name_of` does.

        Raises:
          UserError: there is no prompt, or it is refused; the message names the path.
        """
        path = pathlib.Path(path)
        for file in RUN_FILES:
            if (path / file).is_file():
                path = path / file
                break
        saved = prompt_formats.load_with_slots(path)
        name = name_of(path) if name is None else name
        try:
            return self.add(name, saved.array, saved.card, slots=saved.slots)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def load_folder(self, folder: files.Path) -> dict[str, str]:
        """Adds every prompt that lies directly in a folder.

        What is refused is remembered: whoever asks for it by name is told why.

        Args:
          folder: of prompts in any format and of runs' folders, or itself that of a
            run. The prompts of a run that tuned several are called RUN.NAME, so that
            runs may use the same names. Names that begin with a dot are left out.

        Returns:
          What was refused: name to reason, which names the file.

        Raises:
          UserError: the folder cannot be read or is empty.
        """
        try:
            paths = sorted(pathlib.Path(folder).iterdir())
        except OSError as error:
            raise UserError(
                f"cannot read the folder {folder}: {files.first_line(error)}; choose "
                "one that holds prompts"
            ) from error
        paths = [path for path in paths if not path.name.startswith(".")]
        if not paths:
            raise UserError(f"{folder} is empty; choose a folder that holds prompts")
        refused = {}
        for name, path in _prompts_below(pathlib.Path(folder), paths):
            try:
                self.load(path, name)
            except UserError as error:
                refused[name] = str(error)
        with self._names_lock:
            # Where two files claim a name, the first has it.
            self._refused |= {k: v for k, v in refused.items() if k not in self._names}
        return refused

    def remove(self, name: str) -> None:
        """Removes a prompt; rows that were prepared before are still answered with it.

        Its place on the device goes to others when they need it.

        Raises:
          UserError: there is none of this name.
        """
        self.get(name)
        with self._names_lock:
            self._names.pop(name, None)

    def get(self, name: str) -> StoredPrompt:
        """The prompt of a name.

        Raises:
          UserError: there is none, or it was refused, and why.
        """
        with self._names_lock:
            found = self._names.get(name)
            refusal = self._refused.get(name)
            near = [] if found else difflib.get_close_matches(name, self._names, n=3)
        if found is not None:
            return found
        if refusal is not None:
            raise UserError(f"the prompt {name!r} was refused: {refusal}")
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"there is no prompt {name!r}{hint}")

    @property
    def base_model(self) -> str:
        """What the base model is called."""
        return self._base.name

    def names(self) -> list[str]:
        """Names of the prompts, in the order they were added."""
        with self._names_lock:
            return list(self._names)

    def prompts(self) -> list[StoredPrompt]:
        """The prompts, in the order they were added."""
        with self._names_lock:
            return list(self._names.values())

    def __len__(self) -> int:
        return len(self._names)

    def digest(self) -> str:
        """SHA-256 over names, cards and numbers of all prompts, in any order."""
        prompts = sorted(self.prompts(), key=lambda prompt: prompt.name)
        digest = hashlib.sha256()
        for prompt in prompts:
            numbers = [cards.checksum(prompt.array)]
            numbers += [cards.checksum(x) for x in jax.tree.leaves(prompt.slots)]
            text = json.dumps([prompt.name, numbers, prompt.card], sort_keys=True)
            digest.update(text.encode())
        return digest.hexdigest()


def _prompts_below(
    folder: pathlib.Path, paths: Sequence[pathlib.Path]
) -> Iterator[tuple[str, pathlib.Path]]:
    """Names and paths of the prompts that a folder with these paths holds."""
    own = folder / prompt_file.FILE
    if own.is_file() and (folder / report.RESULTS_FILE).is_file():
        yield name_of(own), own
        return
    if (folder / prompt_file.FOLDER).is_dir():
        inside = folder / prompt_file.FOLDER
        yield from ((name_of(path), path) for path in sorted(inside.iterdir()))
        return
    for path in paths:
        if (inside := path / prompt_file.FOLDER).is_dir():
            for prompt in sorted(inside.iterdir()):
                yield f"{path.name}.{name_of(prompt)}", prompt
        else:
            yield name_of(path), path


def names_of(paths: Sequence[files.Path]) -> list[str]:
    """The names of prompts that are to be told apart, by their paths (see `name_of`).

    Raises:
      UserError: two have one name.
    """
    names = [name_of(path) for path in paths]
    prompt_names.check_different(
        names, "the prompts", "they are called by their files or folders, so rename one"
    )
    return names


def name_of(path: files.Path) -> str:
    """A prompt's name by its path: that of the file, or of the run's folder.

    >>> name_of("prompts/boolq.safetensors"), name_of("runs/first/prompt.safetensors")
    ('boolq', 'first')
    """
    path = pathlib.Path(os.path.abspath(path))
    if path.name in RUN_FILES:
        return path.parent.name
    known = path.suffix in (".safetensors", ".npy")
    return path.stem if known else path.name
