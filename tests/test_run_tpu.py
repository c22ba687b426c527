# SPDX-License-Identifier: Apache-2.0
"""run_tpu.sh against a `gcloud` on PATH that only writes down what it is asked."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "run_tpu.sh"
FLAGS = ["--name", "tuning", "--zone", "us-central1-a"]
# Quotes and blanks must reach the worker as they were typed.
COMMAND = ["train", "--gin.MODEL_DIR='/tmp/two words'"]


class Cloud:
    """A folder for PATH whose `gcloud` records its arguments; one verb may fail."""

    def __init__(self, folder: pathlib.Path, failing: str = ""):
        self._calls = folder / "calls.jsonl"
        stub = folder / "gcloud"
        stub.write_text(
            f"#!{sys.executable}\n"
            "import json, sys\n"
            f"with open({str(self._calls)!r}, 'a') as file:\n"
            "    print(json.dumps(sys.argv[1:]), file=file)\n"
            f"sys.exit({failing!r} in sys.argv)\n"
        )
        stub.chmod(0o755)
        self._environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [SCRIPT, *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def calls(self) -> list[list[str]]:
        if not self._calls.exists():
            return []
        return [json.loads(line) for line in self._calls.read_text().splitlines()]


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    return Cloud(tmp_path)


def verbs(calls) -> list[str]:
    """What was done to the TPU VM, in order."""
    assert all(call[:3] == ["compute", "tpus", "tpu-vm"] for call in calls)
    return [call[3] for call in calls]


def test_reuses_a_tpu_vm_and_runs_on_every_worker(cloud):
    done = cloud.run(*FLAGS, "--project", "mine", "--", *COMMAND)
    assert done.returncode == 0, done.stderr
    calls = cloud.calls()
    assert verbs(calls) == ["describe", "ssh", "scp", "ssh", "ssh"]
    for call in calls:
        assert {"--zone=us-central1-a", "--project=mine"} <= set(call)
    assert all("--worker=all" in call for call in calls[1:])
    (last,) = [a for a in calls[-1] if a.startswith("--command=")]
    assert shlex.split(last)[-4:] == ["-m", "prompt_tuning", *COMMAND]


def test_makes_a_missing_tpu_vm(tmp_path):
    cloud = Cloud(tmp_path, failing="describe")
    done = cloud.run(
        *FLAGS, "--type", "v6e-8", "--version", "v2-alpha-tpuv6e", "--", "x"
    )
    assert done.returncode == 0, done.stderr
    assert verbs(cloud.calls())[:2] == ["describe", "create"]
    create = cloud.calls()[1]
    assert {"--accelerator-type=v6e-8", "--version=v2-alpha-tpuv6e"} <= set(create)


def test_a_dry_run_prints_the_commands_and_runs_none(cloud):
    done = cloud.run("--dry-run", *FLAGS, "--", *COMMAND)
    assert done.returncode == 0, done.stderr
    assert not cloud.calls()
    printed = [line for line in done.stderr.splitlines() if line.startswith("+ ")]
    commands = [shlex.split(line)[1:] for line in printed]
    gcloud = [arguments for program, *arguments in commands if program == "gcloud"]
    assert verbs(gcloud) == ["create", "ssh", "scp", "ssh", "ssh"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--name is missing"),
        (["--name", "a"], "--zone is missing"),
        (["--name"], "--name needs a value"),
        (FLAGS, "nothing to run"),
        ([*FLAGS, "--worker", "0"], "unknown argument --worker"),
    ],
)
def test_mistakes_are_one_line(cloud, arguments, message):
    done = cloud.run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not cloud.calls()


def test_help(cloud):
    done = cloud.run("--help")
    assert done.returncode == 0
    assert "--dry-run" in done.stdout


def test_a_failing_step_stops_the_run(tmp_path):
    cloud = Cloud(tmp_path, failing="ssh")
    done = cloud.run(*FLAGS, "--", "train")
    assert done.returncode != 0
    assert verbs(cloud.calls()) == ["describe", "ssh"]


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not here")
def test_shellcheck():
    scripts = [SCRIPT, SCRIPT.parent / ".ci" / "run"]
    done = subprocess.run(
        ["shellcheck", *scripts], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
