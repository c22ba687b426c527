# SPDX-License-Identifier: Apache-2.0
"""Loading a model: time and host memory, ours against transformers' own loading.

    python benchmarks/load.py --output benchmarks/results/load.json

Weights are made, in transformers' format, for every size; each load runs in a process
of its own, one after the other, with the files in the page cache. Memory is anonymous
memory (pages of mapped files are the system's to take back): its peak over what the
process had before the load, and that less the model itself. torch and transformers are
needed for the comparison: pip install -e ".[parity]".
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time

SIZES = {
    # The embedded model's.
    "mini": (192, 6, 4, 32, 512),
    "small": (512, 6, 8, 64, 1024),
    "base": (768, 12, 12, 64, 2048),
    "large": (1024, 16, 24, 64, 2816),
    "xl": (2048, 32, 24, 64, 5120),
    "xxl": (4096, 64, 24, 64, 10240),
}
LOADERS = ("prompt_tuning", "transformers")
GIB = 2**30


def t5_config(size: str):
    """T5 1.1 of a size."""
    from prompt_tuning.network.transformer import T5Config

    width, heads, layers, head_dim, mlp = SIZES[size]
    vocab_size = 8192 if size == "mini" else 32128
    return T5Config(vocab_size, width, heads, layers, layers, head_dim, mlp)


def make(size: str, folder: pathlib.Path) -> None:
    """Writes a bfloat16 model of small random numbers."""
    import flax.linen as nn
    import jax
    import numpy as np

    from prompt_tuning import dtypes
    from prompt_tuning.checkpoints import formats, layout
    from prompt_tuning.checkpoints.source import Source
    from prompt_tuning.network.model import Model
    from prompt_tuning.network.transformer import Transformer
    from prompt_tuning.trees import flatten

    dtype = dtypes.FLOATS["bfloat16"]
    abstract = Model(Transformer(t5_config(size))).abstract_params()
    shapes = layout.shapes(flatten(nn.meta.unbox(abstract)))
    block = np.random.default_rng(0).standard_normal(2**20, np.float32) / 50
    specs = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    source = Source(
        "made",
        "memory",
        specs,
        lambda name: np.resize(block, shapes[name]).astype(dtype),
    )
    formats.write_model(folder, source, "huggingface")


class Watch:
    """Samples the anonymous memory of this process."""

    def __enter__(self):
        self._stop = threading.Event()
        self.before = self.peak = anonymous()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.started = time.perf_counter()
        return self

    def _run(self):
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, anonymous())

    def __exit__(self, *exception):
        self.seconds = time.perf_counter() - self.started
        self._stop.set()
        self._thread.join()


def anonymous() -> int:
    """Bytes of anonymous memory."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status does not say RssAnon; run this on Linux")


def load(loader: str, size: str, folder: str) -> dict[str, float]:
    """Loads once, in this process."""
    if loader == "transformers":
        import torch
        import transformers

        with Watch() as watch:
            model = transformers.T5ForConditionalGeneration.from_pretrained(
                folder, dtype=torch.bfloat16
            )
            # A parameter may still be a mapped file: reading all of it settles that.
            for parameter in model.parameters():
                parameter.data.sum()
        size_in_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    else:
        import jax

        from prompt_tuning import trees
        from prompt_tuning.checkpoints import base_models

        config = t5_config(size)
        jax.devices()
        with Watch() as watch:
            model = base_models.load(config, folder, frozen_dtype="bfloat16")
            jax.block_until_ready(model.params)
        size_in_bytes = trees.num_bytes(model.params)
    return {
        "seconds": watch.seconds,
        "model_gib": size_in_bytes / GIB,
        "peak_gib": (watch.peak - watch.before) / GIB,
        "peak_over_model_gib": (watch.peak - watch.before - size_in_bytes) / GIB,
    }


def in_child(*arguments: str) -> dict[str, float]:
    """Runs `load` in a process of its own."""
    command = [sys.executable, __file__, "--child", *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    output = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, check=True, text=True
    ).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["base", "xl"], choices=SIZES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=pathlib.Path, help="for the made models")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(load(*options.child)))
        return
    import environment

    parent = pathlib.Path(tempfile.mkdtemp(dir=options.folder))
    results: dict = {"sizes": {}}
    try:
        for size in options.sizes:
            folder = parent / size
            make(size, folder)
            runs = {loader: [] for loader in LOADERS}
            for _ in range(options.rounds):
                for loader in LOADERS:
                    runs[loader].append(in_child(loader, size, str(folder)))
            best = {
                loader: min(runs[loader], key=lambda run: run["seconds"])
                for loader in LOADERS
            }
            ratio = best["prompt_tuning"]["seconds"] / best["transformers"]["seconds"]
            results["sizes"][size] = {**best, "time_ratio": ratio}
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(parent, ignore_errors=True)
    results["rounds"] = options.rounds
    environment.publish(results, options.output)


if __name__ == "__main__":
    main()
