# SPDX-License-Identifier: Apache-2.0
"""Commands killed at random moments: whether what they end with is what it would be.

    python benchmarks/kills.py --kills 20 --output benchmarks/results/kills.json

Each kind of work is done once without a disturbance. Then it is begun again and killed
(SIGKILL) at moments drawn uniformly from the time that it took, from its first file on,
and repeated until it ends; and all of that again, until there were as many kills as
wanted. What the work ends with is compared byte by byte, and nothing else may lie in its
folder. A server has nothing to go on with: every answer that it gave before it was killed
is compared with the engine's, and the folder of its prompts with what it was.

The processes are forked from one that has imported what they need, so that most of their
time is work.
"""

import argparse
import collections
import contextlib
import dataclasses
import http.client
import json
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping

import environment
import jax
import numpy as np

from prompt_tuning import cli
from prompt_tuning.checkpoints import base_models, model_file, prompt_file
from prompt_tuning.data import vocabularies
from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.store import PromptStore
from prompt_tuning.network.model import Model
from prompt_tuning.network.transformer import T5Config, Transformer

# The sizes of models/tiny.gin.
SIZES = T5Config(8192, 16, 2, 1, 1, 8, 32)
PRELOADED = ["prompt_tuning.config", "prompt_tuning.runs.task_data"]
ROWS, CLIENTS, MOST_SECONDS = 12_000, 4, 240
# Of metrics.jsonl, what a clock decides.
PACE = b'"split": "pace"'


@dataclasses.dataclass(frozen=True)
class Work:
    """A command that can be repeated until it ends.

    Attributes:
      words: its words, given the folder that it works in.
      kept: what it ends with, by name, given the folder.
    """

    words: Callable[[pathlib.Path], list[str]]
    kept: Callable[[pathlib.Path], Mapping[str, bytes]]


def child(words: list[str], log: str) -> None:
    """A process of its own."""
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.exit(cli.main(words))


