# SPDX-License-Identifier: Apache-2.0
"""A step of decoding: nothing large moves in it, and it says what the decoder says."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning.decoding import Beam, Greedy, Sampling
from prompt_tuning.network import losses, token_step
from prompt_tuning.network.cached_attention import FIRST_STEPS, blocks_of
from prompt_tuning.network.model import Model
from prompt_tuning.network.transformer import Transformer

# Nothing makes this token likely: decodes never end.
NEVER = 255
STRATEGIES = {
    "greedy": Greedy(12, eos_id=NEVER),
    "sampling": Sampling(12, num_decodes=3, eos_id=NEVER),
    "beam": Beam(12, num_decodes=3, eos_id=NEVER),
}
# Operations that give an array, or a part of it, at another place.
MOVES = {"copy", "transpose", "slice", "dynamic-slice", "gather", "concatenate", "pad"}
INSTRUCTION = re.compile(r"= \w+\[([\d,]*)\]\S* ([\w-]+)\(")


def computations(hlo: str) -> dict[str, list[str]]:
    """The lines of each computation of a compiled program, by its name."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            lines = found.setdefault(head[1], [])
        else:
            lines.append(line)
    return found


def in_loop(hlo: str) -> list[tuple[str, int]]:
    """Operations of the decoding loop's body, fused ones too, with their elements."""
    bodies = computations(hlo)
    # The encoder's loop over layers writes no cache.
    loops = {
        name: lines
        for name, lines in bodies.items()
        if any(f"body=%{name}" in line for all_ in bodies.values() for line in all_)
    }
    (start,) = [
        name
        for name, lines in loops.items()
        if any("while/body/_Block" in line for line in lines)
    ]
    waiting, seen = [start], set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            for line in bodies[name]:
                waiting += re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", line)
                for group in re.findall(r"branch_computations=\{(.*?)\}", line):
                    waiting += re.findall(r"%?([\w.-]+)", group)
    return [
        (match[2], math.prod(int(n) for n in match[1].split(",") if n))
        for name in seen
        for line in bodies[name]
        if (match := INSTRUCTION.search(line))
    ]


@pytest.mark.parametrize("name", STRATEGIES)
def test_only_what_is_written_moves(name, tiny_model, tiny_params, tiny_batch):
    """No cache is copied or put in another order, no kernel cut out of a stack."""
    strategy = STRATEGIES[name]
    inputs = tiny_batch["encoder_input_tokens"]
    program = jax.jit(
        lambda params: tiny_model.predict(params, inputs, strategy, jax.random.key(0))
    )
    found = in_loop(program.lower(tiny_params).compile().as_text())
    config = tiny_model.network.config
    width = config.num_heads * config.head_dim
    cache = len(inputs) * width * strategy.max_decode_len * strategy.num_decodes
    kernel = config.emb_dim * width
    assert {"dot", "fusion"} & {operation for operation, _ in found}
    large = min(cache, kernel)
    assert not [each for each in found if each[0] in MOVES and each[1] >= large]
    # Keys and values of each layer, in place.
    writes = [each for each in found if each == ("dynamic-update-slice", cache)]
    assert len(writes) == 2 * config.num_decoder_layers


@pytest.mark.parametrize("tied", [False, True], ids=["t5_1_1", "t5_1_0"])
def test_logits_take_no_float32_copy_of_bfloat16_weights(
    tied, tiny_config, tiny_params, tiny_batch
):
    config = dataclasses.replace(
        tiny_config, dtype="bfloat16", logits_via_embedding=tied
    )
    model, tokens = Model(Transformer(config)), tiny_batch["encoder_input_tokens"]
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_params)
    decode = jax.jit(lambda params: model.predict(params, tokens, Greedy(3)))
    text = decode.lower(params).as_text()
    widened = re.findall(r"convert .*tensor<([\dx]+)xbf16>\) -> tensor<.*xf32>", text)
    # The states before a norm are, of several positions at once or of one.
    assert widened
    assert not [
        shape for shape in widened if str(config.vocab_size) in shape.split("x")
    ]


@pytest.mark.parametrize("name", STRATEGIES)
def test_layers_in_one_piece_give_the_same(
    name, tiny_model, tiny_params, tiny_batch, monkeypatch
):
    """Decoders too large for two copies of their weights are scanned."""
    inputs, found = tiny_batch["encoder_input_tokens"], []
    for size in (token_step.TAKEN_APART_BYTES, 0):
        monkeypatch.setattr(token_step, "TAKEN_APART_BYTES", size)
        found.append(
            jax.jit(tiny_model.predict, static_argnums=2)(
                tiny_params, inputs, STRATEGIES[name], jax.random.key(0)
            )
        )
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 2])
def test_answers_longer_than_a_block_are_those_of_the_decoder(
    beams, tiny_model, tiny_params, tiny_batch
):
    """The decoder, teacher-forced, gives the same tokens the same probability."""
    inputs, length = tiny_batch["encoder_input_tokens"], 2 * FIRST_STEPS + 6
    assert len(blocks_of(length)) == 3
    strategy = Beam(length, num_decodes=beams, alpha=0.0, eos_id=NEVER)
    tokens, scores = jax.jit(tiny_model.predict, static_argnums=2)(
        tiny_params, inputs, strategy
    )
    for beam in range(beams):
        said = tokens[:, beam]
        batch = {
            "encoder_input_tokens": inputs,
            "decoder_input_tokens": jnp.pad(said[:, :-1], ((0, 0), (1, 0))),
            "decoder_target_tokens": said,
        }
        logits = tiny_model.logits(tiny_params, batch)
        loss, _ = losses.cross_entropy(logits, said)
        last = (said == NEVER).astype(jnp.int32)
        ended = jnp.cumsum(last, axis=1) - last
        want = -jnp.sum(jnp.where(ended == 0, loss, 0.0), axis=1)
        np.testing.assert_allclose(scores[:, beam], want, rtol=1e-5)
