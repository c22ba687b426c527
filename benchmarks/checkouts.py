# SPDX-License-Identifier: Apache-2.0
"""Two checkouts of this package against each other: commands, a training step, answers.

    git worktree add ../before COMMIT && make -C ../before install
    python benchmarks/checkouts.py ../before/.venv/bin/python \
        --output benchmarks/results/checkouts.json

Everything is done in turns, so that what else the machine does meets both alike. A figure
is the median over rounds of this checkout's seconds over the other's, by the clock and by
the processor's time. Commands are new processes; step and answers take turns in one process
for each checkout, on the embedded model.
"""

import argparse
import inspect
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

NOW, BEFORE = "now", "before"
LABELS, LENGTH, BATCH, INPUTS = ["negative", "positive"], 20, 32, 64
SENTENCE = "a gorgeous , witty , seductive movie"
CLOCKS = {"clock": time.perf_counter, "processor": time.process_time}
# A worker may take the other's programs from no cache.
ENVIRONMENT = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}


def commands(prompt: str) -> dict[str, list[str]]:
    """What is started anew, as arguments of Python."""
    cli = ["-m", "prompt_tuning"]
    infer = [
        "infer",
        "--gin_file=models/t5_1_1_mini.gin",
        f"--gin.PROMPT_FILE={prompt}",
    ]
    return {
        "import prompt_tuning": ["-c", "import prompt_tuning"],
        "--help": [*cli, "--help"],
        "inspect": [*cli, "inspect", prompt],
        "infer": [*cli, *infer, SENTENCE],
    }


def started(
    python: str,
    words: list[str],
    folder: str,
    environ: Mapping[str, str] = ENVIRONMENT,
) -> dict[str, float]:
    """Seconds of a command from its start to its end."""
    start = time.perf_counter()
    child = subprocess.Popen(
        [python, *words],
        env=environ,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(words)} failed with {python}")
    return {
        "clock": time.perf_counter() - start,
        "processor": usage.ru_utime + usage.ru_stime,
    }


def work(prompt: str) -> None:
    """A worker: compiles both, then does what each line of its input names."""
    from prompt_tuning.checkpoints import base_models
    from prompt_tuning.commands import demo

    base = base_models.load(demo.CONFIG, demo.CHECKPOINT)
    calls = {"step": training(base), "answers": answering(base, prompt)}
    for call in calls.values():
        call()
    print("ready", flush=True)
    for line in sys.stdin:
        begun = {clock: now() for clock, now in CLOCKS.items()}
        calls[line.strip()]()
        found = {clock: now() - begun[clock] for clock, now in CLOCKS.items()}
        print(json.dumps(found), flush=True)


def training(base: Any) -> Callable[[], None]:
    """Three training steps of a prompt."""
    import jax

    from prompt_tuning.methods import registry
    from prompt_tuning.network.model import Model
    from prompt_tuning.network.prompts import Prompt
    from prompt_tuning.network.transformer import Transformer
    from prompt_tuning.training import optimizers
    from prompt_tuning.training.step import TrainState, make_train_step

    model = Model(Transformer(base.config, (Prompt("task", LENGTH),)))
    prompts = {"task": jax.numpy.array(base.table[:LENGTH], "float32")}
    params = {**base.params, "prompts": prompts}
    tuned, frozen = registry.split(params, registry.rules_of("prompt_tuning"))
    # The state of a run is by member since there are methods of other leaves.
    by_member = "assemble" in inspect.signature(make_train_step).parameters
    tx = optimizers.adafactor(0.03, multiply_by_parameter_scale=False)
    state = TrainState.create(
        {"task": tuned} if by_member else tuned, tx, jax.random.key(0)
    )
    vocab_size = base.config.vocab_size
    tokens = np.random.default_rng(0).integers(3, 8000, (BATCH, LENGTH + INPUTS))
    tokens[:, :LENGTH] = np.arange(LENGTH) + vocab_size
    batch = {
        "encoder_input_tokens": tokens.astype(np.int32),
        "decoder_input_tokens": np.ones((BATCH, 4), np.int32),
        "decoder_target_tokens": np.ones((BATCH, 4), np.int32),
    }
    step = jax.jit(make_train_step(model, tx))

    def steps() -> None:
        after = state
        for _ in range(3):
            after, _ = step(after, frozen, batch)
        jax.block_until_ready(after)

    return steps


def answering(base: Any, prompt: str) -> Callable[[], None]:
    """Answers to 64 sentences of many lengths, from text to label."""
    from prompt_tuning.inference.engine import Engine
    from prompt_tuning.inference.store import PromptStore

    store = PromptStore(base, 64)
    store.load(prompt, "task")
    engine = Engine(base, store)
    words = SENTENCE.split()
    texts = [" ".join((words * 8)[: 2 + i % 30]) for i in range(64)]
    rows = [{"prompt": "task", "text": text} for text in texts]
    return lambda: engine.answer(rows)


def write_prompt(path: pathlib.Path) -> None:
    """A prompt for the embedded model that both checkouts read."""
    from prompt_tuning.checkpoints import base_models, prompt_file
    from prompt_tuning.commands import demo

    base = base_models.load(demo.CONFIG, demo.CHECKPOINT)
    array = np.asarray(base.table[100 : 100 + LENGTH], np.float32)
    card = {"base_model": base.identity, "labels": LABELS, "vocabulary": "mini"}
    prompt_file.save_prompt(path, array, card)


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", help="Python of the other checkout's environment")
    parser.add_argument("--rounds", type=int, default=15, help="of step and answers")
    parser.add_argument("--starts", type=int, default=5, help="rounds of the commands")
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    import environment

    # Not resolved: an environment is known by the path that its Python is called by.
    pythons = {BEFORE: os.path.abspath(options.before), NOW: sys.executable}
    times: dict[str, dict[str, list[dict[str, float]]]] = {}

    def note(what: str, name: str, found: dict[str, float]) -> None:
        times.setdefault(what, {NOW: [], BEFORE: []})[name].append(found)

    with tempfile.TemporaryDirectory() as folder:
        prompt = pathlib.Path(folder) / "task.safetensors"
        write_prompt(prompt)
        for _ in range(options.starts):
            for what, words in commands(str(prompt)).items():
                for name, python in pythons.items():
                    note(what, name, started(python, words, folder))
        workers = {
            name: subprocess.Popen(
                [python, os.path.abspath(__file__), "--work", prompt],
                env=ENVIRONMENT,
                cwd=folder,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for name, python in pythons.items()
        }
        for name, worker in workers.items():
            if worker.stdout.readline().strip() != "ready":
                raise SystemExit(f"the worker of {pythons[name]} failed")
        for _ in range(options.rounds):
            for what in ("step", "answers"):
                for name, worker in workers.items():
                    print(what, file=worker.stdin, flush=True)
                    note(what, name, json.loads(worker.stdout.readline()))
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    results = {"rounds": options.rounds, "starts": options.starts}
    results |= {what: summary(found) for what, found in times.items()}
    environment.publish(results, options.output)


def summary(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians and the median of the ratios, of both clocks."""
    result = {}
    for clock in CLOCKS:
        now, before = ([each[clock] for each in found[name]] for name in (NOW, BEFORE))
        result[clock] = {
            "ratio": round(statistics.median(np.divide(now, before).tolist()), 3),
            NOW: round(statistics.median(now), 3),
            BEFORE: round(statistics.median(before), 3),
        }
    return result


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2])
    else:
        main()
