# SPDX-License-Identifier: Apache-2.0
"""The command `plan`: what it prints, and what is refused."""

import json

import pytest

from prompt_tuning import cli
from prompt_tuning.devices import topologies
from prompt_tuning.errors import UserError
from prompt_tuning.methods.model_tuning import ModelTuning
from prompt_tuning.network.transformer import T5Config
from prompt_tuning.planning import checks
from prompt_tuning.planning.workload import Workload
from prompt_tuning.training import optimizers

XXL = T5Config(32128, 4096, 64, 24, 24, 64, 10240, dtype="bfloat16", remat="full")
LENGTHS = "--gin.TASK_FEATURE_LENGTHS={'inputs': 12, 'targets': 4}"
FILES = ("--gin_file=models/tiny.gin", "--gin_file=methods/prompt_tuning.gin")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No answer of an earlier run is taken, and none is left behind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def xxl(**changes):
    optimizer = optimizers.adafactor(0.3, multiply_by_parameter_scale=False)
    values = {"batch_size": 8, "inputs": 512, "targets": 32, **changes}
    return Workload(config=XXL, optimizer=optimizer, **values)


@pytest.mark.parametrize(
    ("topology", "changes", "says"),
    [
        ("v5e:2x4", {"num_partitions": 3}, "set NUM_PARTITIONS to 2"),
        ("v5e:16x16", {"num_partitions": 128, "batch_size": 2}, "heads 64 over 128"),
        ("v5e:4x4", {"num_partitions": 2, "batch_size": 12}, "BATCH_SIZE to 8 or 16"),
        ("v5e:2x4", {}, "set NUM_PARTITIONS to 2"),
        ("v5e:1x1", {}, "'int8', or take v5e:2x2 with NUM_PARTITIONS=2"),
        ("v5e:1x1", {"method": ModelTuning()}, "; take v5e:2x4 with NUM_PARTITIONS=8"),
        ("v6e:1x1", {"frozen_dtype": "float32"}, "'int8', or take v6e:2x2"),
        ("v5e:2x2", {"num_microbatches": 0}, "NUM_MICROBATCHES=0 must be 1 or more"),
        ("v5e:2x2", {"step": "rank", "num_labels": 0}, "NUM_LABELS=0"),
    ],
)
def test_what_cannot_be_placed_is_refused_before_it_is_compiled(
    topology, changes, says
):
    with pytest.raises(UserError, match=says):
        checks.check(xxl(**changes), topologies.parse(topology))


def test_the_command_prints_and_writes(tmp_path, capsys):
    path = tmp_path / "plan.json"
    arguments = ["plan", *FILES, LENGTHS, "--gin.TOPOLOGY=v5e:2x2"]
    arguments += ["--gin.PROMPT_LENGTH=4", "--gin.COMPILE=False"]
    # The most rows that are tried, so that the search ends at once.
    arguments.append("--gin.BATCH_SIZE=65536")
    assert cli.main([*arguments, f"--gin.OUTPUT_FILE={path}"]) == 0
    shown = capsys.readouterr().out
    assert "v5e:2x2, 4 chips" in shown and "largest batch" in shown
    written = json.loads(path.read_text())
    assert written["encoder_tokens"] == 16 and written["estimate"]["fits"]
    assert written["frozen_dtype"] == "bfloat16" and "compiled" not in written


def test_the_local_devices_are_planned_and_compiled(capsys):
    arguments = ["plan", *FILES, LENGTHS, "--gin.TOPOLOGY=local"]
    arguments += ["--gin.PROMPT_LENGTH=4", "--gin.LARGEST_BATCH=False"]
    assert cli.main([*arguments, "--gin.NUM_PARTITIONS=2"]) == 0
    captured = capsys.readouterr()
    assert "all-reduce" in captured.out and "yes" in captured.out
    assert "compiling batch 32 for local" in captured.err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("--gin.TOPOLOGY=v5e:5x5", "set TOPOLOGY to v5e:"),
        ("--gin.NUM_PARTITIONS=4", "heads 2 over 4"),
        ("--gin.BATCH_SIZE=6", "set BATCH_SIZE to 4 or 8"),
        ("--gin.REMAT=some", "REMAT='some'"),
        ("--gin.FROZEN_DTYPE=int3", "int3"),
        ("--gin.STEP=eval", "STEP='eval' is not one of 'train', 'rank', 'decode'"),
    ],
)
def test_mistakes_are_one_line(change, says, capsys):
    arguments = ["plan", *FILES, LENGTHS, "--gin.COMPILE=False"]
    if "TOPOLOGY" not in change:
        arguments.append("--gin.TOPOLOGY=v5e:2x2")
    assert cli.main([*arguments, change]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and says in lines[0]


@pytest.mark.parametrize("step", ["rank", "decode"])
def test_inference_is_planned(step, tmp_path, capsys):
    path = tmp_path / "plan.json"
    arguments = ["plan", *FILES, LENGTHS, "--gin.TOPOLOGY=local", f"--gin.STEP={step}"]
    arguments += ["--gin.PROMPT_LENGTH=4", "--gin.LARGEST_BATCH=False"]
    # A batch that microbatches of training would not divide.
    arguments += ["--gin.BATCH_SIZE=8", "--gin.NUM_MICROBATCHES=3"]
    assert cli.main([*arguments, f"--gin.OUTPUT_FILE={path}"]) == 0
    assert capsys.readouterr().out.startswith(f"{step} on local")
    written = json.loads(path.read_text())
    assert written["step"] == step and written["compiled"]["fits"]
    assert written["compiled"]["weights"] == written["estimate"]["weights"]


def test_train_refuses_what_cannot_fit_before_it_loads_a_model(
    reviews, tmp_path, capsys
):
    """A model of more layers than any machine holds; there is no checkpoint to open."""
    arguments = ["train", *FILES, "--gin_file=tasks/local_file.gin"]
    values = {
        "T5Config.num_encoder_layers": 10**9,
        "INITIAL_CHECKPOINT_PATH": tmp_path / "nowhere",
        "MODEL_DIR": tmp_path / "run",
        "MIXTURE_OR_TASK_NAME": "plan_reviews",
        "TASK_FILES": reviews,
        "TEMPLATE": "{sentence}",
        "LABEL_NAMES": ["good", "bad"],
        "TASK_FEATURE_LENGTHS": {"inputs": 8, "targets": 4},
        "BATCH_SIZE": 8,
    }
    arguments += [f"--gin.{name}={value}" for name, value in values.items()]
    assert cli.main(arguments) == 2
    assert "the model cannot fit this machine" in capsys.readouterr().err
