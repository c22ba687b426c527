# SPDX-License-Identifier: Apache-2.0
"""Every gin file is run: two steps at a tiny size through the command line."""

import copy
import dataclasses
import json
import pathlib
import re

import flax.linen as nn
import gin
import jax
import numpy as np
import pytest

from prompt_tuning import cli, config, trees
from prompt_tuning.checkpoints import base_models, formats, model_file
from prompt_tuning.command_line import configuration, gin_files, table
from prompt_tuning.commands import demo
from prompt_tuning.methods import registry
from prompt_tuning.methods.method import Start
from prompt_tuning.network.model import Model
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.runs import member_specs

BASE = T5Config(32128, 768, 12, 12, 12, 64, 2048)
CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
# What makes a model tiny but leaves its family (activations, output layer) alone.
TINY = {
    "vocab_size": 8192,
    "emb_dim": 16,
    "num_heads": 2,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "head_dim": 8,
    "mlp_dim": 32,
}
SMALL = [f"--gin.T5Config.{name}={value}" for name, value in TINY.items()]
# A value for every macro that a file leaves to the user.
REQUIRED = {
    "CLASS_LABELS": "('good', 'bad')",
    "PROMPT_TEXT": "a good film",
    "ATTEMPT_SOURCES": "('source.npy',)",
}


def files(kind):
    return sorted(path.name for path in (CONFIGS / kind).glob("*.gin"))


def few(kind, ends):
    """All files of a kind, of which only those with these ends are quickly tested."""
    return [
        pytest.param(name, marks=() if name.endswith(ends) else pytest.mark.slow)
        for name in files(kind)
    ]


def train(folder, reviews, checkpoint, *arguments):
    code = cli.main(
        [
            "train",
            "--gin_file=tasks/local_file.gin",
            "--gin.MIXTURE_OR_TASK_NAME=configs_reviews",
            f"--gin.TASK_FILES={reviews}",
            "--gin.TEMPLATE={sentence}",
            "--gin.LABEL_NAMES=['good', 'bad']",
            "--gin.TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 4}",
            "--gin.TRAIN_STEPS=2",
            "--gin.BATCH_SIZE=8",
            "--gin.EVAL_BATCH_SIZE=8",
            f"--gin.MODEL_DIR={folder}",
            f"--gin.INITIAL_CHECKPOINT_PATH={checkpoint}",
            *SMALL,
            *arguments,
        ]
    )
    assert code == 0
    results = json.loads((folder / "results.json").read_text())
    (member,) = results["members"]
    assert member["last_step"] == 2 and np.isfinite(member["loss"])
    assert (folder / "config.gin").read_text()
    cost, written = results["cost"], folder / member["file"]
    assert cost["steps"] == 2 and cost["flops"] > 0 and cost["processor_seconds"] > 0
    assert cost["wall_seconds"] >= cost["device_seconds"] > 0
    parts = [written] if written.is_file() else written.iterdir()
    assert member["bytes"] == sum(path.stat().st_size for path in parts)
    return results


def required(kind, name):
    """The values that a file leaves to the user."""
    used = re.findall(r"= %(\w+)", (CONFIGS / kind / name).read_text())
    return [f"{macro}={REQUIRED[macro]}" for macro in used if macro in REQUIRED]


# Of methods whose sizes are above the width of so small a model, smaller ones.
NARROW = {
    "dept.gin": ["OFFSET_RANK=3"],
    "low_dimensional_prompt.gin": ["PROMPT_DIMENSIONS=8"],
}


def method_of(name, *changes):
    said = [*required("methods", name), *changes]
    config.parse(configuration.parse([f"methods/{name}"], said))
    # To copy what is bound is how gin makes the value of it.
    return copy.deepcopy(gin.query_parameter("%METHOD"))


# The others differ from these in nothing that a command line does.
FAST = ("prompt_tuning.gin", "residual_prompt.gin", "lora.gin")


@pytest.mark.parametrize("name", few("methods", FAST))
def test_methods(name, tmp_path, reviews, tiny_checkpoint, monkeypatch):
    narrow = NARROW.get(name, ())
    method = method_of(name, *narrow)
    monkeypatch.chdir(tmp_path)
    np.save("source.npy", np.ones((3, TINY["emb_dim"]), np.float32))
    arguments = [f"--gin_file=methods/{name}", "--gin_file=models/tiny.gin"]
    arguments += [f"--gin.{value}" for value in (*required("methods", name), *narrow)]
    if method.has_prompt:
        arguments.append("--prompt_length=3")
    results = train(tmp_path, reviews, tiny_checkpoint, *arguments)
    assert results["method"] == method.describe()
    written = tmp_path / member_specs.FILES[method.result]
    assert written.exists()
    if method.result == "model":
        # Whole, and what did not move is what was read.
        before, after = map(model_file.open_checkpoint, (tiny_checkpoint, written))
        assert after.specs == before.specs
        same = [n for n in after.specs if (after.read(n) == before.read(n)).all()]
        assert (same == []) == (method.kind == "model_tuning")


