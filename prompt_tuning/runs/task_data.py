# SPDX-License-Identifier: Apache-2.0
"""One task as a run sees it: checked, tokenised, with a prompt's place in its rows."""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
import seqio
import tensorflow as tf

from prompt_tuning import decoding, report
from prompt_tuning.data import batching, examples, in_memory, label_sets, reach
from prompt_tuning.data.feature_converter import PromptFeatureConverter
from prompt_tuning.data.length_report import Fill, LengthReport
from prompt_tuning.data.local_task import LocalTask
from prompt_tuning.data.split_lengths import length_report
from prompt_tuning.data.vocabularies import Vocabulary
from prompt_tuning.errors import UserError
from prompt_tuning.inference import evaluation, likelihood
from prompt_tuning.inference.answerer import Answerer, Evaluation
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.tasks import features, labels, local_file
from prompt_tuning.training.members import Batches
from prompt_tuning.types import Params

# The module that gin files name unless they are told of another.
TASKS = "prompt_tuning.tasks"
# Tables are padded for the hardware, never to so many times the vocabulary's ids.
MOST_ROWS_AN_ID = 2
# What a text is in a dataset of TensorFlow's.
TEXT = tf.TensorSpec((), tf.string)
# Rows of a task's own data whose texts are looked at before training.
LOOKED_AT = 2_000
INPUTS, TARGETS = "encoder_input_tokens", "decoder_target_tokens"
_CURE = (
    "choose the task's variant of the model's vocabulary (its name with 't5_', 'mt5_', "
    "'byt5_' or 'mini_' before it), or set VOCABULARY for files of your own"
)


