# SPDX-License-Identifier: Apache-2.0
"""The tuned model: loss, scores and predictions as pure functions of parameters."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning import decoding
from prompt_tuning.devices import sharding
from prompt_tuning.network import adapters, losses
from prompt_tuning.network.adapters import Where
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.token_step import TokenStep
from prompt_tuning.network.transformer import Transformer
from prompt_tuning.types import Array, Batch, Params, PyTree

# Where chunks of logits begin to be worth their second computation (see
# benchmarks/loss_chunk.py).
LOGIT_BYTES = 2**27
# The most tokens of labels in a decoder row of ranking: they share the keys and values of
# the encoder's output, and their products with each other, most of them masked, are cheap.
PACKED_TOKENS = 128


def variables(params: Params) -> dict[str, Params]:
    """The network's collections: parameters, and what methods put into its layers.

    Args:
      params: nested; ``adapters`` is what `adapters.join` gives.
    """
    own = dict(params)
    slots = own.pop(adapters.COLLECTION, None)
    return (
        {"params": own}
        if slots is None
        else {"params": own, adapters.COLLECTION: slots}
    )


@dataclasses.dataclass(frozen=True)
class Model:
    """A network and its objective, under T5X's names.

    A batch holds ``encoder_input_tokens`` [B, T], ``decoder_input_tokens`` [B, S],
    ``decoder_target_tokens`` [B, S], ``decoder_loss_weights`` [B, S] and, when packed,
    ``encoder_segment_ids`` [B, T] and ``decoder_segment_ids`` [B, S]. Where its rows
    belong to several of E members it also holds ``prompt_index`` [B] and
    ``targets_length`` [B] (see `losses.total`); for a ``label_loss``, ``label_tokens``
    [B, C, S], each row's labels, padded with 0; for a ``gap_weight``, ``group_index`` [B].

    Attributes:
      network: the Transformer, which names the prompts.
      z_loss: weight of the z-loss.
      label_smoothing: probability taken off the target.
      loss_normalizing_factor: see `losses.weights_and_divisor`.
      members: of a batch that several share, their names in the order of their numbers;
        by default the prompts'.
      label_loss: None is the cross entropy of target tokens; else rows are taught by
        comparing their labels as wholes, one of `losses.LABEL_LOSSES`.
      hinge: see `losses.over_labels`.
      gap_weight: of the gap between groups of rows (see `losses.group_gap`), in units of
        the loss of a target token, or of a row for a ``label_loss``.
      mean_scores: whether labels are compared by the mean over their tokens.
      max_logit_bytes: the most logits that loss and scores hold at a time on a device,
        if one position of all rows is no more than that.
    """

    network: Transformer
    z_loss: float = 1e-4
    label_smoothing: float = 0.0
    loss_normalizing_factor: str | float | None = None
    members: tuple[str, ...] = ()
    label_loss: str | None = None
    hinge: float = 0.2
    gap_weight: float = 0.0
    mean_scores: bool = False
    max_logit_bytes: int = LOGIT_BYTES

    @property
    def owners(self) -> tuple[str, ...]:
        """The names of all who may own a row of a batch."""
        return self.members or tuple(prompt.name for prompt in self.network.prompts)

    def with_prompts(self, prompts: tuple[Prompt, ...]) -> "Model":
        """The same with these prompts, and no others."""
        network = Transformer(self.network.config, prompts)
        return dataclasses.replace(self, network=network)

    def init(self, key: Array) -> Params:
        """Random parameters, float32, without partitioning metadata."""
        return nn.meta.unbox(_init(self.network, key))

    def abstract_params(self) -> Params:
        """Shapes of the parameters in boxes that carry their logical axes."""
        # Dicts of the caller's own: what is kept is nobody's to change.
        return jax.tree.map(lambda shape: shape, _abstract_params(self.network))  # pyright: ignore[reportArgumentType]

    def logits(
        self, params: Params, batch: Batch, dropout_rng: Array | None = None
    ) -> Array:  # [B, S, V]
        """Teacher-forced logits; dropout is on where an rng is given."""
        _, hidden = self.states(params, batch, dropout_rng)
        return self._apply(params, hidden, method="logits")

    def states(
        self, params: Params, batch: Batch, dropout_rng: Array | None = None
    ) -> tuple[Array, Array]:  # [B, T, H] and [B, S, H]
        """What the encoder gives, and what the output layer takes."""
        tokens = batch["encoder_input_tokens"]
        kwargs = {
            "encoder_segment_ids": batch.get("encoder_segment_ids"),
            "enable_dropout": dropout_rng is not None,
            "rngs": {} if dropout_rng is None else {"dropout": dropout_rng},
            "where": Where.of(
                tokens,
                self.network.config.vocab_size,
                batch.get("prompt_index"),
                batch.get("encoder_segment_ids"),
            ),
        }
        encoded = self._apply(params, tokens, method="encode", **kwargs)
        hidden = self._apply(
            params,
            encoded,
            tokens,
            batch["decoder_input_tokens"],
            batch["decoder_target_tokens"],
            decoder_segment_ids=batch.get("decoder_segment_ids"),
            logits=False,
            method="decode",
            **kwargs,
        )
        return encoded, hidden

    def _apply(self, params: Params, *args: Any, **kwargs: Any) -> Any:
        """Flax's ``apply`` where nothing is mutable, which then gives no pair."""
        return self.network.apply(variables(params), *args, **kwargs)

    def _over_targets(
        self,
        of_logits: Callable[[Array, Array], PyTree],
        params: Params,
        batch: Batch,
        hidden: Array,  # [B, S, H]
    ) -> PyTree:  # [B, S] each
        """A function of logits [B, s, V] and targets [B, s], for all targets [B, S]."""

        def of_hidden(hidden: Array, targets: Array) -> PyTree:
            logits = self._apply(params, hidden, method="logits")
            return of_logits(logits, targets)

        targets = batch["decoder_target_tokens"]
        return losses.by_chunks(of_hidden, self.piece(hidden), hidden, targets)

    def piece(self, hidden: Array) -> int:  # of [B, S, H]
        """The most positions whose logits are held at a time."""
        # While a program for several devices is traced, shapes are those of all.
        mesh = jax.sharding.get_abstract_mesh().shape
        rows = hidden.shape[0] / mesh.get(sharding.DATA, 1)
        width = self.network.config.vocab_size / mesh.get(sharding.MODEL, 1)
        return max(1, int(self.max_logit_bytes / (4 * rows * width)))

    def loss(
        self,
        params: Params,
        batch: Batch,
        dropout_rng: Array | None = None,
        divisor: Array | float | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """The training loss, and sums that metrics are made of.

        Args:
          params: all parameters.
          batch: the examples.
          dropout_rng: turns dropout on.
          divisor: what the sum over tokens is divided by, if not what
            ``loss_normalizing_factor`` says of this batch: a part of a batch is
            divided by what the whole holds.

        Returns:
          The scalar loss, and the metrics ``loss`` and ``z_loss`` (normalised as
          configured), ``token_loss`` (the plain sum over target tokens), ``correct``
          (tokens predicted right) and ``weight`` (target tokens). Of a batch that
          several prompts share, each metric is [E] and the loss their sum. A
          ``label_loss`` has rows in place of target tokens, and no z-loss. The gap
          between groups is in the scalar and in no metric.
        """
        if self.label_loss is not None:
            return self._loss_over_labels(params, batch, dropout_rng, divisor)
        _, hidden = self.states(params, batch, dropout_rng)
        return self.loss_of_states(params, batch, hidden, divisor)

    def _loss_over_labels(
        self,
        params: Params,
        batch: Batch,
        dropout_rng: Array | None,
        divisor: Array | float | None,
    ) -> tuple[Array, dict[str, Array]]:
        """What `loss` returns, of a ``label_loss``."""
        tokens, labels = batch["encoder_input_tokens"], batch["label_tokens"]
        vocab_size = self.network.config.vocab_size
        where = Where.of(tokens, vocab_size, batch.get("prompt_index"))
        scores = self.rank(params, tokens, labels, where, dropout_rng)
        if self.mean_scores:
            counts = jnp.sum((labels > 0).astype(jnp.float32), axis=-1)
            scores = scores / jnp.maximum(counts, 1.0)
        targets = batch["decoder_target_tokens"]
        longest = max(targets.shape[-1], labels.shape[-1])
        longer = lambda x: jnp.pad(
            x, [(0, 0)] * (x.ndim - 1) + [(0, longest - x.shape[-1])]
        )
        right = jnp.all(longer(labels) == longer(targets)[:, None], axis=-1)
        counted = jnp.any(right, axis=-1) & jnp.any(targets > 0, axis=-1)
        row_loss = losses.over_labels(scores, right, self.label_loss, self.hinge)
        row_loss = jnp.where(counted, row_loss, 0.0)
        best = jnp.argmax(scores, axis=-1) == jnp.argmax(right, axis=-1)
        total = lambda values: losses.total(values, batch, len(self.owners))
        if divisor is None:
            _, divisor = losses.weights_and_divisor(batch, self.loss_normalizing_factor)
        loss = total(row_loss) / divisor
        scale = total(counted.astype(jnp.float32)) / divisor
        gap = self._gap(row_loss, counted, scale, batch)
        return jnp.sum(loss + gap), {
            "loss": loss,
            "z_loss": jnp.zeros_like(loss),
            "token_loss": total(row_loss),
            "correct": total(best & counted),
            "weight": total(counted),
        }

    def loss_of_states(
        self,
        params: Params,
        batch: Batch,
        hidden: Array,  # [B, S, H]
        divisor: Array | float | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """What `loss` returns, of the decoder's `states`."""

        def of_logits(logits: Array, targets: Array) -> tuple[Array, Array, Array]:
            token_loss, token_z_loss = losses.cross_entropy(
                logits,
                targets,
                z_loss=self.z_loss,
                label_smoothing=self.label_smoothing,
            )
            return token_loss, token_z_loss, jnp.argmax(logits, axis=-1) == targets

        token_loss, token_z_loss, correct = self._over_targets(
            of_logits, params, batch, hidden
        )
        num_prompts = len(self.owners)
        total = lambda values: losses.total(values, batch, num_prompts)
        weights, own_divisor = losses.weights_and_divisor(
            batch, self.loss_normalizing_factor, num_prompts
        )
        divisor = own_divisor if divisor is None else divisor
        loss = total(token_loss * weights) / divisor
        counted = weights > 0
        of_rows = jnp.sum(weights, axis=-1)
        row_loss = jnp.sum(token_loss * weights, axis=-1) / jnp.maximum(of_rows, 1e-9)
        gap = self._gap(row_loss, of_rows > 0, total(weights) / divisor, batch)
        return jnp.sum(loss + gap), {
            "loss": loss,
            "z_loss": total(token_z_loss * weights) / divisor,
            "token_loss": total(token_loss * counted.astype(jnp.float32)),
            "correct": total(correct & counted),
            "weight": total(counted),
        }

    def _gap(self, row_loss: Array, counted: Array, scale: Array, batch: Batch):
        """What the groups of a batch add to its loss: [] or [E], or 0."""
        if not self.gap_weight:
            return 0.0
        gap = losses.group_gap(row_loss, counted, batch, len(self.owners))
        return self.gap_weight * scale * gap

    def score(self, params: Params, batch: Batch) -> Array:  # [B]
        """Log-likelihood of every row's targets (for rank classification)."""
        _, hidden = self.states(params, batch)
        token_loss, _ = self._over_targets(losses.cross_entropy, params, batch, hidden)
        weights, _ = losses.weights_and_divisor(batch, None)
        return -jnp.sum(token_loss * weights, axis=-1)

    def rank(
        self,
        params: Params,
        encoder_input_tokens: Array,  # [B, T]
        label_tokens: Array,  # [C, S] or [B, C, S], padded with 0
        where: Where | None = None,
        dropout_rng: Array | None = None,
    ) -> Array:  # [B, C]
        """Log-likelihood of every label for every row, encoding each row once.

        Labels are packed into decoder rows of up to `PACKED_TOKENS`, unless the numbers of
        rows and labels are symbols.

        Args:
          params: the parameters.
          encoder_input_tokens: the inputs; prompts are among their ids.
          label_tokens: the labels, the same for all rows or each row's own. A label of
            padding only is none: it fills up the label set of a row that has fewer than
            its neighbours, and scores minus infinity.
          where: whose the rows are; one owner's by default.
          dropout_rng: turns dropout on.
        """
        kwargs = {
            "enable_dropout": dropout_rng is not None,
            "rngs": {} if dropout_rng is None else {"dropout": dropout_rng},
            "where": where,
        }
        encoded = self._apply(
            params,
            encoder_input_tokens,
            method="encode",
            **kwargs,
        )
        rows, (count, length) = encoder_input_tokens.shape[0], label_tokens.shape[-2:]
        packs, size = count, 1
        # A number that only the exported program's caller knows cannot be packed, nor its
        # logits cut into chunks.
        is_known = isinstance(rows, int) and isinstance(count, int)
        if is_known:
            packs, size = packs_of(count, length)

        def log_likelihoods(labels: Array) -> Array:  # [(B,) C, S] -> [B, C]
            targets = jnp.broadcast_to(labels, (rows, size, length))
            inputs = jnp.pad(targets[..., :-1], ((0, 0), (0, 0), (1, 0)))
            targets = targets.reshape(rows, -1)
            number = np.repeat(np.arange(1, size + 1), length)[None]
            hidden = self._apply(
                params,
                encoded,
                encoder_input_tokens,
                inputs.reshape(rows, -1),
                targets,
                decoder_segment_ids=None if size == 1 else number,
                logits=False,
                method="decode",
                **kwargs,
            )
            if is_known:
                batch = {"decoder_target_tokens": targets}
                loss, _ = self._over_targets(
                    losses.cross_entropy, params, batch, hidden
                )
            else:
                logits = self._apply(params, hidden, method="logits")
                loss, _ = losses.cross_entropy(logits, targets)
            counted = targets > 0
            loss = loss * counted.astype(jnp.float32)
            counted = jnp.any(counted.reshape(rows, size, length), axis=-1)
            scores = -jnp.sum(loss.reshape(rows, size, length), axis=-1)
            return jnp.where(counted, scores, -jnp.inf)

        if size == 1:
            each = jnp.moveaxis(label_tokens, -2, 0)[..., None, :]
            return jax.lax.map(log_likelihoods, each)[..., 0].T
        fill = [(0, 0)] * (label_tokens.ndim - 2) + [(0, packs * size - count), (0, 0)]
        each = jnp.pad(label_tokens, fill)
        each = each.reshape(*each.shape[:-2], packs, size, length)
        scores = jax.lax.map(log_likelihoods, jnp.moveaxis(each, -3, 0))  # [., B, C]
        return jnp.moveaxis(scores, 0, 1).reshape(rows, -1)[:, :count]

    def predict(
        self,
        params: Params,
        encoder_input_tokens: Array,  # [B, T]
        strategy: decoding.Strategy,
        rng: Array | None = None,
        decoder_prefix: Array | None = None,  # [B, Q]
        constraint: decoding.Constraint | None = None,
        where: Where | None = None,
    ) -> tuple[Array, Array]:  # [B, K, S] int32, [B, K]
        """Decodes every row; the best of its K decodes is the last.

        The encoder runs once, and so does the projection of its output to the keys and
        values that all beams of a row share.

        Args:
          params: the parameters.
          encoder_input_tokens: the inputs; prompts are among their ids.
          strategy: `decoding.Greedy`, `decoding.Sampling` or `decoding.Beam`.
          rng: key for sampling.
          decoder_prefix: tokens that the decodes begin with, padded with 0.
          constraint: the labels that rows may write; see `decoding.LabelTrie.rows`.
          where: whose the rows are; one owner's by default.

        Returns:
          The tokens, 0 after the end token, and their scores.
        """
        batch = encoder_input_tokens.shape[0]
        forced = decoding.forced_tokens(decoder_prefix, batch, strategy, constraint)
        where = where or Where.of(encoder_input_tokens, self.network.config.vocab_size)
        encoded = self._apply(
            params,
            encoder_input_tokens,
            enable_dropout=False,
            where=where,
            method="encode",
        )
        step = TokenStep(
            self.network,
            variables(params),
            where,
            rows=batch,
            decodes=strategy.num_decodes,
            max_decode_length=strategy.max_decode_len,
        )
        memory = step.memorize(encoded, encoder_input_tokens)
        network = functools.partial(step, memory=memory)
        return decoding.decode(strategy, network, step.cache, forced, rng, constraint)


def packs_of(count: int, length: int) -> tuple[int, int]:
    """How ranking lays labels out: decoder rows for each example, and labels of a row.

    >>> packs_of(2, 3), packs_of(150, 4), packs_of(3, 200)
    ((1, 2), (5, 30), (3, 1))
    """
    packs = -(-count // max(1, PACKED_TOKENS // length))
    return packs, -(-count // packs)


def _init(network: Transformer, key: Array) -> Params:
    tokens = jnp.ones((1, 2), jnp.int32)
    return network.init(key, tokens, tokens, tokens, enable_dropout=False)["params"]


@functools.lru_cache(maxsize=8)
def _abstract_params(network: Transformer) -> Params:
    return jax.eval_shape(functools.partial(_init, network), jax.random.key(0))