def start(words: list[str], log: pathlib.Path) -> multiprocessing.Process:
    """Starts a command."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=child, args=(words, str(log)))
    process.start()
    return process


def kill(process: multiprocessing.Process) -> bool:
    """Kills a process; whether it was still there."""
    was_there = process.is_alive()
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    # Of a child that is killed at once, its parent may not hear by which signal.
    return was_there and process.exitcode != 0


def inputs(folder: pathlib.Path) -> None:
    """A tiny model, rows with labels, arrays and prompts."""
    rng = np.random.default_rng(0)
    model = Model(Transformer(SIZES))
    model_file.save_model(folder / "model", jax.jit(model.init)(jax.random.key(0)), {})
    pieces = vocabularies.path_of(vocabularies.EMBEDDED)
    shutil.copyfile(pieces, folder / "model" / model_file.VOCABULARY)
    words = ("fine", "dull", "film", "story", "long", "short", "what", "a")
    with open(folder / "rows.tsv", "w") as file:
        file.write("sentence\tlabel\n")
        for number in range(64):
            chosen = " ".join(rng.choice(words, size=4))
            file.write(f"{chosen}\t{('good', 'bad')[number % 2]}\n")
    with open(folder / "rows.jsonl", "w") as file:
        for number in range(ROWS):
            row = {"prompt": "pq"[number % 2], "text": " ".join(rng.choice(words, 6))}
            file.write(json.dumps(row) + "\n")
    (folder / "arrays").mkdir()
    for suffix in ("", "_validation"):
        text = rng.integers(3, 8000, 20_000, np.uint16)
        np.save(folder / "arrays" / f"text{suffix}.npy", text)
    shutil.copyfile(pieces, folder / "arrays" / model_file.VOCABULARY)
    source = base_models.load(SIZES, folder / "model")
    for number, name in enumerate("pq"):
        array = np.random.default_rng(number).normal(scale=3, size=(3, 16))
        card = {"base_model": source.identity, "vocabulary": "mini"}
        prompt_file.save_prompt(
            folder / "prompts" / f"{name}.safetensors",
            array.astype(np.float32),
            {**card, "labels": ["good", "bad"]},
        )


def tuning(given: pathlib.Path, **more: object) -> Callable[[pathlib.Path], list[str]]:
    """The words of ``train``."""
    rows = str(given / "rows.tsv")
    values = {
        "INITIAL_CHECKPOINT_PATH": given / "model",
        "MIXTURE_OR_TASK_NAME": "kills",
        "TASK_FILES": {"train": rows, "validation": rows},
        "TEMPLATE": "{sentence}",
        "LABEL_NAMES": ["good", "bad"],
        "TASK_FEATURE_LENGTHS": {"inputs": 8, "targets": 4},
        "TRAIN_STEPS": 60,
        "EVAL_PERIOD": 10,
        "CHECKPOINT_PERIOD": 5,
        "BATCH_SIZE": 8,
        "PROMPT_LENGTH": 3,
        **more,
    }
    names = ("models/tiny.gin", "methods/prompt_tuning.gin", "tasks/local_file.gin")
    files = [f"--gin_file={name}" for name in names]
    given_values = [f"--gin.{name}={value}" for name, value in values.items()]
    return lambda folder: [
        "train",
        *files,
        *given_values,
        f"--gin.MODEL_DIR={folder / 'run'}",
    ]


def tuned(folder: pathlib.Path) -> Mapping[str, bytes]:
    """Prompts, results and records of a run."""
    run = folder / "run"
    found = {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*.safetensors"))
        if "checkpoints" not in path.parts
    }
    results = json.loads((run / "results.json").read_bytes())
    del results["pace"]
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    return {
        **found,
        "results.json": json.dumps(results).encode(),
        "metrics.jsonl": b"\n".join(line for line in lines if PACE not in line),
        "files": "\n".join(sorted(path.name for path in run.iterdir())).encode(),
    }


def pretraining(given: pathlib.Path) -> Work:
    """Pre-training, and the model that it makes."""
    values = {
        "ARRAYS_DIR": given / "arrays",
        "TASK_WEIGHTS": {},
        "SPAN_CORRUPTION_SHARE": 0.5,
        "PREFIX_LM_SHARE": 0.5,
        "TRAIN_STEPS": 60,
        "EVAL_PERIOD": 20,
        "CHECKPOINT_PERIOD": 5,
        "BATCH_SIZE": 8,
        "INPUTS_LENGTH": 32,
        "TARGETS_LENGTH": 16,
    }
    words = ["pretrain", "--gin_file=models/tiny.gin"]
    words += [f"--gin.{name}={value}" for name, value in values.items()]
    return Work(
        lambda folder: [*words, f"--gin.MODEL_DIR={folder / 'run'}"],
        lambda folder: {
            "model": (folder / "run" / "model" / model_file.FILE).read_bytes(),
            "files": "\n".join(
                sorted(p.name for p in (folder / "run").iterdir())
            ).encode(),
        },
    )


def batch_job(given: pathlib.Path) -> Work:
    """A file of rows, answered."""
    words = [
        "infer",
        "--gin_file=models/tiny.gin",
        f"--gin.PROMPTS={given / 'prompts'}",
    ]
    words += [f"--gin.INITIAL_CHECKPOINT_PATH={given / 'model'}"]
    words += [f"--gin.INPUT_FILE={given / 'rows.jsonl'}"]
    return Work(
        lambda folder: [*words, f"--gin.OUTPUT_FILE={folder / 'answers.jsonl'}"],
        lambda folder: {path.name: path.read_bytes() for path in folder.iterdir()},
    )


def finish(work: Work, folder: pathlib.Path, log: pathlib.Path) -> float:
    """Runs to the end; the seconds from the first file on."""
    process = start(work.words(folder), log)
    began = first_file(process, folder)
    process.join(MOST_SECONDS)
    if process.exitcode != 0:
        raise RuntimeError(
            f"it ended with {process.exitcode}: {log.read_text()[-2000:]}"
        )
    return time.monotonic() - began


def first_file(process: multiprocessing.Process, folder: pathlib.Path) -> float:
    """Waits until it has written something, or is at its end; the time of it."""
    before = set(folder.rglob("*"))
    while process.is_alive() and set(folder.rglob("*")) <= before:
        time.sleep(0.005)
    return time.monotonic()


def disturb(
    work: Work, place: pathlib.Path, kills: int, rng: random.Random
) -> dict[str, object]:
    """Kills a kind of work until there were enough kills; see above."""
    log = place / "log"
    (place / "whole").mkdir()
    # The first compiles for the others.
    finish(work, place / "whole", log)
    shutil.rmtree(place / "whole")
    (place / "whole").mkdir()
    seconds = finish(work, place / "whole", log)
    expected = work.kept(place / "whole")
    counts: collections.Counter[str] = collections.Counter()
    number = 0
    while counts["kills"] < kills:
        number += 1
        folder = place / str(number)
        folder.mkdir()
        # Killed from once to five times on its way.
        for _ in range(min(rng.randint(1, 5), kills - counts["kills"])):
            process = start(work.words(folder), log)
            began = first_file(process, folder)
            wait = rng.uniform(0, seconds)
            process.join(max(0.0, began + wait - time.monotonic()))
            counts["kills"] += kill(process)
        finish(work, folder, log)
        found = work.kept(folder)
        counts["ends"] += 1
        if found == expected:
            counts["exact"] += 1
        else:
            different = [k for k in expected if found.get(k) != expected[k]]
            print(number, "differs in", different, [*found], file=sys.stderr)
        shutil.rmtree(folder)
    return {**counts, "seconds_undisturbed": round(seconds, 1)}


def serve(given: pathlib.Path, place: pathlib.Path, kills: int, rng: random.Random):
    """Kills a server that is asked; every answer that came is compared."""
    source = base_models.load(SIZES, given / "model")
    store = PromptStore(source, 64)
    store.load_folder(given / "prompts")
    rows = [
        {"prompt": p, "text": f"a {w} film"} for p in "pq" for w in ("fine", "dull")
    ]
    expected = [row["answer"] for row in Engine(source, store, longest=64).answer(rows)]
    prompts = {p.name: p.read_bytes() for p in (given / "prompts").iterdir()}
    words = ["serve", "--model", str(given / "model"), "--port", "0", "--warm_up", "16"]
    words += ["--prompts", str(given / "prompts")]
    counts: collections.Counter[str] = collections.Counter()

    def ask(port: int, process: multiprocessing.Process) -> None:
        while process.is_alive():
            for row, wanted in zip(rows, expected, strict=True):
                with contextlib.suppress(
                    OSError, http.client.HTTPException, ValueError
                ):
                    one = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                    header = {"Content-Type": "application/json"}
                    one.request("POST", "/v1/predict", json.dumps(row), header)
                    answer = json.loads(one.getresponse().read())
                    counts["right" if answer.get("answer") == wanted else "wrong"] += 1

    def served(log: pathlib.Path, process: multiprocessing.Process, seconds: float):
        """The port of a server, or None if it does not serve within some seconds."""
        until = time.monotonic() + seconds
        while process.is_alive() and time.monotonic() < until:
            time.sleep(0.01)
            if port := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text()):
                return int(port[1])
        return None

    began = time.monotonic()
    log = place / "log"
    log.touch()
    process = start(words, log)
    if served(log, process, MOST_SECONDS) is None:
        raise RuntimeError(f"it does not serve: {log.read_text()[-2000:]}")
    seconds = time.monotonic() - began
    kill(process)
    while counts["kills"] < kills:
        log = place / f"log{counts['kills']}"
        log.touch()
        process = start(words, log)
        # Some are killed before they serve.
        port = served(log, process, rng.uniform(0, 3 * seconds))
        threads = []
        if port is not None:
            threads = [
                threading.Thread(target=ask, args=(port, process))
                for _ in range(CLIENTS)
            ]
            for thread in threads:
                thread.start()
            process.join(rng.uniform(0, 2))
        counts["kills"] += kill(process)
        for thread in threads:
            thread.join()
        same = {
            p.name: p.read_bytes() for p in (given / "prompts").iterdir()
        } == prompts
        counts["prompts_unchanged"] += same
    return {**counts, "seconds_until_it_serves": round(seconds, 1)}


def main() -> None:
    """Measures and writes the results."""
    kinds = ("train", "many_prompts", "pretrain", "batch_job", "server")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=kinds, choices=kinds)
    parser.add_argument("--kills", type=int, default=20, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    results: dict = {"seed": options.seed, "kinds": {}}
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as made:
        # Programs are compiled once for all processes.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(made) / "compiled")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        given = pathlib.Path(made) / "given"
        given.mkdir()
        inputs(given)
        many = {"PROMPTS": "[{'seed': [0, 1], 'learning_rate': [0.1, 0.3]}]"}
        works = {
            "train": Work(tuning(given), tuned),
            "many_prompts": Work(tuning(given, **many), tuned),
            "pretrain": pretraining(given),
            "batch_job": batch_job(given),
        }
        for kind in options.kinds:
            place = pathlib.Path(made) / kind
            place.mkdir()
            if kind == "server":
                found = serve(given, place, options.kills, rng)
            else:
                found = disturb(works[kind], place, options.kills, rng)
            results["kinds"][kind] = found
            print(kind, json.dumps(found), file=sys.stderr, flush=True)
    environment.publish(results, options.output)


if __name__ == "__main__":
    main()
