# SPDX-License-Identifier: Apache-2.0
"""Tries of label tokens, which keep a decoding to the labels of each row's task.

Ranking scores every label; with hundreds of them a constrained search is cheaper, for it
reads only the branches that are still likely. The tries of all tasks lie in one table,
so rows of several tasks share a batch, and the table is data to the compiled program:
label sets of about the same size do not compile anew.
"""

from collections.abc import Sequence

import flax.struct
import jax.numpy as jnp
import numpy as np

from prompt_tuning.decoding.masks import NEG_INF
from prompt_tuning.errors import UserError
from prompt_tuning.types import Array

# Nodes of every table. Nothing follows the end of a label; anything follows FREE.
END, FREE = 0, 1
# Fills the places of edges that a node lacks: no vocabulary has this token.
NO_TOKEN = np.iinfo(np.int32).max


@flax.struct.dataclass
class LabelTrie:
    """Label sets as one table of edges; sizes are powers of two, to be met again.

    Attributes:
      tokens: ``[nodes, branch]``, the tokens that may follow a node.
      children: ``[nodes, branch]``, the nodes that they lead to.
      roots: ``[G]``, the node where each label set begins.
      max_decode_len: tokens that labels may have, their end token included.
    """

    tokens: Array
    children: Array
    roots: Array
    max_decode_len: int = flax.struct.field(pytree_node=False)

    @classmethod
    def build(
        cls,
        label_sets: Sequence[Sequence[Sequence[int] | np.ndarray]],
        max_decode_len: int,
        eos_id: int = 1,
    ) -> "LabelTrie":
        """Lays out the tries of G label sets.

        Args:
          label_sets: each a table ``[C, S]`` such as `label_sets.label_tokens` makes:
            labels that end with ``eos_id``, padded with 0.
          max_decode_len: that of the strategy, less the length of a decoder prefix.
          eos_id: the token that ends a label.

        Raises:
          UserError: a set is empty, or a label is longer than ``max_decode_len``.
          ValueError: a label does not end with its first end token.
        """
        edges: list[dict[int, int]] = [{}, {}]  # END and FREE are no one's parents.
        roots = []
        for index, labels in enumerate(label_sets):
            if not len(labels):
                raise UserError(f"label set {index} is empty; give it a label")
            roots.append(len(edges))
            edges.append({})
            for row in labels:
                *label, last = np.trim_zeros(np.asarray(row), "b").tolist() or [0]
                if last != eos_id or eos_id in label or 0 in label:
                    raise ValueError(
                        f"label {[*label, last]} of set {index} must end with its only "
                        f"end token {eos_id}"
                    )
                if len(label) >= max_decode_len:
                    raise UserError(
                        f"a label of set {index} has {len(label) + 1} tokens: raise "
                        f"max_decode_len={max_decode_len}"
                    )
                node = roots[-1]
                for token in label:
                    child = edges[node].setdefault(token, len(edges))
                    if child == len(edges):
                        edges.append({})
                    node = child
                edges[node][eos_id] = END
        shape = tuple(power_of_two(n) for n in (len(edges), max(map(len, edges))))
        tokens = np.full(shape, NO_TOKEN, np.int32)
        children = np.full(shape, END, np.int32)
        for node, out in enumerate(edges):
            tokens[node, : len(out)] = list(out)
            children[node, : len(out)] = list(out.values())
        return cls(tokens, children, np.array(roots, np.int32), max_decode_len)  # pyright: ignore[reportArgumentType]

    def rows(self, sets: Sequence[int | None]) -> "Constraint":
        """Binds each row of a batch to a label set; None leaves a row free."""
        roots = [FREE if index is None else int(self.roots[index]) for index in sets]
        return Constraint(self, np.array(roots, np.int32))  # pyright: ignore[reportArgumentType]

    def mask(self, nodes: Array, logits: Array) -> Array:  # [R], [R, V] -> [R, V]
        """Leaves the logits of tokens that may follow, `NEG_INF` for the others."""
        rows = jnp.arange(len(nodes))[:, None]
        follows = jnp.broadcast_to((nodes == FREE)[:, None], logits.shape)
        listed = jnp.asarray(self.tokens)[nodes]  # [R, branch]
        follows = follows.at[rows, listed].set(True, mode="drop")
        return jnp.where(follows, logits, NEG_INF)

    def follow(self, nodes: Array, tokens: Array) -> Array:  # [R], [R] -> [R]
        """The nodes that ``tokens`` lead to; END where they follow no label."""
        taken = jnp.asarray(self.tokens)[nodes] == tokens[:, None]
        children = jnp.where(taken, jnp.asarray(self.children)[nodes], END)
        return jnp.where(nodes == FREE, FREE, jnp.sum(children, axis=1))


@flax.struct.dataclass
class Constraint:
    """What the rows of a batch may write.

    Attributes:
      trie: the label sets.
      nodes: ``[B]``, the node where each row starts.
    """

    trie: LabelTrie
    nodes: Array


def power_of_two(count: int, least: int = 1) -> int:
    """The smallest power of two that is not below ``count``, nor below ``least``.

    Shapes that are rounded up to one are few, and so are the programs to compile.
    """
    return max(least, 1 << max(0, count - 1).bit_length())