@pytest.mark.parametrize("name", files("methods"))
def test_the_head_of_a_method_file_is_true(name):
    """The class in the file, its default options and what it tunes at T5 Base."""
    method = method_of(name)
    file = gin_files.read_shipped(f"methods/{name}")
    head = " ".join(file.text.split("METHOD =")[0].replace("#", "").split())
    usual = registry.METHODS[method.kind]()
    if method.kind == "composed":  # Its parts have rates of their own.
        usual = dataclasses.replace(usual, rates=(1.0, 0.01))
    if method.kind == "attempt":  # Without prompts there is nothing to mix.
        usual = dataclasses.replace(usual, sources=method.sources)
    assert method == usual
    assert name == f"{method.kind}.gin"
    assert re.search(r"https://arxiv.org/abs/\d{4}\.\d{5}", head)
    base = nn.meta.unbox(Model(Transformer(BASE)).abstract_params())
    assert file.macros_set["LEARNING_RATE"] == method.learning_rate
    length = file.macros_set["PROMPT_LENGTH"]
    assert (length > 0) == method.has_prompt
    if method.result == "model":
        tuned, _ = jax.eval_shape(method.split, base)
    else:
        rows = jax.ShapeDtypeStruct((length, BASE.emb_dim), np.float32)
        start = Start(rows, base["token_embedder"]["embedding"], base)
        tuned = jax.eval_shape(method.init, jax.random.key(0), start)
    assert f"Tunes {trees.count(tuned):,} numbers at T5 Base" in head


def test_every_method_has_a_file():
    own = [m for m in registry.METHODS.values() if "prompt_tuning." in m.__module__]
    assert files("methods") == sorted(f"{method.kind}.gin" for method in own)
    assert {method.__name__ for method in own} <= set(table.CONFIGURABLES)


# What the paper states, what the published code runs with, and a third of the steps.
RECIPES = {
    "paper_2104_08691.gin": {
        "steps": 30_000,
        "batch_size": 32,
        "eval_period": None,
        "keep_last": False,
        "dropout": 0.0,
        "dtypes": ("auto", "auto"),
        "prompt_length": 100,
        "learning_rate": 0.3,
        "label_loss": None,
    },
    "google_prompt_tuning.gin": {
        "steps": 50_000,
        "batch_size": 128,
        "eval_period": 1000,
        "keep_last": True,
        "dropout": 0.1,
        "dtypes": ("float32", "bfloat16"),
        "prompt_length": 100,
        "learning_rate": 0.3,
        "label_loss": None,
    },
    "short.gin": {
        "steps": 600,
        "batch_size": 32,
        "eval_period": None,
        "keep_last": False,
        "dropout": 0.0,
        "dtypes": ("auto", "auto"),
        "prompt_length": 20,
        # At steps 0, 10, 100 and so on.
        "learning_rate": [1e-8, 0.05, 0.277778, 1e-8, 1e-8, 1e-8],
        "label_loss": "cross_entropy",
    },
}


@pytest.mark.parametrize("name", files("recipes"))
def test_recipes(name):
    """All on T5 Base as a run would have them; they differ in RECIPES alone."""
    own = [f"recipes/{name}", "models/t5_1_1_base.gin"]
    said = ["MODEL_DIR=run", "INITIAL_CHECKPOINT_PATH=base", "MIXTURE_OR_TASK_NAME=t"]
    said.append("TASK_FEATURE_LENGTHS={'inputs': 512, 'targets': 8}")
    defaults = table.COMMANDS["train"].defaults
    parsed = configuration.parse(own, said, defaults=defaults)
    configuration.check_macros(parsed)
    config.parse(parsed)
    settings = config.configurable("Settings")()
    (member,) = member_specs.specs(settings)
    found = member_specs.identity(member, {})
    assert RECIPES[name] == {
        "steps": settings.schedule.steps,
        "batch_size": member.batch_size,
        "eval_period": settings.schedule.eval_period,
        "keep_last": settings.schedule.keep_last,
        "dropout": settings.base.config.dropout_rate,
        "dtypes": (settings.base.frozen_dtype, settings.base.activation_dtype),
        "prompt_length": found["prompt_length"],
        "learning_rate": found["learning_rate"],
        "label_loss": settings.objective.label_loss,
    }
    assert found["method"] == "prompt_tuning"
    assert found["prompt_init"] == "class_labels"
    assert found["optimizer"]["multiply_by_parameter_scale"] is False
    assert found["optimizer"]["weight_decay_rate"] == 1e-5
    assert found["optimizer"]["decay_rate"] == 0.8
    assert (settings.objective.z_loss, settings.objective.label_smoothing) == (1e-4, 0)
    assert (settings.schedule.metric, settings.schedule.patience) == (None, 0)


