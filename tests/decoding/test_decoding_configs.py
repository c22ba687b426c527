# SPDX-License-Identifier: Apache-2.0
"""The gin files of configs/decoding, from the command line to the answers."""

import json
import pathlib

import jax
import numpy as np
import pytest

from prompt_tuning import cli, config
from prompt_tuning.checkpoints import prompt_file
from prompt_tuning.command_line import configuration
from prompt_tuning.decoding import Beam, Greedy, Sampling

FOLDER = pathlib.Path(__file__).parents[2] / "configs" / "decoding"
STRATEGIES = {
    "greedy.gin": Greedy(9),
    "beam.gin": Beam(9, num_decodes=4, alpha=0.6),
    "sampling.gin": Sampling(9, temperature=1.0),
    "topk.gin": Sampling(9, temperature=1.0, topk=40),
    "topp.gin": Sampling(9, temperature=1.0, topp=0.9),
}


def configured(*arguments):
    """The strategy that gin makes."""
    found = configuration.parse(*arguments)
    config.parse(found)
    strategy = found.value("DECODING").name
    return config.configurable(strategy)(max_decode_len=9, eos_id=1)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.gin")), ids=lambda p: p.name)
def test_a_file_makes_its_strategy(path):
    made, want = configured([f"decoding/{path.name}"], []), STRATEGIES[path.name]
    assert isinstance(made, type(want)) and vars(made) == vars(want)


def test_values_on_the_command_line_win():
    made = configured(["decoding/beam.gin"], ["NUM_DECODES=7", "ALPHA=1.0"])
    assert vars(made) == vars(Beam(9, num_decodes=7, alpha=1.0))
    made = configured(["decoding/topp.gin"], ["TOPP=0.5", "TEMPERATURE=0.7"])
    assert vars(made) == vars(Sampling(9, temperature=0.7, topp=0.5))


@pytest.fixture
def evaluate(tmp_path, reviews, tiny_checkpoint):
    """Runs `eval` and returns its answers and their metrics."""

    def run(task, *arguments):
        out = tmp_path / f"{task}_{len(list(tmp_path.iterdir()))}"
        code = cli.main(
            [
                "eval",
                "--gin_file=models/tiny.gin",
                "--gin_file=tasks/local_file.gin",
                f"--gin.MIXTURE_OR_TASK_NAME={task}",
                f"--gin.TASK_FILES={reviews}",
                "--gin.TEMPLATE={sentence}",
                "--gin.TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 4}",
                f"--gin.INITIAL_CHECKPOINT_PATH={tiny_checkpoint}",
                f"--gin.EVAL_OUTPUT_DIR={out}",
                *arguments,
            ]
        )
        assert code == 0
        rows = [json.loads(line) for line in (out / "predictions.jsonl").open()]
        return [row["answer"] for row in rows]

    return run


def test_a_strategy_searches_among_the_labels(evaluate):
    """A wide beam without length penalty finds what ranking finds; greedy a label."""
    labels = "--gin.LABEL_NAMES=['good', 'bad']"
    ranked = evaluate("decoding_labels", labels)
    beam = evaluate(
        "decoding_labels", labels, "--gin_file=decoding/beam.gin", "--gin.ALPHA=0.0"
    )
    assert beam == ranked
    greedy = evaluate("decoding_labels", labels, "--gin_file=decoding/greedy.gin")
    assert set(greedy) <= {"good", "bad"}


def test_free_text_is_drawn_by_seed(evaluate):
    sampled = ["--gin.LABEL_NAMES=None", "--gin_file=decoding/sampling.gin"]
    first, again = (evaluate("decoding_free", *sampled) for _ in range(2))
    assert first == again
    other = evaluate("decoding_free", *sampled, "--gin.DECODING_SEED=1")
    assert first != other
    assert len(set(first)) > 1


def test_infer_decodes_by_the_file(tmp_path, tiny_checkpoint, capsys):
    path = tmp_path / "prompt.safetensors"
    prompt = np.asarray(jax.random.normal(jax.random.key(0), (3, 16)))
    prompt_file.save_prompt(path, prompt, {"vocabulary": "mini"})
    answers = []
    for seed in (0, 0, 1):
        code = cli.main(
            [
                "infer",
                "--gin_file=models/tiny.gin",
                "--gin_file=decoding/topk.gin",
                f"--gin.INITIAL_CHECKPOINT_PATH={tiny_checkpoint}",
                f"--gin.PROMPT_FILE={path}",
                "--gin.MAX_DECODE_LENGTH=5",
                f"--gin.DECODING_SEED={seed}",
                "--force",
                "a fine film",
            ]
        )
        assert code == 0
        answers.append(json.loads(capsys.readouterr().out)["answer"])
    assert answers[0] == answers[1] != answers[2]
