# SPDX-License-Identifier: Apache-2.0
"""An exported model runs without the package and gives the package's numbers."""

import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from prompt_tuning import cli, decoding, trees
from prompt_tuning.checkpoints import base_models, prompt_file
from prompt_tuning.errors import UserError
from prompt_tuning.inference import export
from prompt_tuning.methods import initializers
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import Transformer

ROOT = pathlib.Path(__file__).parents[2]
SHAPES = export.Shapes(
    encoder_length=24, label_length=3, max_decode_len=5, prompt_rows=7
)


@pytest.fixture(scope="module")
def exported(tiny_config, tiny_model, tiny_params):
    """The programs for the tiny model, as read from their bytes."""
    made = export.programs(tiny_config, trees.flatten(tiny_params), SHAPES)
    return {
        name: jax.export.deserialize(program.serialize())
        for name, program in made.items()
    }


@pytest.fixture(scope="module")
def prompted(tiny_config, tiny_params):
    """The same model in the package, with its prompts beside, and tokens naming them."""
    prompts = jax.random.normal(jax.random.key(3), (7, tiny_config.emb_dim))
    params = trees.merge(tiny_params, {"prompts": {"p": prompts}})
    model = Model(Transformer(tiny_config, (Prompt("p", 7),)))
    tokens = jax.random.randint(jax.random.key(4), (5, 24), 2, 256 + 7)
    tokens = tokens.at[2, 15:].set(0)
    return model, params, prompts, np.asarray(tokens)


@pytest.mark.parametrize("rows", [1, 5])
def test_ranks_as_the_package_does(exported, prompted, tiny_params, rows):
    model, params, prompts, tokens = prompted
    labels = np.array([[5, 1, 0], [9, 8, 1]], np.int32)
    flat = trees.flatten(tiny_params)
    scores = exported["rank"].call(flat, prompts, tokens[:rows], labels)
    expected = model.rank(params, tokens[:rows], labels)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert np.ptp(scores) > 0.1


def test_decodes_as_the_package_does(exported, prompted, tiny_params):
    model, params, prompts, tokens = prompted
    flat = trees.flatten(tiny_params)
    answers = exported["decode"].call(flat, prompts, tokens)
    expected, _ = model.predict(params, tokens, decoding.Greedy(5))
    np.testing.assert_array_equal(answers, expected[:, -1])
    assert len({tuple(row) for row in np.asarray(answers).tolist()}) > 1


def test_the_prompts_are_inputs(exported, prompted, tiny_params):
    _, _, prompts, tokens = prompted
    labels = np.array([[5, 1, 0]], np.int32)
    flat = trees.flatten(tiny_params)
    scores = [
        exported["rank"].call(flat, rows, tokens, labels)
        for rows in (prompts, -prompts)
    ]
    assert np.abs(scores[0] - scores[1]).max() > 0.01


def test_the_example_of_the_page_runs_without_the_package(tmp_path):
    """The code in docs/export.md, in a process that cannot import this package."""
    from prompt_tuning.commands import demo
    from prompt_tuning.data.label_sets import label_tokens
    from prompt_tuning.tasks import features

    source = base_models.load(demo.CONFIG, demo.CHECKPOINT)
    array = initializers.random_uniform()(jax.random.key(0), (20, 192))
    prompt_file.save_prompt(tmp_path / "prompt.safetensors", np.asarray(array), {})
    arguments = [
        "export",
        "--gin_file=models/t5_1_1_mini.gin",
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 4}",
        "--gin.PROMPT_LENGTH=20",
        f"--gin.OUTPUT_DIR={tmp_path / 'export'}",
    ]
    assert cli.main(arguments) == 0
    page = (ROOT / "docs" / "export.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    forbidden = ("prompt_tuning", "flax.linen", "tensorflow", "seqio")
    script = tmp_path / "example.py"
    script.write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({forbidden}))\n" + code
    )
    text, labels = "a fine film", ["good", "bad"]
    done = subprocess.run(
        [sys.executable, script, tmp_path / "export", tmp_path / "prompt.safetensors"]
        + [text, *labels],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)

    vocabulary = features.vocabulary("mini")
    ids = [*range(8192, 8212), *vocabulary.encode(text), 1]
    tokens = np.pad(np.array(ids, np.int32), (0, 36 - len(ids)))[None]
    model = Model(Transformer(source.config, (Prompt("p", 20),)))
    params = trees.merge(source.params, {"prompts": {"p": array}})
    expected = model.rank(params, tokens, label_tokens(labels, vocabulary))[0]
    np.testing.assert_allclose([found[label] for label in labels], expected, rtol=1e-5)


def test_the_note_says_what_prompts_must_fit(tmp_path, tiny_config, tiny_params):
    export.write(
        tmp_path / "out",
        tiny_config,
        tiny_params,
        SHAPES,
        platforms=("cpu",),
        metadata={"base_model": {"name": "tiny"}},
    )
    note = json.loads((tmp_path / "out" / "export.json").read_text())
    assert note["encoder_length"] == 24 and note["vocab_size"] == 256
    assert note["platforms"] == ["cpu"] and note["base_model"] == {"name": "tiny"}


def test_refuses_what_it_cannot_write(tmp_path, tiny_config, tiny_params):
    with pytest.raises(UserError, match="PLATFORMS=.*cpu, cuda, tpu"):
        export.write(
            tmp_path / "out", tiny_config, tiny_params, SHAPES, platforms=["metal"]
        )
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="exists already"):
        export.write(tmp_path, tiny_config, tiny_params, SHAPES)
    with pytest.raises(UserError, match="label_length=0"):
        export.Shapes(8, 0, 4, 10)


def test_lengths_must_be_given(capsys):
    arguments = ["export", "--gin_file=models/t5_1_1_mini.gin"]
    arguments += ["--gin.OUTPUT_DIR=never", "--gin.TASK_FEATURE_LENGTHS={'inputs': 8}"]
    arguments += ["--gin.PROMPT_LENGTH=4"]
    assert cli.main(arguments) == 2
    assert "must give 'inputs' and 'targets'" in capsys.readouterr().err
