# SPDX-License-Identifier: Apache-2.0
"""Two processes do what one does, and only the first writes.

Run as a program this file is the work of one of the processes.
"""

import functools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from prompt_tuning import cli, files, processes, report, trees
from prompt_tuning.checkpoints import prompt_file
from prompt_tuning.devices import sharding
from prompt_tuning.errors import UserError

SECONDS = 900
# JAX alone takes 100 seconds to miss a process that died, and 300 for one that failed.
PROMPTLY = 40
ROWS = np.arange(16, dtype=np.int32)[:, None]  # a batch whose rows tell their numbers
SLURM = dict.fromkeys(processes.SLURM_STEP, "2")


# What each process does.


def look_around(folder: pathlib.Path) -> dict:
    """What a process sees of arrays, agreements and folders that several share."""
    index = jax.process_index()
    own = {"rows": ROWS[8 * index : 8 * index + 8]}
    seen = {"devices": [jax.local_device_count(), jax.device_count()]}
    for partitions in (1, 2, 8):
        placed = sharding.shard_batch(own, sharding.make_mesh(partitions))["rows"]
        here = [np.asarray(shard.data).ravel() for shard in placed.addressable_shards]
        seen[f"rows here, {partitions}"] = np.unique(here).tolist()
        seen[f"rows, {partitions}"] = processes.whole(placed).ravel().tolist()
    spread = NamedSharding(sharding.make_mesh(8), PartitionSpec("model"))
    cut = jax.make_array_from_callback(ROWS.shape, spread, lambda at: ROWS[at])
    seen["addressable"] = cut.is_fully_addressable
    seen["fingerprint"] = trees.fingerprint({"rows": cut})
    seen["agreed"] = processes.agreed({"from": index, "value": 0.1 + index})
    seen["gathered"] = processes.gather(index).tolist()
    attempts = {
        "odd rows": lambda: sharding.shard_batch(
            {"rows": ROWS[:3]}, sharding.make_mesh()
        ),
        "failure": lambda: processes.in_first(functools.partial(refuse, index)),
        "folder": lambda: files.writable_folder(str(folder / f"own-{index}")),
    }
    for name, attempt in attempts.items():
        with pytest.raises(UserError) as caught:
            attempt()
        seen[name] = str(caught.value)
    return seen


def refuse(index: int) -> None:
    """Fails as a user's mistake in process 0 would."""
    raise UserError(f"process {index} refuses")


def fail_alone(index: int, how: str) -> None:
    """Process 1 fails, as it is asked to, while process 0 waits for it."""
    processes.gather(index)
    if index == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise UserError("mend it") if how == "user" else ValueError("a defect")
    processes.gather(index)


def work(report_folder: str, *commands: str) -> None:
    """Joins, looks around where that is asked for, and runs commands given as JSON."""
    folder = pathlib.Path(report_folder)
    if (folder / "fail").exists():
        how = (folder / "fail").read_text()
        cli.run = lambda words: (
            processes.join(),
            fail_alone(jax.process_index(), how),
        )
        sys.exit(cli.main([]))
    processes.join()
    if (folder / "look").exists():
        path = folder / f"seen-{jax.process_index()}.json"
        path.write_text(json.dumps(look_around(folder)))
    for command in commands:
        if code := cli.main(json.loads(command)):
            sys.exit(code)


# What the tests do with them.


def together(
    count: int, devices: int, folder: pathlib.Path, *commands: list[str]
) -> list[str]:
    """Runs `work` in several processes and gives what each of them printed."""
    texts, codes = ended(count, devices, folder, *commands)
    assert not any(codes), "\n".join([f"exit codes {codes}", *texts])
    return texts


