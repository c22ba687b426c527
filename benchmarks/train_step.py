# SPDX-License-Identifier: Apache-2.0
"""A training step of prompt tuning, ours against PEFT on the same weights and batch.

    python benchmarks/train_step.py --output benchmarks/results/train_step_cpu.json

Each side is a process of its own. They take turns, so that whatever else the machine
does meets both alike, and the one whose turn it is not waits for its next line of input.
Before anything is timed, loss and gradient of the prompt are compared: both sides then
are known to compute the same thing. The optimizer is AdamW on the prompt alone.

Rows of one length are also measured with memory in huge pages, on both sides. A turn is
``--examples``, so that memory is taken again and again as in training.

``--real`` takes Rotten Tomatoes sentences instead of rows of one length: PEFT pads a
batch to its longest sentence, as its users' collators do; ours pads to the next edge
(as training does), or packs the same sentences into rows of ``--row`` tokens. Lengths
are those of the embedded model's vocabulary. This mode alone reads with seqio.

On a GPU that does not hold both models at once, ``--alone`` starts a side anew for each
of its turns. ``--cores 1`` with the ratio of processor time is the figure to trust on a
machine that is never quiet: threads that wait for each other make wall time worth
little there. torch, transformers and peft are needed: pip install -e ".[parity]".
"""

import argparse
import functools
import json
import pathlib
import random
import statistics
import sys
import tempfile
from typing import Any

import load
from sides import HUGE_PAGES, Side
from train_step_sides import LEARNING_RATE, Example

UNSAID = ("output", "python")
# How far apart loss and gradient may lie, as a share of their size.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15}


class Process:
    """A side as the parent sees it; ``alone`` starts it anew for each turn."""

    def __init__(
        self, name: str, folder: pathlib.Path, python: str, huge: bool, alone: bool
    ):
        script = pathlib.Path(__file__).with_name("train_step_sides.py")
        self._start = functools.partial(
            Side,
            [python, str(script), name, str(folder)],
            {
                **(HUGE_PAGES if huge else {}),
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
                "TOKENIZERS_PARALLELISM": "false",
            },
        )
        self._alone = alone
        self._side: Side | None = self._start()
        self.started = self._side.started
        if alone:
            self.stop()

    def turn(self) -> dict[str, Any]:
        """All batches once."""
        if self._side is None:
            self._side = self._start()
        answer = self._side.ask("turn")
        if self._alone:
            self.stop()
        return answer

    def stop(self) -> None:
        """Ends the process."""
        if self._side is not None:
            self._side.stop()
            self._side = None


def compare(
    folder: pathlib.Path, specs: dict[str, dict[str, Any]], options: argparse.Namespace
) -> dict[str, Any]:
    """Figures of all sides at one dtype; `specs` gives each side's name its values."""
    import numpy as np

    for name, spec in specs.items():
        (folder / f"{name}.json").write_text(json.dumps(spec))
    python = {"peft": sys.executable, "prompt_tuning": options.python}
    sides = {
        name: Process(
            name, folder, python[spec["side"]], spec["huge_pages"], options.alone
        )
        for name, spec in specs.items()
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in specs}
    try:
        for _ in range(options.rounds):
            for name, side in sides.items():
                runs[name].append(side.turn())
    finally:
        for side in sides.values():
            side.stop()
    want = np.load(folder / "peft.npy")
    theirs = sides["peft"].started["loss"]
    found: dict[str, Any] = {}
    for name, spec in specs.items():
        got, start = np.load(folder / f"{name}.npy"), sides[name].started
        median = {
            figure: statistics.median(run[figure] for run in runs[name])
            for figure in ("seconds", "cpu_seconds")
        }
        found[name] = {
            "examples_per_second": options.examples / median["seconds"],
            "median_seconds": median["seconds"],
            "median_cpu_seconds": median["cpu_seconds"],
            "seconds": [run["seconds"] for run in runs[name]],
            "cpu_seconds": [run["cpu_seconds"] for run in runs[name]],
            "peak_bytes": max(run["peak_bytes"] for run in runs[name]),
            **start,
        }
        # Packed batches hold other examples, so that theirs is another loss.
        if spec["row"]:
            continue
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        found[name]["gradient_error"] = float(error)
        worst = max(error, abs(start["loss"] / theirs - 1))
        if not worst <= TOLERANCE[spec["dtype"]]:
            raise SystemExit(
                f"{name} and peft differ by {worst:.2g}: not the same step"
            )
    for side in found.values():
        for ratio, figure in (("speed", "seconds"), ("cpu_speed", "cpu_seconds")):
            theirs = found["peft"][f"median_{figure}"]
            side[f"{ratio}_ratio"] = theirs / side[f"median_{figure}"]
    return found


