# SPDX-License-Identifier: Apache-2.0
"""Mean encoder states that are drawn towards a teacher's sentence vectors.

Pre-training packs sentences into rows, hides spans of each as in any span corruption,
and asks for two things at once: the spans, and, through a linear map that is thrown
away afterwards, the vector that a sentence encoder (Reimers and Gurevych 2019) gives to
the whole sentence. The encoder runs once for both. It is the distillation of a layer's
states by a learned projection (Romero et al. 2015), with a cosine for the distance.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning import trees
from prompt_tuning.errors import UserError
from prompt_tuning.network.model import Model
from prompt_tuning.types import Array, Batch, Params

# The leaf of the linear map [H, D], beside those of the network.
MAP = "distillation"
# The feature that brings the teacher's vectors: [B, M, D], 0 where a row has fewer.
VECTORS = "teacher_vectors"
_TABLE, _OUTPUT = "token_embedder/embedding", "decoder/logits_dense/kernel"
# Every so many sentences one is held out.
HELD_OUT_PERIOD = 64


@dataclasses.dataclass(frozen=True)
class Sentences:
    """Sentences and their vectors, as `scripts/mini/teacher.py` writes them.

    Attributes:
      ids: token ids of all sentences, end to end, without EOS.
      offsets: where sentence i starts, and the end: [N + 1].
      vectors: the teacher's vectors, of unit length: [N, D].
      chosen: the sentences that may be drawn: [n].
    """

    ids: np.ndarray
    offsets: np.ndarray
    vectors: np.ndarray
    chosen: np.ndarray

    @classmethod
    def load(cls, path: str | pathlib.Path, *, held_out: bool) -> "Sentences":
        """Reads an ``.npz`` file.

        Args:
          path: the file.
          held_out: which part may be drawn: one in `HELD_OUT_PERIOD`, or the others.

        Raises:
          UserError: the file is missing or lacks an array.
        """
        if not pathlib.Path(path).exists():
            raise UserError(f"{path} is missing; rows to distil need its vectors")
        with np.load(path) as file:
            missing = [n for n in ("ids", "offsets", "vectors") if n not in file]
            if missing:
                raise UserError(f"{path} lacks the arrays {', '.join(missing)}")
            numbers = np.arange(len(file["vectors"]))
            is_held_out = numbers % HELD_OUT_PERIOD == 0
            return cls(
                file["ids"],
                file["offsets"],
                file["vectors"],
                numbers[is_held_out == held_out],
            )

    def sentence(self, i: int) -> np.ndarray:
        """Ids of sentence ``i``."""
        return self.ids[self.offsets[i] : self.offsets[i + 1]].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class DistilledModel(Model):
    """A `Model` whose loss draws mean encoder states towards a teacher's vectors.

    A batch without the feature `VECTORS` is one of `Model`.

    Attributes:
      distillation_weight: what the mean of 1 - cosine is multiplied by before it is
        added to the loss.
    """

    distillation_weight: float = 1.0

    def loss(
        self,
        params: Params,
        batch: Batch,
        dropout_rng: Array | None = None,
        divisor: Array | float | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """See `Model.loss`.

        The metrics have ``cosine`` and ``sentences`` too: the sum of the cosines, and
        of how many sentences.
        """
        encoded, hidden = self.states(params, batch, dropout_rng)
        loss, metrics = self.loss_of_states(params, batch, hidden, divisor)
        if VECTORS not in batch:
            return loss, metrics
        cosine, count = cosines(params[MAP]["kernel"], encoded, batch)
        distance = 1.0 - cosine / jnp.maximum(count, 1.0)
        metrics |= {"cosine": cosine, "sentences": count}
        return loss + self.distillation_weight * distance, metrics


def cosines(
    kernel: Array,  # [H, D]
    encoded: Array,  # [B, T, H]
    batch: Batch,
) -> tuple[Array, Array]:
    """The sum of cosines between mapped mean states and vectors, and their number."""
    vectors = batch[VECTORS].astype(jnp.float32)
    segments = batch["encoder_segment_ids"][..., None]
    places = segments == jnp.arange(1, vectors.shape[1] + 1)[None, None]  # [B, T, M]
    # The sum has the mean's direction, which is all that a cosine sees.
    total = jnp.einsum("bth,btm->bmh", encoded.astype(jnp.float32), places)
    mapped = total @ kernel
    known = jnp.any(vectors != 0, axis=-1)
    # The epsilon keeps the gradient of empty places finite.
    norm = jnp.sqrt(jnp.sum(mapped**2, axis=-1) + 1e-6)
    cosine = jnp.sum(mapped * vectors, axis=-1) / norm
    return jnp.sum(cosine * known), jnp.sum(known, dtype=jnp.float32)


def init_map(key: Array, emb_dim: int, teacher_dim: int) -> Params:
    """The linear map's leaf, to be merged into a network's parameters."""
    kernel = jax.random.normal(key, (emb_dim, teacher_dim)) / emb_dim**0.5
    return {MAP: {"kernel": kernel}}


def reduced_table(table: np.ndarray, emb_dim: int) -> np.ndarray:
    """Word vectors [N, D] in ``emb_dim`` dimensions, with entries of mean square 1.

    Their principal components: no linear map to this width keeps more of them.

    Raises:
      UserError: ``emb_dim`` is more than D.
    """
    if emb_dim > table.shape[1]:
        raise UserError(
            f"word vectors of width {table.shape[1]} cannot start a table of {emb_dim}"
        )
    centred = table.astype(np.float64) - table.mean(0, dtype=np.float64)
    _, axes = np.linalg.eigh(centred.T @ centred)
    reduced = centred @ axes[:, ::-1][:, :emb_dim]
    return (reduced / np.sqrt(np.mean(reduced**2))).astype(np.float32)


def start_from(path: pathlib.Path, params: Params) -> Params:
    """The parameters with word vectors in the table and in an output layer of its own.

    Rows behind the vectors' stay what they are. With both alike, a token is likely where
    the decoder's state is like it, so that to repeat one has not to be learned.

    Args:
      path: word vectors [N, D], as `scripts/mini/teacher.py` writes them.
      params: of a network.

    Raises:
      UserError: the file is missing, or has more rows than the table or too few columns.
    """
    if not path.exists():
        raise UserError(f"{path} is missing; START_TABLE takes word vectors from it")
    flat = trees.flatten(params)
    size, width = flat[_TABLE].shape
    rows = reduced_table(np.load(path), width)
    if len(rows) > size:
        raise UserError(f"{path} has {len(rows)} rows, the model's table {size}")
    flat[_TABLE] = flat[_TABLE].at[: len(rows)].set(rows)
    if _OUTPUT in flat:
        columns = rows.T / width**0.5
        flat[_OUTPUT] = flat[_OUTPUT].at[:, : len(rows)].set(columns)
    return trees.unflatten(flat)