def ended(
    count: int,
    devices: int,
    folder: pathlib.Path,
    *commands: list[str],
    meanwhile: Callable[[list[subprocess.Popen]], None] = lambda running: None,
) -> tuple[list[str], list[int]]:
    """What each process printed, and its exit code.

    ``meanwhile`` is called with the processes until all have ended.
    """
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    base = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "TPU"))}
    base |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        processes.COUNT: str(count),
        processes.ADDRESS: address,
    }
    outputs = [folder / f"output-{i}" for i in range(count)]
    running = []
    for i, path in enumerate(outputs):
        words = [sys.executable, __file__, str(folder), *map(json.dumps, commands)]
        with path.open("wb") as file:
            running.append(
                subprocess.Popen(
                    words,
                    env={**base, processes.INDEX: str(i)},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    end = time.monotonic() + SECONDS
    try:
        while any(process.poll() is None for process in running):
            if time.monotonic() > end:
                break
            if any(process.returncode for process in running):
                # One that fails must not leave the others waiting for it.
                end = min(end, time.monotonic() + PROMPTLY)
            meanwhile(running)
            time.sleep(0.1)
    finally:
        for process in running:
            process.kill()
            process.wait()
    texts = [path.read_text(errors="replace") for path in outputs]
    return texts, [process.returncode for process in running]


@pytest.fixture(scope="module")
def arguments(tiny_checkpoint, reviews):
    """The words of a train or eval command, given its other values."""

    def words(command: str, **values) -> list[str]:
        values = {
            "MIXTURE_OR_TASK_NAME": "multiprocess_reviews",
            "TASK_FILES": reviews,
            "TEMPLATE": "{sentence}",
            "LABEL_NAMES": ["good", "bad"],
            "TASK_FEATURE_LENGTHS": {"inputs": 8, "targets": 4},
            "INITIAL_CHECKPOINT_PATH": str(tiny_checkpoint),
            **values,
        }
        files = ["models/tiny.gin", "tasks/local_file.gin"]
        if command == "train":
            files.append("methods/prompt_tuning.gin")
            values |= {"BATCH_SIZE": 8, "EVAL_BATCH_SIZE": 3, "PROMPT_LENGTH": 3}
            values |= {
                "EVAL_PERIOD": 2,
                "CHECKPOINT_PERIOD": 2,
                "Schedule.log_period": 1,
            }
        return [
            command,
            *(f"--gin_file={name}" for name in files),
            *(f"--gin.{name}={value}" for name, value in values.items()),
        ]

    return words


@pytest.fixture(scope="module")
def pair(tmp_path_factory, arguments):
    """Two processes with four devices each.

    Two steps, two more, an evaluation, and a run that stops early.
    """
    folder = tmp_path_factory.mktemp("pair")
    (folder / "look").touch()
    run = folder / "run"
    texts = together(
        2,
        4,
        folder,
        arguments("train", MODEL_DIR=run, TRAIN_STEPS=2),
        arguments("train", MODEL_DIR=run, TRAIN_STEPS=4),
        evaluation(arguments, run, folder / "eval"),
        patient(arguments, folder / "patient"),
    )
    return folder, texts


@pytest.fixture(scope="module")
def alone(tmp_path_factory, arguments):
    """One process with eight devices: six steps and an evaluation."""
    folder = tmp_path_factory.mktemp("alone")
    run = folder / "run"
    assert cli.main(arguments("train", MODEL_DIR=run, TRAIN_STEPS=6)) == 0
    assert cli.main(evaluation(arguments, run, folder / "eval")) == 0
    assert cli.main(patient(arguments, folder / "patient")) == 0
    return folder


def evaluation(arguments, run, output) -> list[str]:
    return arguments(
        "eval", PROMPT_FILE=run / "prompt.safetensors", EVAL_OUTPUT_DIR=output
    )


def patient(arguments, run) -> list[str]:
    """So low a learning rate that no evaluation is better than the first."""
    return arguments(
        "train",
        MODEL_DIR=run,
        TRAIN_STEPS=20,
        EARLY_STOPPING_PATIENCE=2,
        LEARNING_RATE=1e-9,
    )


def seen(pair) -> list[dict]:
    folder, _ = pair
    return [json.loads((folder / f"seen-{i}.json").read_text()) for i in range(2)]


def prompt(run: pathlib.Path) -> np.ndarray:
    return prompt_file.load_prompt(run / "prompt.safetensors")[0]


def same_records(found: list[dict], expected: list[dict]) -> None:
    """Same splits and steps in the same order, and the same numbers within rounding.

    How fast the steps were is another matter, and how many of them were timed.
    """
    found, expected = (
        [r for r in records if r["split"] != "pace"] for records in (found, expected)
    )
    assert [list(r) for r in found] == [list(r) for r in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name, value in ours.items():
            if name == "step" or isinstance(value, str):
                assert value == theirs[name]
            else:
                np.testing.assert_allclose(value, theirs[name], rtol=1e-5)


def names(folder: pathlib.Path) -> set[str]:
    """A run's files; those inside Orbax's arrays are Orbax's business."""
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    found = {re.sub(r"(/state)/.*", r"\1", name) for name in found}
    return {re.sub(r"(tfevents).*", r"\1", name) for name in found}


@pytest.mark.slow
def test_every_process_holds_its_rows(pair):
    first, second = seen(pair)
    assert first["devices"] == second["devices"] == [4, 8]
    for partitions in (1, 2):
        assert first[f"rows here, {partitions}"] == list(range(8))
        assert second[f"rows here, {partitions}"] == list(range(8, 16))
    # One copy of the model on all devices: every process works on all rows.
    assert first["rows here, 8"] == second["rows here, 8"] == list(range(16))
    for found in (first, second):
        for partitions in (1, 2, 8):
            assert found[f"rows, {partitions}"] == list(range(16))
        assert "6 rows of rows do not divide over 8 devices" in found["odd rows"]


@pytest.mark.slow
def test_the_fingerprint_of_a_model_that_spans_processes(pair):
    for found in seen(pair):
        assert not found["addressable"]
        assert found["fingerprint"] == trees.fingerprint({"rows": ROWS})


@pytest.mark.slow
def test_all_go_by_what_the_first_says(pair):
    for found in seen(pair):
        assert found["agreed"] == {"from": 0, "value": 0.1}
        assert found["gathered"] == [0, 1]
        assert found["failure"] == "process 0 refuses"


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_refused(pair):
    folder, _ = pair
    for found in seen(pair):
        assert "process 1 does not see what process 0 writes" in found["folder"]
        assert "all hosts share" in found["folder"]
    assert not list((folder / "own-0").iterdir())


@pytest.mark.slow
def test_two_processes_train_as_one_does(pair, alone):
    """Also over an interruption after two steps."""
    folder, _ = pair
    expected = [r for r in report.read_metrics(alone / "run") if r["step"] <= 4]
    same_records(report.read_metrics(folder / "run"), expected)
    np.testing.assert_allclose(
        prompt(folder / "run"), prompt(alone / "run"), rtol=1e-5, atol=1e-5
    )


def same_to_rounding(found, expected):
    """Equal, but for the last digits of numbers that follow from scores."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        for pair in zip(found, expected, strict=True):
            same_to_rounding(*pair)
    elif isinstance(expected, float):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    else:
        assert found == expected


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(pair, alone):
    folder, _ = pair
    for name in ("results.json", "predictions.jsonl"):
        texts = [(place / "eval" / name).read_text() for place in (folder, alone)]
        texts[0] = texts[0].replace(str(folder), str(alone))
        split = str.splitlines if name.endswith("l") else lambda text: [text]
        same_to_rounding(*([json.loads(x) for x in split(text)] for text in texts))


@pytest.mark.slow
def test_two_processes_stop_early_as_one_does(pair, alone):
    folder, (first, second) = pair
    assert "stopped at step 6: 2 evaluations without a better metric" in first
    assert "stopped at step" not in second
    results = [
        json.loads((run / "patient" / "results.json").read_text())["members"][0]
        for run in (folder, alone)
    ]
    for found in results:
        assert (found["best_step"], found["last_step"]) == (2, 6)
    same_records(*(report.read_metrics(run / "patient") for run in (folder, alone)))


@pytest.mark.parametrize(
    ("how", "codes"),
    [
        pytest.param("user", [2, 2], id="user-error"),
        pytest.param("defect", [1, 1], id="any-other-error"),
        pytest.param("killed", [1, -signal.SIGKILL], id="killed"),
    ],
)
def test_a_process_that_fails_alone_ends_the_others(tmp_path, how, codes):
    (tmp_path / "fail").write_text(how)
    (first, second), found = ended(2, 1, tmp_path)
    assert found == codes, f"{first}\n{second}"
    if how == "user":
        assert "prompt-tuning: process 1 failed: mend it\n" in first
        assert second.count("prompt-tuning: mend it\n") == 1
        assert "Traceback" not in first + second
    if how == "defect":
        assert "prompt-tuning: process 1 failed: ValueError: a defect\n" in first
        assert "Traceback" in second


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(pair, alone, arguments, tmp_path):
    folder, _ = pair
    shutil.copytree(folder / "run", tmp_path / "run")
    assert cli.main(arguments("train", MODEL_DIR=tmp_path / "run", TRAIN_STEPS=6)) == 0
    same_records(
        report.read_metrics(tmp_path / "run"), report.read_metrics(alone / "run")
    )
    assert names(tmp_path / "run") == names(alone / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "whose", "code"), [(signal.SIGTERM, 1, 143), (signal.SIGINT, 0, 130)]
)
def test_a_signal_to_one_process_saves_all(number, whose, code, arguments, tmp_path):
    """They stop together between two steps, and the run goes on from there."""
    rare = ["--gin.EVAL_PERIOD=9000", "--gin.CHECKPOINT_PERIOD=9000"]
    rare += ["--gin.ALLOW_CHANGES=True"]
    run, sent = tmp_path / "run", []

    def signals(running):
        records = run / "metrics.jsonl"
        if not sent and records.exists() and len(records.read_text().split("\n")) > 5:
            sent.append(number)
            running[whose].send_signal(number)

    words = arguments("train", MODEL_DIR=run, TRAIN_STEPS=9000) + rare
    texts, codes = ended(2, 1, tmp_path, words, meanwhile=signals)
    assert codes == [code, code], texts
    (step,) = set(re.findall(rf"stopped by {number.name} at step (\d+)", texts[0]))
    trained = [r for r in report.read_metrics(run) if r["split"] == "train"]
    assert [str(r["step"]) for r in trained[-1:]] == [step]
    last = int(step) + 2
    for folder in (run, tmp_path / "alone"):
        words = arguments("train", MODEL_DIR=folder, TRAIN_STEPS=last) + rare
        assert cli.main(words) == 0
    found, expected = (
        [r for r in report.read_metrics(folder) if r["split"] == "train"]
        for folder in (run, tmp_path / "alone")
    )
    same_records(found, expected)


@pytest.mark.slow
def test_the_first_process_alone_writes_and_prints(pair):
    folder, (first, second) = pair
    # Each of the two calls has the loop's and that of the hyperparameters.
    assert len(list((folder / "run" / "tensorboard").glob("events*"))) == 4
    assert first.count('"best_step"') == 3 and first.count("resuming from step 2") == 1
    for said in ("best_step", "resuming", "parameters", "wrote", "loss", "metrics"):
        assert said in first and said not in second


@pytest.mark.slow
def test_two_processes_tune_several_prompts_as_one_does(arguments, tmp_path):
    """One of them leaves on the way: no evaluation is better than its first."""
    prompts = [
        {"name": "still", "learning_rate": 1e-9},
        {"name": "moving", "eval_split": None, "prompt_length": 5},
    ]

    def words(run, steps):
        values = {"TRAIN_STEPS": steps, "EARLY_STOPPING_PATIENCE": 1}
        return arguments("train", MODEL_DIR=run, PROMPTS=prompts, **values)

    for name, count, devices in (("two", 2, 2), ("one", 1, 1)):
        run = tmp_path / name / "run"
        together(count, devices, tmp_path / name, words(run, 5), words(run, 7))
    two, one = tmp_path / "two/run", tmp_path / "one/run"
    same_records(report.read_metrics(two), report.read_metrics(one))
    assert names(two) == names(one)
    for each in prompts:
        file = f"prompts/{each['name']}.safetensors"
        np.testing.assert_allclose(
            prompt_file.load_prompt(two / file)[0],
            prompt_file.load_prompt(one / file)[0],
            rtol=1e-5,
            atol=1e-5,
        )
    rows = json.loads((two / "results.json").read_text())["members"]
    assert {row["name"]: row["last_step"] for row in rows} == {"still": 4, "moving": 7}


@pytest.mark.slow
def test_a_model_cut_over_two_processes(arguments, tmp_path):
    def commands(run):
        words = arguments("train", MODEL_DIR=run, TRAIN_STEPS=4)
        if run.parent.name == "cut":
            words.append("--gin.NUM_PARTITIONS=2")
        return words, evaluation(arguments, run, run.parent / "eval")

    for name, count in (("cut", 2), ("whole", 1)):
        together(count, 1, tmp_path / name, *commands(tmp_path / name / "run"))
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    same_records(report.read_metrics(cut / "run"), report.read_metrics(whole / "run"))
    np.testing.assert_allclose(
        prompt(cut / "run"), prompt(whole / "run"), rtol=1e-5, atol=1e-5
    )
    # Also says that the model has the same fingerprint.
    found = (cut / "eval/results.json").read_text().replace(str(cut), str(whole))
    expected = (whole / "eval/results.json").read_text()

    def same(value, other):
        # Sums over two devices round otherwise, and calibration is of such sums.
        floats = isinstance(other, float)
        assert value == (pytest.approx(other, rel=1e-5) if floats else other)

    jax.tree.map(same, json.loads(found), json.loads(expected))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        pytest.param({}, False, id="nothing"),
        pytest.param({processes.COUNT: "2"}, True, id="count"),
        pytest.param({processes.ADDRESS: "host:1"}, True, id="address"),
        pytest.param(SLURM, True, id="slurm-step"),
        pytest.param({**SLURM, processes.COUNT: "1"}, False, id="count-wins"),
        pytest.param({**SLURM, "SLURM_NTASKS": "1"}, False, id="slurm-one-task"),
        pytest.param(
            {**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, False, id="slurm-one-of-more"
        ),
        pytest.param(
            {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
            False,
            id="slurm-batch-script",
        ),
        pytest.param({"TPU_WORKER_HOSTNAMES": "a,b"}, True, id="gke"),
        pytest.param({"TPU_WORKER_HOSTNAMES": "localhost"}, False, id="one-tpu-host"),
        pytest.param({"MEGASCALE_NUM_SLICES": "2"}, True, id="slices"),
    ],
)
def test_who_is_one_of_several(environ, expected):
    assert processes.several(environ) is expected


def test_a_count_that_is_no_number_is_one_line():
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES='two' is not a number"):
        processes.several({processes.COUNT: "two"})


def test_commands_that_work_alone_refuse_company(monkeypatch, capsys):
    monkeypatch.setenv(processes.COUNT, "2")
    assert cli.main(["pretrain"]) == 2
    assert "pretrain runs in one process" in capsys.readouterr().err


def test_an_environment_that_says_too_little_is_one_line():
    environ = {**os.environ, processes.COUNT: "2", "JAX_PLATFORMS": "cpu"}
    environ.pop(processes.ADDRESS, None)
    done = subprocess.run(
        [sys.executable, "-m", "prompt_tuning", "train"],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("prompt-tuning: cannot join the other processes")
    assert done.stderr.count("\n") == 1


if __name__ == "__main__":
    work(*sys.argv[1:])
