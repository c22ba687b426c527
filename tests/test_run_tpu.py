# SPDX-License-Identifier: Apache-2.0
"""run_tpu.sh against a `gcloud` on PATH that plays a small cloud.

The stub keeps the states of a queued resource and its TPU VM, records every call, and has
folders for workers: `ssh --command` runs the line with bash in their home, `scp` copies
into and out of them. On a worker, `python3` and `uv` are stand-ins too; what they install
as the package is a short script of each test. No test reaches a network or a real cloud.
"""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time

import numpy as np
import pytest

from prompt_tuning.checkpoints import prompt_file

SCRIPT = pathlib.Path(__file__).parents[1] / "run_tpu.sh"
FLAGS = ["--name", "tuning", "--zone", "us-central1-a"]
# Quotes, blanks and dollars must reach the worker as they were typed.
COMMAND = [
    "train",
    "--gin.MODEL_DIR='runs/two  words'",
    """--gin.TEMPLATE=it's "{sentence}" for $5 \\ `now`""",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 8}",
    "",
]

# bash, for it starts ten times as fast as Python. Its state is one file for each thing.
STUB = r"""#!/bin/bash
shopt -s nullglob
cloud=${0%/*}
printf '%s\x1f' "$@" >>"$cloud/calls" && printf '\x1e' >>"$cloud/calls"
kind=$3 verb=$4
words=() worker='' line='' format='' label=''
for word in "${@:5}"; do
  case $word in
    --worker=*) worker=${word#*=} ;;
    --command=*) line=${word#*=} ;;
    --format=*) format=${word#*=} ;;
    --labels=run_tpu=made) label=made ;;
    --*) ;;
    *) words+=("$word") ;;
  esac
done

get() { echo "$(<"$cloud/$1")"; }
put() { printf '%s\n' "${@:2}" >"$cloud/$1"; }
fail() {
  echo 'Your active configuration is: [stub]' >&2
  echo "ERROR: (gcloud.compute.tpus.$kind.$verb) $1" >&2
  exit "${2-1}"
}
homes() {
  if [[ $worker == all ]]; then echo "$cloud"/worker[0-9]; else echo "$cloud/worker0"; fi
}
wipe() {
  local pid
  for pid in "$cloud"/worker[0-9]/prompt_tuning_run/pid; do
    kill -KILL -- "-$(<"$pid")" 2>/dev/null
  done
  rm -rf "$cloud"/worker[0-9]
}

if [[ " $(get mute) " == *" $verb "* ]]; then
  mute=" $(get mute) "
  put mute "${mute/ $verb / }"
  fail 'UNAVAILABLE: the network is down' 255
fi
case $kind/$verb in
  queued-resources/describe)
    if [[ $format == *failedData* ]]; then echo 'no v5e is left'; exit; fi
    read -r next rest <"$cloud/coming"
    if [[ -n $next ]]; then
      put queued "$next"
      put coming "$rest"
      if [[ $next == ACTIVE && $(get node) == ABSENT ]]; then
        put node READY
        for ((i = 0; i < $(get workers); i++)); do mkdir -p "$cloud/worker$i"; done
      fi
    fi
    [[ $(get queued) != ABSENT ]] || fail "NOT_FOUND: Resource 'tuning' was not found"
    printf '%s\t%s\n' "$(get queued)" "$(get made)" ;;
  tpu-vm/describe)
    [[ $(get node) != ABSENT ]] || fail 'Not Found: no such thing'  # As some write it.
    get node ;;
  queued-resources/create)
    [[ -z $(get refuses) ]] || fail 'RESOURCE_EXHAUSTED: Quota limit exceeded'
    put queued WAITING_FOR_RESOURCES
    put made "$label"
    put coming "$(get after_create)" ;;
  */delete)
    wipe
    put queued ABSENT
    put node ABSENT
    put coming '' ;;
  tpu-vm/scp)
    if [[ ${words[-1]} == tuning:* ]]; then
      for home in $(homes); do
        [[ -d $home/${words[-1]#*:} ]] || fail 'scp: no such folder'
        cp -r "${words[@]:0:${#words[@]}-1}" "$home/${words[-1]#*:}"
      done
    else
      cp "$cloud/worker0/${words[0]#*:}" "${words[-1]}"
      if [[ -n $(get preempt_after_copy) ]]; then
        # The machine is gone at once; that it was preempted is known a little later.
        put preempt_after_copy ''
        put coming 'ACTIVE SUSPENDING SUSPENDED'
        wipe
      fi
    fi ;;
  tpu-vm/ssh)
    for home in $(homes); do
      cd "$home" 2>/dev/null || fail 'ssh: connection refused' 255
      env -i HOME="$home" PATH="$cloud/worker_bin:/usr/local/bin:/usr/bin:/bin" \
        bash -c "$line" || fail '' $?
    done
    if [[ $line == *'--on-worker launch'* && -n $(get runs_end_at_once) ]]; then
      for home in $(homes); do
        until [[ -e $home/prompt_tuning_run/exit_code ]]; do sleep 0.01; done
      done
    fi ;;
  *) fail "unknown command $kind $verb" 2 ;;
esac
"""

