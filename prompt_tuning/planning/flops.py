# SPDX-License-Identifier: Apache-2.0
"""Floating point operations of a step, by formula."""

from prompt_tuning.network.model import packs_of
from prompt_tuning.planning.workload import TRAIN, Workload


def count(work: Workload) -> dict[str, int]:
    """Floating point operations of one step over all chips.

    A weight costs 2 for every token that it meets, a multiplication and an addition. A
    training step takes as much again for the gradient of its input, and a tuned weight
    2 more for its own. Weights of the encoder, and the decoder's that make keys and
    values of the encoder's output, meet the T encoder tokens of a row (prompt and
    padding included), the others of the decoder its S. Attention has no weights: its
    two products of N heads of width D take 4 T^2 N D a row forward and twice that
    backward. Ranking, and a loss over labels, run the decoder once a label, and make those
    keys and values once for the labels of a decoder row (`model.packs_of`). Of two prompts
    whose answers a lesson compares, the batch is read once more as a step reads it with the
    pupil, and forward alone with the teacher.
    What remat computes again, and elementwise work, does not count.

    Returns:
      ``weights``, ``attention`` and ``total``.
    """
    tokens, pairs = _read(work, work.decoders)
    joined = work.config.num_heads * work.config.head_dim
    each, passes = 2, 1
    if work.step == TRAIN:
        each, passes = 6 if work.method.result == "model" else 4, 3
    weights, attention = each * tokens, passes * 4 * pairs * joined
    if work.step == TRAIN and work.comparisons:
        tokens, pairs = _read(work, 1)
        weights += work.comparisons * (4 + 2) * tokens
        attention += work.comparisons * (3 + 1) * 4 * pairs * joined
    weights, attention = weights * work.batch_size, attention * work.batch_size
    return {"weights": weights, "attention": attention, "total": weights + attention}


def _read(work: Workload, runs: int) -> tuple[int, int]:
    """Of a row and so many decoders: weights times their tokens, and pairs of positions."""
    cfg = work.config
    encoder, decoder = work.inputs + work.prompt_length, work.targets
    joined = cfg.num_heads * cfg.head_dim
    square = cfg.emb_dim * joined  # one of query, key, value and out
    mlp = (len(cfg.mlp_activations) + 1) * cfg.emb_dim * cfg.mlp_dim
    at_encoder = cfg.num_encoder_layers * (4 * square + mlp)
    at_decoder = cfg.num_decoder_layers * (6 * square + mlp)
    at_decoder += cfg.vocab_size * cfg.emb_dim
    memory = cfg.num_decoder_layers * 2 * square
    packs, _ = packs_of(runs, decoder)
    tokens = at_encoder * encoder + packs * memory * encoder
    tokens += runs * at_decoder * decoder
    pairs = cfg.num_encoder_layers * encoder**2
    pairs += runs * cfg.num_decoder_layers * decoder * (decoder + encoder)
    return tokens, pairs