def specs(
    folder: pathlib.Path, dtype: str, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """What each side's process is told."""
    names = ("batch", "config", "cores", "device", "prompt_length", "size", "targets")
    names = (*names, "gradient_checkpointing")
    shared = {name: getattr(options, name) for name in names}
    shared |= {"dtype": dtype, "folder": str(folder / "model"), "row": 0}
    ours = {**shared, "side": "prompt_tuning", "huge_pages": False}
    peft = {**shared, "side": "peft", "huge_pages": False}
    found = {"prompt_tuning": ours, "peft": peft}
    if options.real:
        found["packed"] = {**ours, "row": options.row}
    elif options.device == "cpu":
        found["prompt_tuning_huge_pages"] = {**ours, "huge_pages": True}
        found["peft_huge_pages"] = {**peft, "huge_pages": True}
    return found


def make_weights(size: str, folder: pathlib.Path) -> None:
    """Writes random weights of T5's scales, in bfloat16 and transformers' format."""
    import flax.linen as nn
    import jax
    import numpy as np

    from prompt_tuning import dtypes
    from prompt_tuning.checkpoints import formats, layout
    from prompt_tuning.checkpoints.source import Source
    from prompt_tuning.network.model import Model
    from prompt_tuning.network.transformer import Transformer
    from prompt_tuning.trees import flatten

    config, dtype = load.t5_config(size), dtypes.FLOATS["bfloat16"]
    abstract = Model(Transformer(config)).abstract_params()
    shapes = layout.shapes(flatten(nn.meta.unbox(abstract)))
    # Of a length that no width divides: rows of a tensor are not each other's copies.
    block = np.random.default_rng(0).standard_normal(2**20 + 7, np.float32)

    def read(name: str) -> np.ndarray:
        shape = shapes[name]
        if name.endswith("/scale"):
            return np.ones(shape, dtype)
        scale = 1.0
        if name.endswith("/kernel"):
            scale = shape[0] ** -0.5
        if name.endswith("/query/kernel"):
            scale *= config.head_dim**-0.5
        return (np.resize(block, shape) * scale).astype(dtype)

    struct = {n: jax.ShapeDtypeStruct(shape, dtype) for n, shape in shapes.items()}
    formats.write_model(folder, Source("made", "memory", struct, read), "huggingface")


def made_examples(options: argparse.Namespace) -> list[Example]:
    """Rows of one length."""
    draw = random.Random(0)
    # Those of T5's sentinels, the last ones, stand in no text.
    last = load.t5_config(options.size).vocab_size - 128
    ids = lambda count: [draw.randrange(3, last) for _ in range(count)]
    return [
        {"inputs": ids(options.inputs), "targets": ids(options.targets)}
        for _ in range(options.examples)
    ]


def real_examples(options: argparse.Namespace) -> list[Example]:
    """Rotten Tomatoes sentences in a shuffled order."""
    from prompt_tuning.tasks import features, rotten_tomatoes

    vocabulary = features.vocabulary("mini")
    ids = lambda text: [*vocabulary.encode(text), vocabulary.eos_id]
    texts, labels = rotten_tomatoes.texts_and_labels("train")
    chosen = random.Random(0).sample(range(len(texts)), options.examples)
    return [
        {
            "inputs": ids(texts[i])[: options.inputs],
            "targets": ids(rotten_tomatoes.LABELS[labels[i]])[: options.targets],
        }
        for i in chosen
    ]


def utilisation(options: argparse.Namespace, sides: dict[str, Any]) -> dict[str, float]:
    """Share of the measured matrix rate that each side's step is worth."""
    from prompt_tuning.planning import flops
    from prompt_tuning.planning.workload import Workload
    from prompt_tuning.training import optimizers

    work = Workload(
        config=load.t5_config(options.size),
        batch_size=options.batch,
        inputs=options.inputs,
        targets=options.targets,
        optimizer=optimizers.adamw(LEARNING_RATE),
        prompt_length=options.prompt_length,
    )
    total = flops.count(work)["weights"] * options.examples / options.batch
    rate = max(side["matrix_flops_per_second"] for side in sides.values())
    return {
        "flops_per_turn": total,
        "matrix_flops_per_second": rate,
        **{n: total / side["median_seconds"] / rate for n, side in sides.items()},
    }


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="small", choices=load.SIZES)
    parser.add_argument("--dtypes", nargs="+", default=list(TOLERANCE))
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--inputs", type=int, default=128)
    parser.add_argument("--targets", type=int, default=8)
    parser.add_argument("--prompt_length", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--config", type=json.loads, default={}, help="of our T5Config")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="of PEFT")
    parser.add_argument("--cores", type=int, help="for each side; default: all")
    parser.add_argument("--python", default=sys.executable, help="that runs our side")
    parser.add_argument("--alone", action="store_true", help="one process at a time")
    parser.add_argument("--real", action="store_true", help="Rotten Tomatoes sentences")
    parser.add_argument("--examples", type=int, default=64, help="of a turn")
    parser.add_argument("--row", type=int, default=288, help="tokens of a packed row")
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    examples = (real_examples if options.real else made_examples)(options)
    import environment
    import jax

    # Only the sides' own processes may take the GPU.
    jax.config.update("jax_platforms", "cpu")
    settings = {k: v for k, v in vars(options).items() if k not in UNSAID}
    results: dict[str, Any] = {"settings": settings, "dtypes": {}}
    with tempfile.TemporaryDirectory() as parent:
        folder = pathlib.Path(parent)
        (folder / "examples.json").write_text(json.dumps(examples))
        make_weights(options.size, folder / "model")
        for dtype in options.dtypes:
            sides = compare(folder, specs(folder, dtype, options), options)
            if not options.real:
                sides["utilisation"] = utilisation(options, sides)
            results["dtypes"][dtype] = sides
    environment.publish(results, options.output, ("torch", "transformers", "peft"))


if __name__ == "__main__":
    main()
