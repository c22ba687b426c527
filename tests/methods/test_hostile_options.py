# SPDX-License-Identifier: Apache-2.0
"""Options that are none, of every method: one line that names them, and nothing written."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning import cli
from prompt_tuning.checkpoints import adapter_file
from prompt_tuning.errors import UserError
from prompt_tuning.methods import registry
from prompt_tuning.methods.decomposed_prompt import DecomposedPrompt
from prompt_tuning.methods.dept import DePT
from prompt_tuning.methods.instruction_aware_prompt import InstructionAwarePrompt
from prompt_tuning.methods.low_dimensional_prompt import LowDimensionalPrompt
from prompt_tuning.methods.method import Start
from prompt_tuning.network.model import Model
from prompt_tuning.network.slots import Scale
from prompt_tuning.network.transformer import T5Config, Transformer

CLASSES = {
    kind: method
    for kind, method in sorted(registry.METHODS.items())
    if method.__module__.startswith("prompt_tuning.") and dataclasses.fields(method)
}
# Of no option a value, whatever its kind.
NEVER = (-1, "3", "", "nothing", b"x", math.nan, math.inf, -math.inf)
NEVER += ({"a": 1}, (1,), [None], (math.nan,), ("",), ("a", 1))
# Nor of one of these kinds.
BESIDE = {
    bool: (0, 1, 2.5, None, (), []),
    int: (True, False, 2.5, None, (), [], 2**64),
    float: (True, False, None, (), []),
    str: (0, True, None, ()),
    tuple: (0, True, False, 2.5, None),
}


@pytest.fixture(scope="module")
def base():
    model = Model(Transformer(T5Config(64, 16, 2, 1, 1, 8, 32)))
    return jax.eval_shape(model.init, jax.random.key(0))


def begin(method, base):
    """What a run does before its first step, as shapes."""
    if method.result == "model":
        return jax.eval_shape(method.split, base)
    rows = jax.ShapeDtypeStruct((4, 16), jnp.float32)
    table = base["token_embedder"]["embedding"]
    start = Start(rows, table, base, [rows] * len(method.reads()))
    jax.eval_shape(method.held, start)
    return jax.eval_shape(method.init, jax.random.key(0), start)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_value_of_another_kind_is_one_line(kind, base):
    """In a class's own checks, or where it first meets the model."""
    usual = CLASSES[kind]()
    for field in dataclasses.fields(CLASSES[kind]):
        value = getattr(usual, field.name)
        kinds = int if value is None else type(value)
        bad = [x for x in (*NEVER, *BESIDE[kinds]) if x != value or x is False]
        if value is None or value is False:
            bad = [x for x in bad if x is not value]
        for each in bad:
            with pytest.raises(UserError) as caught:
                begin(CLASSES[kind](**{field.name: each}), base)
            message = str(caught.value)
            assert "\n" not in message and len(message) < 400, each
            unknown = "no method is called" in message
            assert field.name in message or unknown, each


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (DecomposedPrompt(rank=17), "rank=17"),
        (DePT(rank=17), "rank=17"),
        (LowDimensionalPrompt(17), "dimensions=17"),
        (InstructionAwarePrompt(17), "bottleneck=17"),
    ],
)
def test_a_size_above_the_width_is_refused(method, message, base):
    with pytest.raises(UserError, match=f"{message} is more than the width .*16"):
        begin(method, base)


@pytest.mark.parametrize(
    ("kind", "words", "says"),
    [
        ("lora", ["--lora_rank=0"], "LORA_RANK=0 must be a whole number"),
        ("lora", ["--lora_rank=True"], "LORA_RANK=True must be a whole number"),
        ("lora", ["--lora_rank=99"], "LoRA.rank=99 is more than"),
        ("lora", ["--lora_rank=ten"], "LORA_RANK='ten' must be a whole number"),
        ("lora", ["--lora_targets=()"], "none is no kernel of the model's layers"),
        ("lora", ["--lora_targets=query"], "LORA_TARGETS='query' must be a list"),
        ("lora", ["--learning_rate=nan"], "LEARNING_RATE"),
        ("lora", ["--learning_rate=-1"], "LEARNING_RATE"),
        ("lora", ["--learning_rate=[]"], "LEARNING_RATE"),
        ("lora", ["--gin_file=prompts/text.gin"], "prompt"),
        ("decomposed_prompt", ["--gin_file=prompts/saved.gin"], "prompt"),
        ("attempt", [], "ATTEMPT_SOURCES"),
        ("multitask_prompt", ["--answers=0.9"], "name their files as TEACHERS"),
        ("multitask_prompt", ["--teachers=('other.npz',)"], "other.npz"),
        (
            "multitask_prompt",
            ["--teachers=('a.safetensors',)"],
            "holds an adapter, which changes",
        ),
        ("model_tuning", ["--frozen_dtype=int8"], "which int8 cannot hold"),
        ("prompt_tuning", ["--gin_file=methods/lora.gin"], "methods"),
        ("prompt_tuning", ["--prompt_length=-3"], "PROMPT_LENGTH=-3"),
        ("composed", ["--part_rates=(1,)"], "a number of 0 or more for each"),
    ],
    ids=str,
)
def test_on_the_command_line_it_ends_with_2_and_writes_nothing(
    kind, words, says, train_words, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    np.savez("other.npz", x=np.zeros(3))
    slots = {"encoder/layers/mlp/wo/input": Scale.of(np.ones((1, 32), np.float32))}
    adapter_file.save("a.safetensors", np.zeros((0, 16)), slots, {"method": "ia3"})
    given = train_words(MODEL_DIR="run", MIXTURE_OR_TASK_NAME="hostile_reviews")
    given = [word.replace("methods/prompt_tuning", f"methods/{kind}") for word in given]
    flags = {word.split("=")[0].strip("-").upper() for word in words}
    # A method without rows of its own has no length, one of the model's own no prompt.
    has_length = kind not in ("lora", "model_tuning")
    given = [
        word
        for word in given
        if (has_length or "PROMPT_LENGTH" not in word)
        and not any(word.startswith(f"--gin.{flag}=") for flag in flags)
    ]
    assert cli.main([*given, *words]) == 2
    out = capsys.readouterr().err.strip().splitlines()
    assert says in out[-1] and out[-1].startswith("prompt-tuning: ")
    assert not any("Traceback" in line for line in out)
    left = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert left == []