# `python3 -m pip install --user uv`, then `uv venv FOLDER` and `uv pip install ... WHAT`.
PYTHON = r"""#!/bin/bash
[[ "$*" == '-m pip install --quiet --user uv' ]] || exit 9
mkdir -p ~/.local/bin
cat >~/.local/bin/uv <<'UV'
#!/bin/bash
set -e
if [[ $1 == venv ]]; then
  mkdir -p "${@: -1}/bin"
  cp "$(dirname "$(command -v python3)")/package" "${@: -1}/bin/python3"
else
  [[ ${@: -1} != ./* ]] || test -e "${@: -1:1}/../pyproject.toml" || \
    test -e ./prompt_tuning_run/src/pyproject.toml
  echo "${@: -1}" >~/installed
fi
UV
chmod +x ~/.local/bin/uv
"""
# The metadata server of a worker, which knows where all of them are.
CURL = r"""#!/bin/bash
url=http://metadata.google.internal/computeMetadata/v1/instance/attributes
[[ "${@: -1}" == "$url/worker-network-endpoints" ]] || exit 6
[[ "$*" == *'Metadata-Flavor: Google'* ]] || exit 22
for ((i = 0; i < $(<"${0%/*}/../workers"); i++)); do
  printf '%sunknown:unknown:10.0.0.%s' "${comma-}" "$i"
  comma=,
done
"""
# What the package does on a worker: notes its arguments, then what a test says.
PACKAGE = """#!/bin/bash
[[ "$1 $2" == '-m prompt_tuning' ]] || exit 9
shift 2
printf '%s\\0' "$@" >~/arguments
echo "$JAX_NUM_PROCESSES" >~/processes
dir='runs/two  words'
{body}
"""
TRAINS = """
echo 'training'
mkdir -p "$dir/checkpoints/5" "$dir/best"
echo tuned >"$dir/prompt.safetensors"
echo {} >"$dir/results.json"
"""
# Trains for ever, unless it finds a checkpoint.
RESUMES = """
if [[ -e $dir/checkpoints/5/state ]]; then
  echo 'resuming from step 5'
  cp "$dir/checkpoints/5/state" "$dir/prompt.safetensors"
  exit
fi
mkdir -p "$dir/checkpoints/5.tmp"
sleep 0.2  # Time to be seen unfinished.
echo 'state at step 5' >"$dir/checkpoints/5.tmp/state"
mv "$dir/checkpoints/5.tmp" "$dir/checkpoints/5"
sleep 60
"""


