# SPDX-License-Identifier: Apache-2.0
"""`prompt-tuning infer` of one text, with and without programs kept by earlier processes.

    python benchmarks/first_answer.py --output benchmarks/results/first_answer.json

Each is a new process on the embedded model: without a folder for compiled programs, with
an empty one (which it fills), and with the same one filled. They take turns; a ratio is
the median over rounds of a command's seconds over those of the one without a folder, by
the clock and by the processor's time.
"""

import argparse
import os
import pathlib
import statistics
import sys
import tempfile

import checkouts
import environment
import numpy as np

from prompt_tuning.checkpoints import base_models, prompt_file
from prompt_tuning.commands import demo

OFF, EMPTY, FILLED = "without", "empty folder", "filled folder"
KINDS = {"labels": {"labels": checkouts.LABELS}, "free text": {}}


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    base = base_models.load(demo.CONFIG, demo.CHECKPOINT)
    shape = (checkouts.LENGTH, base.config.emb_dim)
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    given = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    shared = {"base_model": base.identity, "vocabulary": "mini"}
    found = {}
    for kind, card in KINDS.items():
        times = {name: [] for name in (OFF, EMPTY, FILLED)}
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory() as scratch:
                prompt = os.path.join(scratch, "prompt.safetensors")
                prompt_file.save_prompt(prompt, array, {**shared, **card})
                kept = given | {"XDG_CACHE_HOME": f"{scratch}/caches"}
                off = kept | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
                words = checkouts.commands(prompt)["infer"]
                for name, environ in ((OFF, off), (EMPTY, kept), (FILLED, kept)):
                    times[name].append(
                        checkouts.started(sys.executable, words, scratch, environ)
                    )
        found[kind] = {
            name: {
                clock: round(
                    statistics.median(
                        own[clock] / without[clock]
                        for own, without in zip(seconds, times[OFF], strict=True)
                    ),
                    3,
                )
                for clock in checkouts.CLOCKS
            }
            for name, seconds in times.items()
            if name != OFF
        } | {"seconds": times}
    environment.publish({"rounds": options.rounds, **found}, options.output)


if __name__ == "__main__":
    main()
