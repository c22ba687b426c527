# SPDX-License-Identifier: Apache-2.0
"""Optimizers: Adafactor against numpy, layer by layer; schedules; clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prompt_tuning.errors import UserError
from prompt_tuning.training import optimizers

RATE, DECAY = 0.01, 1e-3


def reference_adafactor(param, grads, *, factored):
    """Shazeer and Stern (2018), algorithms 1, 4 and 5, in float64.

    Returns:
      The parameter after all gradients, and the statistics: (row, column) or the
      full second moment.
    """
    param = param.astype(np.float64)
    rows = columns = full = 0.0
    for t, grad in enumerate(grads, start=1):
        beta = 1 - t**-0.8
        square = grad.astype(np.float64) ** 2 + 1e-30
        if factored:
            rows = beta * rows + (1 - beta) * square.mean(axis=1)
            columns = beta * columns + (1 - beta) * square.mean(axis=0)
            moment = np.outer(rows, columns) / rows.mean()
        else:
            full = beta * full + (1 - beta) * square
            moment = full
        update = grad / np.sqrt(moment)
        update /= max(1.0, np.sqrt(np.mean(update**2)))
        scale = max(1e-3, np.sqrt(np.mean(param**2)))
        param = (1 - DECAY) * param - RATE * scale * update
    return param, (rows, columns) if factored else full


def assert_close(got, want):
    """To 1e-5, or to float32's rounding of the matrix where terms cancel."""
    rounding = 1e-7 * np.sqrt(np.mean(np.square(want)))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=rounding)


def random(*shape, scale=1.0):
    rng = np.random.default_rng(sum(shape))
    # Entries of unlike size, so that factoring makes a difference.
    return (rng.normal(size=shape) * np.exp(rng.normal(size=shape)) * scale).astype(
        np.float32
    )


@pytest.fixture(scope="module")
def run():
    """Parameters, two gradients, and what two steps of Adafactor made of them."""
    params = {
        "wide": {"kernel": random(130, 150)},
        "tall": {"kernel": random(150, 130)},
        "square": {"kernel": random(128, 128)},
        "narrow": {"kernel": random(127, 300)},
        "scale": random(40, scale=1e-5),
        "encoder": {"layers": {"mlp": random(2, 128, 140), "norm": random(2, 33)}},
        "decoder": {"layers": {"mlp": random(3, 128, 140)}},
        "prompts": {"p": random(150, 130)},
    }
    # The layers differ by orders of magnitude: statistics, clipping and parameter
    # scale of one must not reach the other.
    params["encoder"]["layers"]["mlp"][1] *= 100
    grads = [
        jax.tree.map(lambda p, f=f: np.roll(p, 1, -1) * np.float32(f), params)
        for f in (1.0, -0.3)
    ]
    grads[0]["encoder"]["layers"]["mlp"][0] *= 1e-3
    tx = optimizers.adafactor(RATE, weight_decay_rate=DECAY)

    @jax.jit
    def step(params, state, grad):
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    after, state = params, tx.init(params)
    for grad in grads:
        after, state = step(after, state, grad)
    return params, grads, after, state


@pytest.mark.parametrize(
    ("name", "factored"),
    [("wide", True), ("tall", True), ("square", True), ("narrow", False)],
)
def test_adafactor_on_a_matrix_is_the_papers(name, factored, run):
    params, grads, after, state = run
    want, statistics = reference_adafactor(
        params[name]["kernel"], [g[name]["kernel"] for g in grads], factored=factored
    )
    assert_close(after[name]["kernel"], want)
    moments = state.inner_states["matrix"].inner_state[0]
    pick = lambda tree: tree[name]["kernel"]
    if factored:
        got = {pick(moments.v_row).shape: pick(moments.v_row)}
        got |= {pick(moments.v_col).shape: pick(moments.v_col)}
        for value in statistics if name != "square" else ():
            np.testing.assert_allclose(got[value.shape], value, rtol=1e-5)
        assert pick(moments.v).shape == (1,)
    else:
        np.testing.assert_allclose(pick(moments.v), statistics, rtol=1e-5)


def test_adafactor_scales_a_tiny_vector_by_its_floor(run):
    params, grads, after, _ = run
    want, _ = reference_adafactor(
        params["scale"], [g["scale"] for g in grads], factored=False
    )
    assert_close(after["scale"], want)


@pytest.mark.parametrize(
    ("stack", "leaf", "factored"),
    [("encoder", "mlp", True), ("encoder", "norm", False), ("decoder", "mlp", True)],
)
def test_stacked_layers_move_as_separate_matrices(stack, leaf, factored, run):
    params, grads, after, _ = run
    pick = lambda tree: tree[stack]["layers"][leaf]
    for layer, got in enumerate(pick(after)):
        want, _ = reference_adafactor(
            pick(params)[layer], [pick(g)[layer] for g in grads], factored=factored
        )
        assert_close(got, want)


def test_a_long_prompt_is_not_factored(run):
    params, grads, after, state = run
    want, second_moment = reference_adafactor(
        params["prompts"]["p"], [g["prompts"]["p"] for g in grads], factored=False
    )
    assert_close(after["prompts"]["p"], want)
    moments = state.inner_states["prompt"].inner_state[0]
    np.testing.assert_allclose(moments.v["prompts"]["p"], second_moment, rtol=1e-5)


def test_adamw_clips_the_global_norm_before_its_statistics():
    params = {"a": jnp.zeros(3), "b": jnp.zeros(4)}
    grads = {"a": jnp.full(3, 300.0), "b": jnp.full(4, -400.0)}
    clipped = optimizers.adamw(1e-3, max_grad_norm=1.0)
    _, state = clipped.update(grads, clipped.init(params), params)
    norm = np.sqrt(3 * 300**2 + 4 * 400**2)
    (adam,) = [
        leaf
        for leaf in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(leaf, "mu")
    ]
    np.testing.assert_allclose(adam.mu["a"], 0.1 * 300 / norm, rtol=1e-5)


