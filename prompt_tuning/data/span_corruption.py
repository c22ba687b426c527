# SPDX-License-Identifier: Apache-2.0
"""T5's denoising objective on token ids: spans become sentinels; NumPy alone."""

import numpy as np

EOS_ID = 1


def span_corruption_length(
    inputs_length: int, targets_length: int, noise_density: float, mean_span: float
) -> int:
    """The longest text whose corrupted inputs and targets fit the given lengths."""
    length = 2
    while True:
        noise, spans = _noise_and_spans(length + 1, noise_density, mean_span)
        inputs, targets = length + 1 - noise + spans + 1, noise + spans + 1
        if inputs > inputs_length or targets > targets_length:
            return length
        length += 1


def _noise_and_spans(length: int, density: float, mean_span: float) -> tuple[int, int]:
    noise = min(max(round(length * density), 1), length - 1)
    return noise, max(round(noise / mean_span), 1)


def corrupt_spans(
    tokens: np.ndarray,
    rng: np.random.Generator,
    vocab_size: int,
    noise_density: float = 0.15,
    mean_span: float = 3.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Replaces random spans by sentinels; the targets give the spans back.

    Returns:
      Inputs and targets, each ended by EOS. The first sentinel is ``vocab_size - 1``.
    """
    noise, spans = _noise_and_spans(len(tokens), noise_density, mean_span)
    kept = len(tokens) - noise
    spans = min(spans, kept)
    lengths = np.stack(
        [_random_partition(rng, kept, spans), _random_partition(rng, noise, spans)], 1
    ).reshape(-1)
    pieces = np.split(tokens, np.cumsum(lengths)[:-1])
    inputs, targets = [], []
    for i in range(spans):
        sentinel = np.array([vocab_size - 1 - i], np.int32)
        inputs += [pieces[2 * i], sentinel]
        targets += [sentinel, pieces[2 * i + 1]]
    eos = np.array([EOS_ID], np.int32)
    return np.concatenate([*inputs, eos]), np.concatenate([*targets, eos])


def _random_partition(rng, total: int, parts: int) -> np.ndarray:
    """``parts`` random positive lengths that add up to ``total``."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
