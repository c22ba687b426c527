# SPDX-License-Identifier: Apache-2.0
"""The tuned model: loss, scores and predictions as pure functions of parameters."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from prompt_tuning import decoding, losses
from prompt_tuning.network import Transformer
from prompt_tuning.types import Array, Batch, Params


@dataclasses.dataclass(frozen=True)
class Model:
    """A network and its objective, under T5X's names.

    A batch holds ``encoder_input_tokens`` [B, T], ``decoder_input_tokens`` [B, S],
    ``decoder_target_tokens`` [B, S], ``decoder_loss_weights`` [B, S] and, when packed,
    ``encoder_segment_ids`` [B, T] and ``decoder_segment_ids`` [B, S].

    Attributes:
      network: the Transformer, which names the prompts.
      z_loss: weight of the z-loss.
      label_smoothing: probability taken off the target.
      loss_normalizing_factor: see `losses.weights_and_divisor`.
    """

    network: Transformer
    z_loss: float = 1e-4
    label_smoothing: float = 0.0
    loss_normalizing_factor: str | float | None = None

    def init(self, key: Array) -> Params:
        """Random parameters, float32, without partitioning metadata."""
        return nn.meta.unbox(self._init(key))

    def abstract_params(self) -> Params:
        """Shapes of the parameters in boxes that carry their logical axes."""
        return jax.eval_shape(self._init, jax.random.key(0))

    def _init(self, key: Array) -> Params:
        tokens = jnp.ones((1, 2), jnp.int32)
        return self.network.init(key, tokens, tokens, tokens, enable_dropout=False)[
            "params"
        ]

    def logits(
        self, params: Params, batch: Batch, dropout_rng: Array | None = None
    ) -> Array:  # [B, S, V]
        """Teacher-forced logits; dropout is on where an rng is given."""
        return self.network.apply(
            {"params": params},
            batch["encoder_input_tokens"],
            batch["decoder_input_tokens"],
            batch["decoder_target_tokens"],
            encoder_segment_ids=batch.get("encoder_segment_ids"),
            decoder_segment_ids=batch.get("decoder_segment_ids"),
            enable_dropout=dropout_rng is not None,
            rngs={} if dropout_rng is None else {"dropout": dropout_rng},
        )

    def loss(
        self, params: Params, batch: Batch, dropout_rng: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """The training loss, and sums that metrics are made of.

        Returns:
          The scalar loss, and the metrics ``loss`` (summed over tokens, normalised as
          configured), ``z_loss``, ``correct`` (tokens predicted right) and ``weight``
          (target tokens): all are sums over the batch.
        """
        logits = self.logits(params, batch, dropout_rng)
        targets = batch["decoder_target_tokens"]
        weights, divisor = losses.weights_and_divisor(
            batch, self.loss_normalizing_factor
        )
        token_loss, token_z_loss = losses.cross_entropy(
            logits, targets, z_loss=self.z_loss, label_smoothing=self.label_smoothing
        )
        loss = jnp.sum(token_loss * weights) / divisor
        counted = weights > 0
        correct = (jnp.argmax(logits, axis=-1) == targets) & counted
        return loss, {
            "loss": loss,
            "z_loss": jnp.sum(token_z_loss * weights) / divisor,
            "correct": jnp.sum(correct),
            "weight": jnp.sum(counted),
        }

    def score(self, params: Params, batch: Batch) -> Array:  # [B]
        """Log-likelihood of every row's targets (for rank classification)."""
        token_loss, _ = losses.cross_entropy(
            self.logits(params, batch), batch["decoder_target_tokens"]
        )
        weights, _ = losses.weights_and_divisor(batch, None)
        return -jnp.sum(token_loss * weights, axis=-1)

    def predict(
        self,
        params: Params,
        encoder_input_tokens: Array,  # [B, T]
        strategy: "decoding.Strategy",
        rng: Array | None = None,
    ) -> tuple[Array, Array]:  # [B, K, S], [B, K]
        """Decodes; the best decode of a row is its last."""
        return decoding.decode(
            self.network, params, encoder_input_tokens, strategy, rng
        )
