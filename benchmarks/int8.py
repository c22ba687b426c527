# SPDX-License-Identifier: Apache-2.0
"""int8 weights against float32 ones: accuracy, logits, memory and time on a CPU.

    python benchmarks/int8.py --output benchmarks/results/int8.json

On the embedded model and Rotten Tomatoes, validation and test sentences together: five
hand-written prompts without tuning, and two tuned prompts (one on float32 weights, one
on int8 ones), each used on both. Steps of both run in turn for the time. With
``--int8_products`` int8 means that what meets its kernels is rounded to int8, too.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import tempfile
from typing import Any

import environment
import jax
import jax.numpy as jnp
import numpy as np
import step_cost
import turns

from prompt_tuning import trees
from prompt_tuning.checkpoints import base_models, prompt_file
from prompt_tuning.checkpoints.base_models import BaseModel
from prompt_tuning.commands import demo, evaluate, train
from prompt_tuning.data import vocabularies
from prompt_tuning.inference.encoding import Encoding
from prompt_tuning.methods import registry
from prompt_tuning.network import quantization
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.runs import baselines
from prompt_tuning.runs.settings import Base, Data, Settings, Tuning
from prompt_tuning.tasks import rotten_tomatoes
from prompt_tuning.training import optimizers
from prompt_tuning.training.prompt_starts import class_labels_init
from prompt_tuning.training.schedule import Schedule
from prompt_tuning.types import Params

DTYPES = ("float32", "int8")
SPLITS = ("validation", "test")
LABELS = ("negative", "positive")
SMALL = T5Config(32128, 512, 6, 8, 8, 64, 1024)


def config_of(dtype: str, products: bool, sizes: T5Config = demo.CONFIG) -> T5Config:
    """The configuration that a dtype of weights is used with."""
    return dataclasses.replace(sizes, int8_products=products and dtype == "int8")


def tune(folder: pathlib.Path, config: T5Config, dtype: str, steps: int) -> str:
    """Tunes a prompt as the demo does, with fewer steps; returns its path."""
    tuning = Tuning(
        method="prompt_tuning",
        optimizer=optimizers.adafactor(
            optimizers.learning_rate_schedule("constant", 0.1),
            multiply_by_parameter_scale=False,
            weight_decay_rate=1e-5,
        ),
        prompt_length=demo.PROMPT_LENGTH,
        prompt_init=class_labels_init(LABELS),
    )
    settings = Settings(
        base=Base(
            config=config,
            initial_checkpoint_path=demo.CHECKPOINT,
            frozen_dtype=dtype,
        ),
        data=Data(
            mixture_or_task_name=demo.ROTTEN_TOMATOES.name,
            mixture_or_task_module=demo.ROTTEN_TOMATOES.module,
            task_feature_lengths=demo.ROTTEN_TOMATOES.lengths,
        ),
        tuning=tuning,
        schedule=Schedule(steps, 100, 1000),
    )
    train.train(model_dir=str(folder), settings=settings)
    return str(folder / prompt_file.FILE)


def right(
    folder: pathlib.Path, prompt: str, config: T5Config, dtype: str, split: str
) -> np.ndarray:
    """Which sentences of a split a prompt is right about: [N] bool."""
    evaluate.evaluate(
        config=config,
        initial_checkpoint_path=demo.CHECKPOINT,
        mixture_or_task_name=demo.ROTTEN_TOMATOES.name,
        mixture_or_task_module=demo.ROTTEN_TOMATOES.module,
        task_feature_lengths=demo.ROTTEN_TOMATOES.lengths,
        prompt_file=prompt,
        split=split,
        output_dir=str(folder),
        frozen_dtype=dtype,
    )
    with (folder / "predictions.jsonl").open(encoding="utf-8", newline="\n") as lines:
        rows = [json.loads(line) for line in lines]
    return np.array([row["answer"] == row["target"] for row in rows])


def compare(float32: np.ndarray, int8: np.ndarray) -> dict[str, float]:
    """Accuracies on the same sentences, and the share on which both agree."""
    low, high = baselines.margin_interval(int8, float32)
    return {
        "float32": float(float32.mean()),
        "int8": float(int8.mean()),
        "difference_interval_95": [low, high],
        "same_answers": float((float32 == int8).mean()),
    }


def zero_shot(models: dict[str, BaseModel]) -> dict[str, Any]:
    """Rank classification by hand-written prompts."""
    parts = [rotten_tomatoes.texts_and_labels(split) for split in SPLITS]
    texts, labels = ([*one, *other] for one, other in zip(*parts, strict=True))
    answers = {
        dtype: baselines.hand_written(
            model,
            demo.ROTTEN_TOMATOES.prompts,
            texts,
            labels,
            vocabularies.load("mini"),
        )
        for dtype, model in models.items()
    }
    found = {
        prompt.pattern: compare(**{dtype: answers[dtype][i] for dtype in DTYPES})
        for i, prompt in enumerate(demo.ROTTEN_TOMATOES.prompts)
    }
    found["all five"] = compare(**{dtype: answers[dtype].ravel() for dtype in DTYPES})
    return found


def logits(models: dict[str, BaseModel]) -> dict[str, float]:
    """How far teacher-forced logits of test sentences and their labels move."""
    texts, labels = rotten_tomatoes.texts_and_labels("test")
    vocabulary = vocabularies.load("mini")
    encoding = Encoding({}, 0, demo.CONFIG.vocab_size, vocabulary)
    rows = [encoding.encode({"text": text}) for text in texts]
    tokens = np.zeros((len(rows), -(-max(map(len, rows)) // 32) * 32), np.int32)
    for padded, ids in zip(tokens, rows, strict=True):
        padded[: len(ids)] = ids
    pieces = [[*vocabulary.encode(label), vocabulary.eos_id] for label in LABELS]
    width = max(map(len, pieces))
    table = np.array([ids + [0] * (width - len(ids)) for ids in pieces], np.int32)
    targets = table[np.array(labels)]
    batch = {
        "encoder_input_tokens": tokens,
        "decoder_input_tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0))),
        "decoder_target_tokens": targets,
    }
    compute = lambda base: jax.jit(Model(Transformer(base.config)).logits)(
        base.params, batch
    )
    real = targets > 0
    float32, int8 = (np.asarray(compute(models[d]))[real] for d in DTYPES)
    log_odds = lambda x: np.asarray(jax.nn.log_softmax(x))
    moved = int8 - float32
    centred = float32 - float32.mean(-1, keepdims=True)
    change = np.abs(log_odds(int8) - log_odds(float32))
    return {
        "target_tokens": len(float32),
        "rms_difference_over_rms": float(
            np.sqrt(np.mean(moved**2) / np.mean(centred**2))
        ),
        "mean_absolute_difference": float(np.abs(moved).mean()),
        "largest_absolute_difference": float(np.abs(moved).max()),
        "target_log_likelihood_mean_absolute_difference": float(
            change[np.arange(len(change)), targets[real]].mean()
        ),
        "same_best_token": float((int8.argmax(-1) == float32.argmax(-1)).mean()),
    }


def quantized(params: Params) -> Params:
    """The same tree with int8 kernels."""
    flat = trees.flatten(params)
    for name in [name for name in flat if name.endswith(f"/{quantization.KERNEL}")]:
        flat[name], flat[quantization.scale_name(name)] = quantization.quantize(
            flat[name]
        )
    return trees.unflatten(flat)


def times(config: T5Config, products: bool, batch: int, rounds: int) -> dict[str, Any]:
    """Seconds and planned bytes of loss and prompt gradient, 228 inputs, 8 targets."""
    models = {
        dtype: Model(
            Transformer(config_of(dtype, products, config), (Prompt("task", 100),))
        )
        for dtype in DTYPES
    }
    params = models["float32"].init(jax.random.key(0))
    tuned, frozen = registry.split(params, registry.rules_of("prompt_tuning"))
    weights = {"float32": frozen, "int8": quantized(frozen)}
    text = jax.random.randint(jax.random.key(1), (batch, 128), 3, config.vocab_size)
    ids = jnp.broadcast_to(config.vocab_size + jnp.arange(100), (batch, 100))
    targets = jax.random.randint(jax.random.key(2), (batch, 8), 3, config.vocab_size)
    data = {
        "encoder_input_tokens": jnp.concatenate([ids, text], axis=1),
        "decoder_input_tokens": targets,
        "decoder_target_tokens": targets,
    }
    gradient = lambda model: jax.jit(
        jax.value_and_grad(
            lambda tuned, frozen: model.loss(trees.merge(tuned, frozen), data)[0]
        )
    )
    programs = {
        d: gradient(models[d]).lower(tuned, weights[d]).compile() for d in DTYPES
    }
    calls = {d: functools.partial(programs[d], tuned, weights[d]) for d in DTYPES}
    seconds = turns.seconds(calls, rounds)
    median = {dtype: statistics.median(seconds[dtype]) for dtype in DTYPES}
    return {
        "shape": {"batch": batch, "rounds": rounds},
        "median_seconds": median,
        "time_ratio": median["int8"] / median["float32"],
        "planned_bytes": {d: step_cost.planned_bytes(programs[d]) for d in DTYPES},
    }


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=300, help="of tuning; 0: no tuning"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--int8_products", action="store_true")
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    configs = {dtype: config_of(dtype, options.int8_products) for dtype in DTYPES}
    models = {
        dtype: base_models.load(configs[dtype], demo.CHECKPOINT, frozen_dtype=dtype)
        for dtype in DTYPES
    }
    weights = {dtype: model.params for dtype, model in models.items()}
    results: dict[str, Any] = {
        "model": demo.CHECKPOINT,
        "steps": options.steps,
        "weight_bytes": {dtype: trees.num_bytes(weights[dtype]) for dtype in DTYPES},
        "int8_products": options.int8_products,
        "logits": logits(models),
        "zero_shot": zero_shot(models),
        "tuned": {},
    }
    with tempfile.TemporaryDirectory() as parent:
        for dtype in DTYPES if options.steps else ():
            folder = pathlib.Path(parent, dtype)
            prompt = tune(folder, configs[dtype], dtype, options.steps)
            answers = {
                use: np.concatenate(
                    [
                        right(folder / "answers", prompt, configs[use], use, split)
                        for split in SPLITS
                    ]
                )
                for use in DTYPES
            }
            results["tuned"][f"on {dtype}"] = compare(**answers)
    results["gradient"] = {
        name: [
            times(config, options.int8_products, batch, options.rounds)
            for batch in (1, 16)
        ]
        for name, config in (("embedded", demo.CONFIG), ("t5_1_1_small", SMALL))
    }
    environment.publish(results, options.output)


if __name__ == "__main__":
    main()