@pytest.mark.parametrize("name", files("prompts"))
def test_prompts(name, tmp_path, reviews, tiny_checkpoint):
    common = [
        "--gin_file=models/tiny.gin",
        "--gin_file=methods/prompt_tuning.gin",
        "--gin.PROMPT_LENGTH=4",
    ]
    common += [f"--gin.{value}" for value in required("prompts", name)]
    if name == "saved.gin":
        first = tmp_path / "first"
        train(first, reviews, tiny_checkpoint, *common)
        common.append(f"--gin.PROMPT_FILE={first / 'prompt.safetensors'}")
    train(
        tmp_path / "run",
        reviews,
        tiny_checkpoint,
        f"--gin_file=prompts/{name}",
        *common,
    )


# Of a family all sizes are the same once they are tiny.
SMALLEST = ("_small.gin", "mini.gin", "tiny.gin")


@pytest.mark.parametrize("name", few("models", SMALLEST))
def test_models(name, tmp_path, reviews, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    text = (CONFIGS / "models" / name).read_text()
    family = {
        "mlp_activations": ("gelu", "linear") if "gelu" in text else ("relu",),
        "logits_via_embedding": "logits_via_embedding = True" in text,
    }
    model = Model(Transformer(T5Config(**TINY, **family)))
    model_file.save_model(folder, jax.jit(model.init)(jax.random.key(0)), {})
    train(
        tmp_path,
        reviews,
        folder,
        f"--gin_file=models/{name}",
        "--gin_file=methods/prompt_tuning.gin",
        "--gin.PROMPT_LENGTH=3",
        "--gin.EVAL_SPLIT=None",
        "--gin.VOCABULARY=mini",
    )


def test_eval_and_infer(tmp_path, reviews, tiny_checkpoint, capsys):
    run = tmp_path / "run"
    methods = ["--gin_file=methods/prompt_tuning.gin", "--gin.PROMPT_LENGTH=3"]
    model = ["--gin_file=models/tiny.gin"]
    model.append(f"--gin.INITIAL_CHECKPOINT_PATH={tiny_checkpoint}")
    train(run, reviews, tiny_checkpoint, *model, *methods)
    prompt = f"--gin.PROMPT_FILE={run / 'prompt.safetensors'}"
    out = tmp_path / "eval"
    code = cli.main(
        [
            "eval",
            *model,
            prompt,
            "--gin_file=tasks/local_file.gin",
            "--gin.MIXTURE_OR_TASK_NAME=configs_reviews",
            f"--gin.TASK_FILES={reviews}",
            "--gin.TEMPLATE={sentence}",
            "--gin.LABEL_NAMES=['good', 'bad']",
            "--gin.TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 4}",
            f"--gin.EVAL_OUTPUT_DIR={out}",
        ]
    )
    assert code == 0
    rows = [json.loads(x) for x in (out / "predictions.jsonl").open()]
    metrics = json.loads((out / "results.json").read_text())["metrics"]
    right = sum(row["answer"] == row["target"] for row in rows)
    assert metrics["accuracy"] == pytest.approx(100 * right / len(rows))
    capsys.readouterr()
    texts = ["a fine film", "what a dull story"]
    assert cli.main(["infer", *model, prompt, *texts]) == 0
    lines = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
    assert [line["input"] for line in lines] == texts
    assert all(line["answer"] in ("good", "bad") for line in lines)
    alone = cli.main(["infer", *model, prompt, texts[1]])
    (row,) = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
    assert alone == 0 and row["answer"] == lines[1]["answer"]


def test_a_tuned_model_says_its_vocabulary(tmp_path, reviews, tiny_checkpoint):
    """So that it is evaluated on files as its base model is."""
    run, out = tmp_path / "run", tmp_path / "eval"
    model = "--gin_file=models/tiny.gin"
    train(run, reviews, tiny_checkpoint, model, "--gin_file=methods/model_tuning.gin")
    code = cli.main(
        [
            "eval",
            model,
            f"--initial_checkpoint_path={run / 'model'}",
            "--gin_file=tasks/local_file.gin",
            "--mixture_or_task_name=configs_reviews",
            f"--task_files={reviews}",
            "--template={sentence}",
            "--label_names=['good', 'bad']",
            "--task_feature_lengths={'inputs': 8, 'targets': 4}",
            "--eval_split=validation",
            f"--eval_output_dir={out}",
        ]
    )
    assert code == 0
    tuned, again = (json.loads((x / "results.json").read_text()) for x in (run, out))
    assert again["metrics"] == pytest.approx(tuned["members"][0]["validation"])


def test_pretrain(tmp_path):
    arrays = tmp_path / "arrays"
    arrays.mkdir()
    rng = np.random.default_rng(0)
    offsets = np.arange(0, 84, 4)
    for suffix in ("", "_validation"):
        np.save(
            arrays / f"text{suffix}.npy", rng.integers(3, 8000, 600).astype(np.uint16)
        )
        np.savez(
            arrays / f"labelled{suffix}.npz",
            inputs=rng.integers(3, 8000, 80).astype(np.uint16),
            input_offsets=offsets,
            targets=rng.integers(3, 8000, 80).astype(np.uint16),
            target_offsets=offsets,
            task=np.zeros(20, np.uint8),
            task_names=np.array(["reviews"]),
        )
    np.savez(
        arrays / "sentences.npz",
        ids=rng.integers(3, 8000, 1040).astype(np.uint16),
        offsets=np.arange(0, 1048, 8),
        vectors=rng.normal(size=(130, 48)).astype(np.float16),
    )
    np.save(arrays / "table.npy", rng.normal(size=(200, 48)).astype(np.float32))
    (arrays / "spiece.model").write_bytes(b"pieces")
    folder = tmp_path / "run"
    arguments = [
        "pretrain",
        "--gin_file=models/tiny.gin",
        f"--gin.MODEL_DIR={folder}",
        f"--gin.ARRAYS_DIR={arrays}",
        "--gin.TASK_WEIGHTS={'reviews': 1.0}",
        "--gin.BATCH_SIZE=8",
        "--gin.INPUTS_LENGTH=32",
        "--gin.TARGETS_LENGTH=16",
        "--gin.SPAN_CORRUPTION_SHARE=0.25",
        "--gin.PREFIX_LM_SHARE=0.25",
        "--gin.DISTILLED_SHARE=0.25",
        "--gin.START_TABLE=True",
    ]
    assert cli.main([*arguments, "--gin.TRAIN_STEPS=2"]) == 0
    assert cli.main([*arguments, "--gin.TRAIN_STEPS=3"]) == 0
    results = json.loads((folder / "results.json").read_text())
    assert results["steps"] == 3
    assert set(results["validation"]) == {
        "span_corruption_accuracy",
        "prefix_lm_accuracy",
        "distilled_accuracy",
        "cosine",
        "labelled_accuracy",
    }
    specs = model_file.open_checkpoint(folder / "model").specs
    assert {str(spec.dtype) for spec in specs.values()} == {"bfloat16"}
    # The map to the teacher's vectors is no part of the model; the vocabulary is.
    assert not [name for name in specs if "distillation" in name]
    assert (folder / "model" / "spiece.model").read_bytes() == b"pieces"


def own_files():
    """The files of our own command line; those in t5x/ are for T5X's."""
    return [path for path in CONFIGS.rglob("*.gin") if path.parent.name != "t5x"]


def test_files_may_come_in_any_order_and_define_each_macro_once():
    owner = {}
    for path in own_files():
        kind = path.parent.name
        for macro in re.findall(r"^([A-Z_]+) =", path.read_text(), re.MULTILINE):
            owner.setdefault(macro, set()).add(kind)
    # Kinds of one rank have no macro in common; which of two wins is told by the ranks.
    ranked = {"runs", "methods", "recipes"}
    shared = {macro: kinds - ranked for macro, kinds in owner.items()}
    assert not {macro for macro, kinds in shared.items() if len(kinds) > 1}


def test_no_file_includes_another():
    for path in own_files():
        assert not re.search(r"^include|^import", path.read_text(), re.MULTILINE)


def test_the_demo_has_the_sizes_of_the_embedded_model():
    config.parse(configuration.parse(["models/t5_1_1_mini.gin"], []))
    assert config.configurable("T5Config")() == demo.CONFIG


@pytest.mark.parametrize(
    "name", sorted(path.name for path in base_models.ASSETS.iterdir())
)
def test_every_embedded_model_has_its_sizes_vocabulary_and_card(name):
    # One with LM adaptation has the file of the one without.
    file = f"models/{name.replace('_lm_', '_')}.gin"
    config.parse(configuration.parse([file], []))
    sizes = config.configurable("T5Config")()
    source = base_models.open_checkpoint(f"embedded:{name}")
    assert (
        dataclasses.replace(formats.architecture(source), unroll=sizes.unroll) == sizes
    )
    assert formats.needed_vocabulary(source.path).name == "mini"
    card = (base_models.ASSETS / name / "README.md").read_text("utf-8")
    assert card.startswith(f"# {name}\n") and "## Commands" in card
