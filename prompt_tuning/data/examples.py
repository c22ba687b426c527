# SPDX-License-Identifier: Apache-2.0
"""Finds a registered seqio task or mixture and reads its tokenised examples."""

import difflib
import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import seqio
import tensorflow as tf

from prompt_tuning import files
from prompt_tuning.data.feature_converter import PROMPT_INDEX, cure
from prompt_tuning.errors import UserError

Provider = seqio.Task | seqio.Mixture


def load_module(module: str | None) -> None:
    """Imports a module that registers tasks, if there is one.

    Raises:
      UserError: it does not import.
    """
    if not module:
        return
    try:
        importlib.import_module(module)
    except (ImportError, SyntaxError) as error:
        raise UserError(
            f"MIXTURE_OR_TASK_MODULE={module!r} does not import "
            f"({type(error).__name__}: {files.first_line(error)}): give the dotted name "
            "of a module on PYTHONPATH"
        ) from error


def find(name: str, module: str | None = None) -> Provider:
    """A registered task or mixture, after importing ``module``.

    Raises:
      UserError: the module does not import or registers nothing of that name.
    """
    load_module(module)
    names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name in names:
        return seqio.get_mixture_or_task(name)
    near = difflib.get_close_matches(name, sorted(names), n=3, cutoff=0.5)
    cure = (
        f"did you mean {' or '.join(near)}?"
        if near
        else "name the module that registers it in MIXTURE_OR_TASK_MODULE"
    )
    raise UserError(f"no task or mixture is called {name!r}: {cure}")


def examples(
    provider: Provider,
    split: str,
    lengths: Mapping[str, int],
    shuffle: bool = False,
    seed: int = 0,
    num_epochs: int | None = 1,
) -> tf.data.Dataset:
    """Tokenised examples, not cut to the lengths.

    Raises:
      UserError: the split does not exist, or seqio refuses the task.
    """
    if split not in provider.splits:
        raise UserError(
            f"{provider.name} has no split {split!r}: choose one of "
            f"{', '.join(provider.splits)}"
        )
    options = {"passthrough_features": [PROMPT_INDEX]}
    if isinstance(provider, seqio.Task):
        options = {}
    try:
        return provider.get_dataset(
            lengths_for(provider, lengths),
            split=split,
            shuffle=shuffle,
            seed=seed,
            num_epochs=num_epochs,
            trim_output_features=False,
            # A cached source would repeat its first epoch's order.
            try_in_mem_cache=False,
            **options,  # pyright: ignore[reportArgumentType]
        )
    except UserError:
        raise
    except (
        ValueError,
        OSError,
        AssertionError,
        ImportError,
        tf.errors.OpError,
    ) as error:
        # What seqio and TFDS raise about a task or about data that is not there.
        raise UserError(
            f"seqio cannot read {provider.name}: {files.first_line(error)}"
        ) from error


def texts(
    provider: Provider, split: str, lengths: Mapping[str, int], most: int
) -> Iterator[tuple[str, str, int, int]]:
    """Inputs and targets of a split's first ``most`` examples as texts, with their tokens.

    What a task does not hand on as text is decoded, and then holds what its vocabulary
    can write. Positions of prompts are no tokens; EOS is one.

    Raises:
      UserError: see `examples`.
    """
    vocabulary = provider.output_features["targets"].vocabulary
    for row in examples(provider, split, lengths).take(most).as_numpy_iterator():
        said, counts = [], []
        for side in ("inputs", "targets"):
            ids = [int(i) for i in row.get(side, ()) if i >= 0]
            raw = row.get(f"{side}_pretokenized")
            told = isinstance(raw, bytes)
            said.append(
                raw.decode(errors="replace") if told else vocabulary.decode(ids)
            )
            counts.append(len(ids))
        yield said[0], said[1], counts[0], counts[1]


def following(iterator: Iterator[Any], name: str, *default: Any) -> Any:
    """The next element of converted examples, or ``default`` behind the last.

    Raises:
      UserError: the converter refuses a row, which is the user's to cure.
      StopIteration: there is none, and no default.
    """
    try:
        return next(iterator, *default)
    except tf.errors.InvalidArgumentError as error:
        advice = cure(error)
        if advice is None:
            raise
        raise UserError(f"{name}: {advice}") from error


def vocab_size(vocabulary: seqio.Vocabulary, name: str) -> int:
    """Number of ids of a task's vocabulary.

    Raises:
      UserError: its file cannot be read.
    """
    try:
        return vocabulary.vocab_size
    except (OSError, tf.errors.OpError) as error:
        raise UserError(
            f"the vocabulary of {name} cannot be read ({files.first_line(error)}): name a "
            "local copy of T5's in the environment variable T5_VOCABULARY, of mT5's in "
            "MT5_VOCABULARY"
        ) from error


def lengths_for(
    provider: Provider, lengths: Mapping[str, int]
) -> Mapping[str, int] | None:
    """The lengths, if the task's preprocessing cannot do without them.

    `seqio.preprocessors.append_eos_after_trim` can: told no lengths it cuts nothing,
    and the converter, which knows virtual tokens from text, cuts instead.
    """
    for task in seqio.get_subtasks(provider):
        for preprocessor in task.preprocessors:
            function = getattr(preprocessor, "func", preprocessor)
            if function is seqio.preprocessors.append_eos_after_trim:
                continue
            if "sequence_length" in inspect.signature(preprocessor).parameters:
                return lengths
    return None