class TaskData:
    """A registered task or mixture with the lengths and prompts of a run.

    Attributes:
      prompts: those that rows may carry.
      vocabulary: of inputs and targets.
      labels: the label set, or None where answers are free text.
      label_scores: how labels are compared.
      template: how a row becomes the inputs, or None where the task does not say.
      converter: places the prompts' virtual ids, one example a row.
    """

    def __init__(
        self,
        name: str,
        module: str | None,
        local: LocalTask | None,
        task_feature_lengths: Mapping[str, int],
        prompts: Sequence[Prompt],
        vocab_size: int,
        placement: str = "prepend",
        models_vocabulary: Vocabulary | None = None,
        label_scores: str = label_sets.SUM,
        group_column: str | None = None,
    ):
        """Registers ``local`` files or imports ``module``, and finds the task.

        Args:
          name: of the task or mixture.
          module: imported to register it; `TASKS`, which is anyone's, or None where there
            are ``local`` files.
          local: files to register as the task.
          task_feature_lengths: text tokens of ``inputs`` and ``targets``.
          prompts: those that rows may carry.
          vocab_size: rows of the model's embedding table, V.
          placement: where a prompt goes in a row.
          models_vocabulary: what the model's checkpoint names, if it does; local files
            that name none are written in it.
          label_scores: how labels are compared, one of `label_sets.SCORES`.
          group_column: the column of ``local`` files with each row's group.

        Raises:
          UserError: see `examples.find` and `batching.make_converter`; the task is
            written in another vocabulary than the model's, or has local files and a
            module of its own.
        """
        if local is not None:
            if module not in (None, TASKS):
                raise UserError(
                    f"MIXTURE_OR_TASK_MODULE={module!r} registers nothing of a task of "
                    "local files: leave it out, or the file of tasks/"
                )
            if local.vocabulary is None and models_vocabulary is not None:
                local = dataclasses.replace(local, vocabulary=models_vocabulary.name)
            local_file.register_task(name, local, group_column)
            module = None
        self.label_scores = label_sets.check_scores(label_scores)
        self._name = name
        self._local, self._group_column = local, group_column
        self._lengths = dict(task_feature_lengths)
        self.prompts = tuple(prompts)
        self._vocab_size = vocab_size
        self._placement = placement
        self._provider = examples.find(name, module)
        self.converter = self._converter(pack=False)
        self._reports: dict[tuple[str, bool], LengthReport] = {}
        self._hashes: dict[str, str] = {}
        self.vocabulary: seqio.Vocabulary = self._provider.output_features[
            "targets"
        ].vocabulary
        self._check_vocabulary(models_vocabulary)
        found = labels.label_set(name)
        self.labels = None if found is None else list(found)
        self.template = labels.template(name)

    @property
    def vocabulary_name(self) -> str:
        """What a prompt's card calls the vocabulary (see `tasks.features`)."""
        return features.name_of(self.vocabulary)

    @property
    def vocabulary_fingerprint(self) -> str:
        """Tells a prompt's own vocabulary from others, whatever their names."""
        return features.fingerprint(self.vocabulary)

    def _check_vocabulary(self, models: Vocabulary | None) -> None:
        """Refuses a task of other pieces than the model's."""
        if models is None:
            size = examples.vocab_size(self.vocabulary, self._name)
            if self._vocab_size >= MOST_ROWS_AN_ID * size:
                raise UserError(
                    f"{self._name} is written in {self.vocabulary_name}, a vocabulary of "
                    f"{size} ids, but the model has {self._vocab_size} rows, so it is "
                    f"another's: {_CURE}"
                )
            return
        own = features.plain(self.vocabulary)
        if own is not None and own.pieces != models.pieces:
            raise UserError(
                f"{self._name} is written in the vocabulary {own.name}, the model reads "
                f"{models.name}: {_CURE}"
            )

    def _converter(self, *, pack: bool) -> PromptFeatureConverter:
        return batching.make_converter(
            self._provider,
            self._lengths,
            self.prompts,
            self._vocab_size,
            self._placement,
            pack,
        )

    def check(self, split: str, *, pack: bool = False) -> LengthReport:
        """Refuses a split that cannot be used whole; says what its figures suffer from.

        That is, which inputs lose their end, and what the vocabulary lacks. It looks,
        and says so, once.

        Raises:
          UserError: see `split_lengths.length_report`.
        """
        if (split, pack) not in self._reports:
            converter = self._converter(pack=pack)
            found = length_report(self._provider, split, self._lengths, converter)
            self._reports[split, pack] = found
            if message := found.message():
                report.say(message)
            if self._local is None and (split, not pack) not in self._reports:
                self._say_reach(split)
        return self._reports[split, pack]

    def _say_reach(self, split: str) -> None:
        """What the vocabulary lacks of a split; of files `local_file` says it."""
        most = LOOKED_AT + 1
        rows = list(examples.texts(self._provider, split, self._lengths, most))
        # Without a metric no answer is compared with a target.
        parts = seqio.get_subtasks(self._provider)
        judged = any(task.metric_fns for task in parts)
        for message in reach.messages(
            [[row[0]] for row in rows],
            [row[1] if judged else "" for row in rows],
            self.vocabulary,
            LOOKED_AT,
        ):
            report.say(f"{self._name}, {split}: {message}")

    def content(self, split: str, *, pack: bool = False) -> str:
        """What tells a split's examples from others.

        The hash of the file, read once, or of the examples that `check` has looked at
        for the same ``pack``.
        """
        local = self._local
        if local is None or split not in local.files:
            return self.check(split, pack=pack).digest
        if split not in self._hashes:
            with open(local.files[split], "rb") as file:
                digest = hashlib.file_digest(file, "sha256")
            # What decides which of its rows are drawn, and how, too.
            parts = [*(local.cells(split) or ()), self._group_column or ""]
            digest.update("\n".join(parts).encode())
            self._hashes[split] = digest.hexdigest()
        return self._hashes[split]

    def split(self, split: str, num_examples: int | None = None) -> evaluation.Split:
        """A split that `check` found sound, to be answered and measured.

        Raises:
          UserError: the task has no metric.
        """
        return evaluation.Split(
            self._name, split, self._lengths, self.converter, num_examples
        )

    def texts(self, split: str, most: int) -> tuple[list[str], list[str]] | None:
        """Texts and targets of a split's first ``most`` examples, as its data has them.

        None where the task does not hand them on.
        """
        names = ("inputs_pretokenized", "targets_pretokenized")
        ds = examples.examples(self._provider, split, self._lengths).take(most)
        if any(ds.element_spec.get(name) != TEXT for name in names):
            return None
        rows = [
            [row[name].decode() for name in names] for row in ds.as_numpy_iterator()
        ]
        texts, targets = zip(*rows, strict=True)
        return list(texts), [target.strip() for target in targets]

    def batches(
        self, split: str, batch_size: int, seed: int, *, pack: bool = False
    ) -> Batches:
        """Shuffled batches without end, from any batch on.

        Batches of unpacked rows are padded to one of a few lengths, by their longest
        row (see `LengthReport.edges`).

        Raises:
          UserError: see `batching.load`.
        """
        found = self.check(split, pack=pack)
        edges = () if pack else found.edges(batch_size)
        return lambda start: batching.load(
            self._name,
            split=split,
            task_feature_lengths=self._lengths,
            prompts=self.prompts,
            vocab_size=self._vocab_size,
            placement=self._placement,
            batch_size=batch_size,
            shuffle=True,
            seed=seed,
            pack=pack,
            start_batch=start,
            shard_info=(jax.process_index(), jax.process_count()),
            examples_to_check=0,
            edges=edges,
            groups=self._group_column is not None,
        )

    def evaluator(
        self,
        split: str,
        model: Model,
        mesh: jax.sharding.Mesh | None,
        batch_size: int,
        num_examples: int | None = None,
        strategy: Callable[..., decoding.Strategy] | None = None,
        seed: int = 0,
    ) -> evaluation.Evaluator:
        """The evaluation of a split: a function of all parameters.

        Args:
          split: the split.
          model: what answers; its network is given this task's prompts alone, so that
            prompts of one length share a program.
          mesh: the devices, where there are several.
          batch_size: rows of a batch.
          num_examples: take the first so many examples only.
          strategy: see `Answerer`.
          seed: likewise.

        Raises:
          UserError: see `Evaluator`.
        """
        return evaluation.Evaluator(
            self._name,
            split,
            self._lengths,
            self.converter,
            Answerer(
                model.with_prompts(self.prompts),
                self.vocabulary,
                labels=self.labels,
                label_scores=self.label_scores,
                strategy=strategy,
                max_decode_len=self._lengths["targets"],
                seed=seed,
                mesh=mesh,
            ),
            batch_size=batch_size,
            num_examples=num_examples,
        )

    def likelihood(
        self,
        split: str,
        model: Model,
        mesh: jax.sharding.Mesh | None,
        batch_size: int,
        num_examples: int | None = None,
    ) -> Callable[[Params], Evaluation]:
        """The same by the likelihood of the right answers alone.

        Raises:
          UserError: see `batching.load`.
        """
        rows = batching.load(
            self._name,
            split=split,
            task_feature_lengths=self._lengths,
            prompts=self.prompts,
            vocab_size=self._vocab_size,
            placement=self._placement,
            batch_size=1,
            shuffle=False,
            num_epochs=1,
            examples_to_check=0,
        )
        inputs, targets = [], []
        for row in itertools.islice(rows, num_examples):
            for ids, key in ((inputs, INPUTS), (targets, TARGETS)):
                ids.append(np.trim_zeros(row[key][0], "b"))
        return likelihood.evaluator(
            model.with_prompts(self.prompts),
            in_memory.Examples(inputs, targets),
            mesh,
            batch_size,
        )

    def fill(self, split: str, batch_size: int, *, pack: bool = False) -> Fill:
        """How full the rows of `batches` are; says it in one line."""
        found = self.check(split, pack=pack).fill(batch_size, pack=pack)
        count = round(batch_size * found.examples_per_row)
        report.say(
            f"tokens fill {found.encoder:.0%} of the encoder's positions and "
            f"{found.decoder:.0%} of the decoder's; a batch of {batch_size} "
            f"{'packed ' if pack else ''}rows holds {'about ' if pack else ''}{count} "
            "examples"
        )
        return found