class Cloud:
    """A folder for PATH with the stub, its state, and what it was asked."""

    def __init__(self, folder: pathlib.Path, body: str = TRAINS, **state):
        self.folder = folder / "cloud"
        self.home = self.folder / "worker0"
        self.work = folder / "work"  # Where the user is.
        self.output = self.work / "runs" / "tuning"
        self.poll = "0.03"
        self.script = folder / "checkout" / SCRIPT.name
        (self.folder / "worker_bin").mkdir(parents=True)
        self.work.mkdir()
        # A checkout with nothing in it, which travels fast.
        for name in ("prompt_tuning", "configs", "tasks"):
            (self.script.parent / name).mkdir(parents=True)
        for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
            (self.script.parent / name).touch()
        shutil.copy(SCRIPT, self.script)
        self._program("gcloud", STUB)
        self._program("worker_bin/python3", PYTHON)
        self._program("worker_bin/curl", CURL)
        self._program("worker_bin/package", PACKAGE.replace("{body}", body))
        start = {
            "queued": "ABSENT",
            "node": "ABSENT",
            "made": "made",
            "coming": "",  # States that the next questions find.
            "after_create": "ACTIVE",
            "refuses": "",
            "mute": "",  # Verbs that fail once.
            "preempt_after_copy": "",
            "runs_end_at_once": "yes",
            "workers": "1",
        }
        assert state.keys() <= start.keys()
        for thing, value in {**start, **state}.items():
            self.put(thing, value)
        if state.get("node") == "READY":
            self.home.mkdir()

    def put(self, thing: str, value: str) -> None:
        (self.folder / thing).write_text(value + "\n")

    def get(self, thing: str) -> str:
        return (self.folder / thing).read_text().strip()

    def _program(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    @property
    def popen_options(self) -> dict:
        path = f"{self.folder}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "RUN_TPU_POLL": self.poll}
        return {"cwd": self.work, "env": environment, "text": True}

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [self.script, *arguments],
            **self.popen_options,
            capture_output=True,
            timeout=240,
            check=False,
        )

    def start(self, *arguments: str) -> subprocess.Popen:
        """In a process group of its own, as from a terminal."""
        return subprocess.Popen(
            [self.script, *arguments],
            **self.popen_options,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            # Tests that run in the background have SIGINT ignored, and bash cannot trap
            # what was ignored when it started.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        )

    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        text = path.read_text() if path.exists() else ""
        return [call.split("\x1f")[:-1] for call in text.split("\x1e")[:-1]]

    def deeds(self) -> list[str]:
        """What was done, in order, without the questions."""
        found = []
        for call in self.calls():
            assert call[:2] == ["compute", "tpus"]
            assert "--zone=us-central1-a" in call
            line = next((w for w in call if w.startswith("--command=")), "")
            worker = re.search(r"--on-worker (\w+)", line)
            deed = worker[1] if worker and not line.startswith("--command=if") else None
            found.append(deed or call[3])
        return [d for d in found if d not in ("describe", "peek", "checkpoints")]

    def arguments(self, worker: int = 0) -> list[str]:
        """What the package was started with."""
        text = (self.folder / f"worker{worker}" / "arguments").read_text()
        return text.split("\0")[:-1]


CHECKPOINT = "runs/two  words/checkpoints/5"
INSTALL = ["ssh", "scp", "scp", "install"]
END = ["launch", "end", "results", "scp", "delete"]


def lines_of(done: subprocess.CompletedProcess) -> list[str]:
    return [x for x in done.stderr.splitlines() if not x.startswith("+ ")]


def test_makes_runs_fetches_and_deletes(tmp_path):
    body = TRAINS + 'cp ~/arguments "$dir/arguments"; cp ~/installed "$dir"'
    cloud = Cloud(tmp_path, body, workers="2")
    done = cloud.run(*FLAGS, "--project", "mine", "--", *COMMAND)
    assert done.returncode == 0, done.stderr
    assert cloud.deeds() == ["create", *INSTALL, *END]
    assert all("--project=mine" in call for call in cloud.calls())
    (create,) = [call for call in cloud.calls() if "create" in call]
    assert {
        "--node-id=tuning",
        "--accelerator-type=v5litepod-8",
        "--runtime-version=v2-alpha-tpuv5-lite",
    } <= set(create)
    for deed in ("install", "launch", "end"):
        (call,) = [c for c in cloud.calls() if f"--on-worker {deed}" in " ".join(c)]
        assert "--worker=all" in call
    assert (cloud.output / "prompt.safetensors").read_text() == "tuned\n"
    assert (cloud.output / "results.json").exists()
    assert (cloud.output / "arguments").read_text().split("\0")[:-1] == COMMAND
    assert (cloud.output / "installed").read_text() == (
        "./prompt_tuning_run/src[tpu,demo]\n"
    )
    left = {path.name for path in cloud.output.iterdir()}
    assert not left & {"checkpoints", "best", "results.tar.gz", "unfinished.tar.gz"}
    assert done.stdout == "training\n"
    assert (cloud.output / "run.log").read_text() == "training\n"
    assert cloud.get("queued") == cloud.get("node") == "ABSENT"
    assert "costs money" not in done.stderr


@pytest.mark.parametrize("workers", [1, 4])
def test_the_workers_are_one_run(tmp_path, workers):
    cloud = Cloud(tmp_path, workers=str(workers))
    # They are left, so that what they were told can be read.
    done = cloud.run(*FLAGS, "--keep", "--", *COMMAND)
    assert done.returncode == 0, done.stderr
    homes = sorted(cloud.folder.glob("worker[0-9]"))
    assert len(homes) == workers
    for home in homes:
        assert (home / "processes").read_text() == f"{workers}\n"


def test_a_dry_run_prints_the_commands_of_a_real_run_and_runs_none(tmp_path):
    cloud = Cloud(tmp_path)
    flags = [*FLAGS, "--spot", "--setup", "echo 'a  b' >~/setup", "--send", "my data"]
    (cloud.work / "my data").mkdir()
    dry = cloud.run("--dry-run", *flags, "--", *COMMAND)
    assert dry.returncode == 0 and dry.stderr == "", dry.stderr
    assert not cloud.calls() and not cloud.output.exists()
    done = cloud.run(*flags, "--", *COMMAND)
    assert done.returncode == 0, done.stderr
    printed = [shlex.split(line) for line in dry.stdout.splitlines()]
    asked = [words[1:] for words in printed if words[0] == "gcloud"]
    assert asked == cloud.calls()
    # What is done here, not in the cloud, is printed by a real run as well.
    local = [line for line in dry.stdout.splitlines() if not line.startswith("gcloud")]
    traced = [line[2:] for line in done.stderr.splitlines() if line.startswith("+ ")]
    assert local == [line for line in traced if not line.startswith("gcloud")]


def test_waits_in_the_queue(tmp_path):
    coming = "WAITING_FOR_RESOURCES WAITING_FOR_RESOURCES PROVISIONING ACTIVE"
    cloud = Cloud(tmp_path, after_create=coming)
    done = cloud.run(*FLAGS, "--give-up-after", "6h", "--", *COMMAND)
    assert done.returncode == 0, done.stderr
    assert cloud.deeds() == ["create", *INSTALL, *END]
    (create,) = [call for call in cloud.calls() if "create" in call]
    assert "--valid-until-duration=6h" in create
    for state in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"):
        assert done.stderr.count(f"resource is {state}") == 1


def test_a_network_that_fails_for_a_moment_ends_nothing(tmp_path):
    cloud = Cloud(tmp_path, RESUMES, runs_end_at_once="")
    process = cloud.start(*FLAGS, "--", *COMMAND)
    wait_for(cloud.home / CHECKPOINT)
    cloud.put("mute", "ssh ssh describe")
    wait_until(lambda: not cloud.get("mute"))
    end_run(cloud, "0")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert cloud.deeds().count("launch") == 1


def test_a_request_that_is_refused(tmp_path):
    cloud = Cloud(tmp_path, refuses="yes")
    done = cloud.run(*FLAGS, "--", *COMMAND)
    assert done.returncode == 1
    assert "Quota limit exceeded" in done.stderr
    assert lines_of(done)[-1] == "run_tpu.sh: gcloud would not ask for tuning"
    assert cloud.deeds() == ["create"]


def test_a_request_that_fails_in_the_queue_says_why_and_leaves_nothing(tmp_path):
    cloud = Cloud(tmp_path, after_create="PROVISIONING FAILED")
    done = cloud.run(*FLAGS, "--", *COMMAND)
    assert done.returncode == 1
    expected = "run_tpu.sh: the request for tuning failed: no v5e is left"
    assert lines_of(done)[-1] == expected
    assert cloud.deeds() == ["create", "delete"]


def test_a_cloud_that_does_not_answer_at_first_ends_it(tmp_path):
    cloud = Cloud(tmp_path, mute="describe")
    done = cloud.run(*FLAGS, "--", *COMMAND)
    assert done.returncode == 1
    assert "does not answer: ERROR" in lines_of(done)[-1]
    assert "the network is down" in lines_of(done)[-1]
    assert cloud.deeds() == []


def test_uses_a_tpu_vm_that_somebody_made_and_leaves_it(tmp_path):
    cloud = Cloud(tmp_path, node="READY")
    done = cloud.run(*FLAGS, "--", *COMMAND)
    assert done.returncode == 0, done.stderr
    assert cloud.deeds() == ["unfetched", *INSTALL, *END[:-1], "fetched"]
    assert cloud.get("node") == "READY"
    assert "costs money" in done.stderr
    assert cloud.arguments() == COMMAND
    (deletion,) = re.findall(r"delete it: +(.*)", done.stderr)
    assert shlex.split(deletion)[3:5] == ["tpu-vm", "delete"]


def test_uses_its_own_tpu_vm_and_deletes_it(tmp_path):
    cloud = Cloud(tmp_path, queued="ACTIVE", node="READY")
    done = cloud.run(*FLAGS, "--", *COMMAND)
    assert done.returncode == 0, done.stderr
    assert cloud.deeds() == ["unfetched", *INSTALL, *END]


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_replaces_only_what_it_made(tmp_path, state):
    cloud = Cloud(tmp_path, queued=state)
    done = cloud.run(*FLAGS, "--", *COMMAND)
    assert done.returncode == 0, done.stderr
    assert cloud.deeds() == ["delete", "create", *INSTALL, *END]
    cloud = Cloud(tmp_path / "foreign", queued=state, made="")
    done = cloud.run(*FLAGS, "--", *COMMAND)
    assert done.returncode == 1
    assert f"tuning is {state} and not made by this script" in done.stderr
    assert cloud.deeds() == []


def test_a_preempted_run_is_resumed_from_its_copy(tmp_path):
    cloud = Cloud(tmp_path, RESUMES, preempt_after_copy="yes", runs_end_at_once="")
    done = cloud.run(*FLAGS, "--spot", "--save-every", "0", "--", *COMMAND)
    assert done.returncode == 0, done.stderr
    deeds = [deed for deed in cloud.deeds() if deed != "save"]
    first = ["create", *INSTALL, "launch", "scp"]
    again = ["delete", "create", *INSTALL, "scp", "restore", *END]
    assert deeds == first + again
    assert "tuning went away; restart 1 of 10" in done.stderr
    assert done.stdout.endswith("resuming from step 5\n")
    assert (cloud.output / "prompt.safetensors").read_text() == "state at step 5\n"
    assert not (cloud.output / "unfinished.tar.gz").exists()
    saves = [call[-1] for call in cloud.calls() if "--on-worker save" in call[-1]]
    assert len(saves) == 1 and saves[0].endswith("'runs/two  words' 5")
    creations = [call for call in cloud.calls() if "create" in call]
    assert creations[0] == creations[1] and "--spot" in creations[0]


@pytest.mark.slow
def test_a_preempted_run_ends_with_the_prompt_of_one_that_was_not(
    tmp_path, tiny_checkpoint, reviews
):
    """The package itself on the worker, stopped at a checkpoint and preempted."""
    options = {
        "MIXTURE_OR_TASK_NAME": "run_tpu_reviews",
        "TASK_FILES": reviews,
        "TEMPLATE": "{sentence}",
        "LABEL_NAMES": ["good", "bad"],
        "TASK_FEATURE_LENGTHS": {"inputs": 8, "targets": 4},
        "PROMPT_LENGTH": 3,
        "BATCH_SIZE": 4,
        "EVAL_BATCH_SIZE": 4,
        "TRAIN_STEPS": 60,
        "EVAL_PERIOD": 20,
        "CHECKPOINT_PERIOD": 20,
        "INITIAL_CHECKPOINT_PATH": tiny_checkpoint,
        "MODEL_DIR": "'runs/two  words'",
    }
    files = ("models/tiny.gin", "methods/prompt_tuning.gin", "tasks/local_file.gin")
    command = ["train", *(f"--gin_file={name}" for name in files)]
    command += [f"--gin.{name}={value}" for name, value in options.items()]
    package = f'{shlex.quote(sys.executable)} -m prompt_tuning "$@"'
    body = f"""
export JAX_PLATFORMS=cpu
if [[ -e $dir ]]; then {package}; exit; fi
{package} &
until ls "$dir"/checkpoints/*0/_CHECKPOINT_METADATA; do sleep 0.01; done 2>/dev/null
kill -STOP $!
wait
"""
    cloud = Cloud(tmp_path, body, preempt_after_copy="yes", runs_end_at_once="")
    cloud.poll = "0.3"
    done = cloud.run(*FLAGS, "--save-every", "0", "--", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert cloud.deeds().count("launch") == 2
    (step,) = re.findall(r"resuming from step (\d+)", done.stdout)
    assert int(step) < 60

    whole = tmp_path / "whole"
    whole.mkdir()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    subprocess.run(
        [sys.executable, "-m", "prompt_tuning", *command],
        cwd=whole,
        env=environment,
        check=True,
        capture_output=True,
    )
    fetched, expected = cloud.output, whole / "runs" / "two  words"
    assert records(fetched) == records(expected)
    prompts = [
        prompt_file.load_prompt(x / prompt_file.FILE)[0] for x in (fetched, expected)
    ]
    np.testing.assert_array_equal(*prompts)


def records(model_dir: pathlib.Path) -> str:
    lines = (model_dir / "metrics.jsonl").read_text().splitlines()
    # How fast the steps were is not the run's business.
    return "\n".join(line for line in lines if '"split": "pace"' not in line)


def test_gives_up_after_so_many_restarts(tmp_path):
    cloud = Cloud(tmp_path, RESUMES, preempt_after_copy="yes", runs_end_at_once="")
    flags = [*FLAGS, "--save-every", "0", "--max-restarts", "0"]
    done = cloud.run(*flags, "--", *COMMAND)
    assert done.returncode == 1
    assert cloud.deeds().count("create") == 1
    assert cloud.get("queued") == "ABSENT"  # Deleted, suspended as it was.
    # The copy is kept, for this command only.
    other = cloud.run(*flags, "--", *COMMAND, "--gin.SEED=1")
    assert other.returncode == 2 and "another command" in other.stderr
    done = cloud.run(*FLAGS, "--", *COMMAND)
    assert done.returncode == 0, done.stderr
    assert (cloud.output / "prompt.safetensors").read_text() == "state at step 5\n"


def wait_until(condition) -> None:
    for _ in range(400):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def wait_for(path: pathlib.Path) -> None:
    wait_until(path.exists)


def end_run(cloud: Cloud, code: str) -> None:
    """Ends the run on the worker, as if the package had ended with a code."""
    run = cloud.home / "prompt_tuning_run"
    (run / "exit_code").write_text(f"{code}\n")
    os.killpg(int((run / "pid").read_text()), signal.SIGKILL)


@pytest.mark.parametrize(("sent", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupted_script_leaves_the_run_and_takes_it_up_again(
    tmp_path, sent, code
):
    cloud = Cloud(tmp_path, RESUMES, runs_end_at_once="")
    process = cloud.start(*FLAGS, "--", *COMMAND)
    wait_for(cloud.home / CHECKPOINT)
    wait_until(lambda: "peek" in str(cloud.calls()))
    os.killpg(process.pid, getattr(signal, sent))
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert "tuning is left in the cloud and costs money" in errors
    pid = int((cloud.home / "prompt_tuning_run" / "pid").read_text())
    os.kill(pid, 0)  # It goes on.

    other = cloud.run(*FLAGS, "--output", "elsewhere", "--", "eval")
    assert other.returncode == 1
    assert "tuning is busy with another run: train" in other.stderr
    os.kill(pid, 0)

    (again,) = re.findall(r"take it up again: +(.*)", errors)
    assert shlex.split(again) == [str(cloud.script), *FLAGS, "--", *COMMAND]
    end_run(cloud, "0")
    done = cloud.run(*shlex.split(again)[1:])
    assert done.returncode == 0, done.stderr
    assert "taking up the run on tuning" in done.stderr
    assert cloud.deeds().count("launch") == cloud.deeds().count("install") == 1
    assert cloud.get("node") == "ABSENT"


def test_interrupted_in_the_queue_it_says_that_the_request_stays(tmp_path):
    cloud = Cloud(tmp_path, after_create="WAITING_FOR_RESOURCES")
    process = cloud.start(*FLAGS, "--", *COMMAND)
    wait_until(lambda: "create" in str(cloud.calls()))
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    (deletion,) = re.findall(r"delete it: +(.*)", errors)
    subprocess.run(["bash", "-c", deletion], **cloud.popen_options, check=True)
    assert cloud.get("queued") == "ABSENT"


def test_keep(tmp_path):
    cloud = Cloud(tmp_path)
    done = cloud.run(*FLAGS, "--keep", "--", *COMMAND)
    assert done.returncode == 0, done.stderr
    assert (cloud.output / "prompt.safetensors").exists()
    assert cloud.get("node") == "READY" and "costs money" in done.stderr
    # What was fetched is not taken up: the next run is a new one.
    again = cloud.run(*FLAGS, "--", *COMMAND)
    assert again.returncode == 0, again.stderr
    assert cloud.deeds().count("launch") == 2
    assert cloud.get("node") == "ABSENT"


@pytest.mark.parametrize("code", [1, 2])
def test_a_run_that_fails(tmp_path, code):
    cloud = Cloud(tmp_path, f"echo 'prompt-tuning: no such task'; exit {code}")
    done = cloud.run(*FLAGS, "--", *COMMAND)
    assert done.returncode == code
    assert "no such task" in done.stdout
    assert f"ended with exit code {code}" in done.stderr
    assert cloud.deeds()[-2:] == ["launch", "delete"]


def test_a_worker_that_fails_alone_is_noticed(tmp_path):
    body = TRAINS + "[[ $HOME == *worker0 ]]"
    cloud = Cloud(tmp_path, body, workers="2")
    done = cloud.run(*FLAGS, "--", *COMMAND)
    assert done.returncode == 1
    assert "results" not in cloud.deeds() and cloud.deeds()[-1] == "delete"


def test_an_installation_that_fails(tmp_path):
    cloud = Cloud(tmp_path)
    done = cloud.run(*FLAGS, "--setup", "exit 7", "--", *COMMAND)
    assert done.returncode == 1
    assert "could not be installed" in done.stderr
    assert "launch" not in cloud.deeds() and cloud.deeds()[-1] == "delete"


def test_results_that_cannot_be_fetched_keep_the_tpu_vm(tmp_path):
    cloud = Cloud(tmp_path, "echo done")  # It leaves no MODEL_DIR.
    done = cloud.run(*FLAGS, "--", *COMMAND)
    assert done.returncode == 1
    assert "could not be fetched" in done.stderr and "costs money" in done.stderr
    assert cloud.get("node") == "READY"


def test_what_is_sent_and_set_up_is_there_before_the_installation(tmp_path):
    body = 'cp -r ~/"my data" ~/setup ~/installed "$(mkdir -p out && echo out)"'
    cloud = Cloud(tmp_path, body)
    (cloud.work / "my data").mkdir()
    (cloud.work / "my data" / "train.tsv").write_text("sentence\tlabel\n")
    requirement = "prompt-tuning[tpu] @ git+https://example.com/it"
    flags = ["--send", "my data", "--install", requirement, "--create-flag=--reserved"]
    flags[4:] = ["--create-flag", "--reserved", "--setup", "ls 'my data' >~/setup"]
    done = cloud.run(*FLAGS, *flags, "--", "eval", "--gin.EVAL_OUTPUT_DIR=out")
    assert done.returncode == 0, done.stderr
    assert (cloud.output / "my data" / "train.tsv").exists()
    assert (cloud.output / "setup").read_text() == "train.tsv\n"
    assert (cloud.output / "installed").read_text() == requirement + "\n"
    assert not (cloud.output / "checkout.tar").exists()
    (create,) = [call for call in cloud.calls() if "create" in call]
    assert "--reserved" in create


def test_a_command_without_a_folder_leaves_its_log(tmp_path):
    cloud = Cloud(tmp_path, "echo '{\"answer\": 1}'")
    done = cloud.run(*FLAGS, "--", "infer", "a text")
    assert done.returncode == 0, done.stderr
    assert done.stdout == '{"answer": 1}\n'
    assert cloud.deeds()[-3:] == ["launch", "end", "delete"]


@pytest.mark.parametrize(
    ("accelerator", "version"),
    [
        ("v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v6e-1", "v2-alpha-tpuv6e"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v4-32", "tpu-ubuntu2204-base"),
    ],
)
def test_the_runtime_goes_with_the_accelerator(tmp_path, accelerator, version):
    cloud = Cloud(tmp_path)
    done = cloud.run("--dry-run", *FLAGS, "--type", accelerator, "--", *COMMAND)
    assert (
        f"--accelerator-type={accelerator} --runtime-version={version}" in done.stdout
    )
    flags = [*FLAGS, "--type", accelerator, "--version", "v3"]
    done = cloud.run("--dry-run", *flags, "--", *COMMAND)
    assert f"--accelerator-type={accelerator} --runtime-version=v3" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--name is missing"),
        (["--name", "a"], "--zone is missing"),
        (["--name"], "--name needs a value"),
        (["--name", ""], "--name needs a value"),
        (FLAGS, "nothing to run"),
        ([*FLAGS, "--"], "nothing to run"),
        ([*FLAGS, "--worker", "0"], "unknown argument --worker"),
        ([*FLAGS, "train"], "unknown argument train"),
        ([*FLAGS, "--type", "v9-8", "--", *COMMAND], "--type v9-8 is none of v5lite"),
        ([*FLAGS, "--save-every", "1h", "--", *COMMAND], "--save-every 1h is not in"),
        ([*FLAGS, "--max-restarts", "x", "--", *COMMAND], "--max-restarts x is not a"),
        ([*FLAGS, "--send", "gone", "--", *COMMAND], "--send gone is not there"),
        ([*FLAGS, "--output", "a:b", "--", *COMMAND], "another machine"),
        ([*FLAGS, "--", "train"], "train needs --model_dir=FOLDER"),
        ([*FLAGS, "--", "train", "--gin.MODEL_DIR=gs://b/a"], "gs://b/a is no folder"),
        ([*FLAGS, "--", "train", "--gin.MODEL_DIR", "'gs://b'"], "gs://b is no folder"),
        (
            [*FLAGS, "--", "train", "--pack", "--model_dir=gs://b"],
            "gs://b is no folder",
        ),
        ([*FLAGS, "--", "train", "--Model-Dir", "gs://b"], "gs://b is no folder"),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, message):
    cloud = Cloud(tmp_path)
    done = cloud.run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not cloud.calls() and not cloud.output.exists()


def test_help(tmp_path):
    done = Cloud(tmp_path).run("--help")
    assert done.returncode == 0 and not done.stderr
    options = re.search(r"while .*? \*\) fail", SCRIPT.read_text(), re.DOTALL)[0]
    names = re.findall(r"(--[a-z][a-z-]+)", options)
    assert len(names) == 17
    for name in names:
        assert f"  {name} " in done.stdout, name


def test_shellcheck():
    # An environment that is not activated has its programs beside its Python.
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=places)
    if shellcheck is None:
        pytest.skip("shellcheck is not here")
    scripts = [SCRIPT, SCRIPT.parent / ".ci" / "run"]
    done = subprocess.run(
        [shellcheck, *scripts], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