def test_adamw_takes_a_step_of_the_rate_and_decays_weights():
    params = {"a": jnp.full(3, 2.0)}
    tx = optimizers.adamw(0.1, weight_decay_rate=0.5)
    updates, _ = tx.update({"a": jnp.full(3, 7.0)}, tx.init(params), params)
    np.testing.assert_allclose(updates["a"], -0.1 - 0.1 * 0.5 * 2.0, rtol=1e-5)


def rate(step, *args, **kwargs):
    return float(optimizers.learning_rate_schedule(*args, **kwargs)(step))


def test_after_decay_steps_the_rate_stays_at_its_floor():
    assert rate(999, "constant * linear_to_zero", 2.0, 10, 110) == pytest.approx(1e-8)
    floor = rate(999, "constant * cosine_to_zero", 2.0, 10, 110, min_learning_rate=0.25)
    assert floor == 0.25


def test_cosine_decay_runs_in_cycles():
    args = ("constant * cosine_decay", 1.0, 10)
    got = [rate(step, *args, steps_per_cycle=40) for step in (0, 10, 30, 49, 50)]
    late = 0.5 * (1 + np.cos(np.pi * 39 / 40))
    np.testing.assert_allclose(got, [1, 1, 0.5, late, 1], rtol=1e-4)


def test_decay_every_multiplies_in_steps():
    args = ("constant * decay_every", 8.0)
    got = [
        rate(step, *args, decay_factor=0.25, steps_per_decay=5)
        for step in (0, 4, 5, 10)
    ]
    np.testing.assert_allclose(got, [8, 8, 2, 0.5])


def test_a_schedule_runs_inside_jit():
    schedule = optimizers.learning_rate_schedule("constant * linear_warmup", 1.0, 4)
    np.testing.assert_allclose(jax.jit(schedule)(jnp.int32(3)), 0.75)


def test_an_unknown_factor_lists_those_that_exist():
    with pytest.raises(
        ValueError, match="'warmup' is not one of constant, linear_warm"
    ):
        optimizers.learning_rate_schedule("constant * warmup")


@pytest.mark.parametrize("name", ["linear_to_zero", "cosine_to_zero"])
def test_a_decay_to_zero_needs_its_end(name):
    with pytest.raises(ValueError, match=f"{name} needs decay_steps"):
        optimizers.learning_rate_schedule(f"constant * {name}")


def test_a_warmup_of_a_tenth():
    """None is a tenth of the steps to the decay's end, and none at all below ten."""
    schedule = lambda *values: optimizers.learning_rate_schedule(
        optimizers.DECAYED, *values
    )
    for steps, warmup in ((200, 20), (199, 19)):
        ours, same = schedule(0.5, None, steps), schedule(0.5, warmup, steps)
        assert [ours(i) for i in range(steps)] == [same(i) for i in range(steps)]
    few = schedule(0.5, None, 4)
    got = [few(i) for i in range(5)]
    np.testing.assert_allclose(got, [0.5, 0.375, 0.25, 0.125, 1e-8])
    assert float(schedule(0.5, None, 1)(0)) == 0.5
    with pytest.raises(ValueError, match="warmup_steps=None .* decay_steps: set that"):
        schedule(0.5, None)


@pytest.mark.parametrize("factor", ["linear_to_zero", "cosine_to_zero"])
def test_a_decay_to_zero_begins_at_once_or_after_its_warmup(factor):
    plain, warm = f"constant * {factor}", f"constant * linear_warmup * {factor}"
    got = [rate(step, plain, 0.1, 10_000, 100) for step in (0, 50, 100)]
    np.testing.assert_allclose(got, [0.1, 0.05, 1e-8], rtol=1e-5)
    got = [rate(step, warm, 0.1, 20, 100) for step in (10, 20, 60)]
    np.testing.assert_allclose(got, [0.05, 0.1, 0.05], rtol=1e-5)
    with pytest.raises(UserError, match="must lie after the warm-up of 20 steps"):
        optimizers.learning_rate_schedule(warm, 0.1, warmup_steps=20, decay_steps=20)


def test_the_shapes_of_decays_to_zero():
    got = [
        rate(35, f"constant * linear_warmup * {name}", 2.0, 10, 110)
        for name in ("linear_to_zero", "cosine_to_zero")
    ]
    np.testing.assert_allclose(got, [1.5, 1.7071068], rtol=1e-6)


def test_a_cooldown_leaves_the_steps_before_it_alone():
    other = "constant * linear_warmup * rsqrt_normalized_decay"
    steps, args = (5, 40, 90, 100, 105, 110, 120), (2.0, 10, 110)
    cooled = [
        rate(step, f"{other} * linear_cooldown", *args, cooldown_steps=20)
        for step in steps
    ]
    uncooled = np.array([rate(step, other, *args) for step in steps])
    np.testing.assert_allclose(
        cooled, np.maximum(uncooled * [1, 1, 1, 0.5, 0.25, 0, 0], 1e-8), rtol=1e-5
    )


def test_a_cooldown_needs_its_length_and_its_end():
    factors = "constant * linear_cooldown"
    with pytest.raises(UserError, match="linear_cooldown needs cooldown_steps"):
        optimizers.learning_rate_schedule(factors, decay_steps=10)
    with pytest.raises(UserError, match="linear_cooldown needs decay_steps"):
        optimizers.learning_rate_schedule(factors, cooldown_steps=5)
