# SPDX-License-Identifier: Apache-2.0
"""The two sides of `train_step`: our training step and PEFT's, in a process each.

A process reads what to do from files of the parent, reports loss and gradient of the
prompt, and then takes one turn, all its batches once, for every line of its input.
"""

import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import load

Example = dict[str, list[int]]  # "inputs" and "targets", without padding
LEARNING_RATE = 0.3


class Side(Protocol):
    """One of the two implementations, inside its process."""

    batches: Sequence[Any]
    version: str

    def gradient(self) -> tuple[float, Any]:
        """Loss and gradient of the prompt on the first batch."""
        ...

    def step(self, batch: Any) -> Callable[[], None]:
        """Begins a step; the result waits for it."""
        ...

    def rate(self, size: int) -> Callable[[], None]:
        """A product of two square matrices; the result does it once."""
        ...

    def peak(self) -> int:
        """Most bytes that the device held."""
        ...


def peak_rss() -> int:
    """Most bytes of this process that were in memory at once."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status does not say VmHWM; run this on Linux")


class Ours:
    """This package."""

    def __init__(self, spec: dict[str, Any], examples: list[Example], prompt: Any):
        import dataclasses

        import jax
        import numpy as np

        from prompt_tuning import trees
        from prompt_tuning.checkpoints import base_models
        from prompt_tuning.methods import registry
        from prompt_tuning.network.model import Model
        from prompt_tuning.network.prompts import Prompt
        from prompt_tuning.network.transformer import Transformer
        from prompt_tuning.training import optimizers
        from prompt_tuning.training.step import TrainState, make_train_step

        self.jax, self.np, self.spec = jax, np, spec
        self.version = f"jax {jax.__version__}"
        config = dataclasses.replace(load.t5_config(spec["size"]), **spec["config"])
        source = base_models.load(
            config,
            spec["folder"],
            frozen_dtype=spec["dtype"],
            activation_dtype=spec["dtype"],
        )
        self.first_id = source.config.vocab_size
        network = Transformer(source.config, (Prompt("task", len(prompt)),))
        # The loss that transformers computes.
        self.model = Model(
            network, z_loss=0.0, loss_normalizing_factor="NUM_REAL_TARGET_TOKENS"
        )
        params = trees.merge(source.params, {"prompts": {"task": prompt}})
        rules = registry.rules_of("prompt_tuning")
        tuned, self.frozen = registry.split(params, rules)
        self.tuned = jax.tree.map(jax.numpy.array, tuned)
        tx = optimizers.adamw(LEARNING_RATE)
        self.state = TrainState.create({"task": self.tuned}, tx, jax.random.key(0))
        # A step gives its state away, and the prompt is asked for once more.
        self.tuned = jax.tree.map(jax.numpy.copy, self.tuned)
        self.train_step = jax.jit(make_train_step(self.model, tx), donate_argnums=0)
        self.batches = self._batches(examples)

    def _batches(self, examples: list[Example]) -> list[dict[str, Any]]:
        from prompt_tuning.data import buckets

        rows, targets = self.spec["batch"], self.spec["targets"]
        prompt = list(range(self.first_id, self.first_id + self.spec["prompt_length"]))
        whole = [
            {"inputs": prompt + example["inputs"], "targets": example["targets"]}
            for example in examples
        ]
        groups = [whole[at : at + rows] for at in range(0, len(whole), rows)]
        longest = [max(len(each["inputs"]) for each in group) for group in groups]
        if not self.spec["row"]:
            edges = buckets.edges_for(longest)
            return [
                self._arrays([[each] for each in group], length, targets, rows)
                for group, length in zip(
                    groups, (buckets.fitting(n, edges) for n in longest), strict=True
                )
            ]
        packed: list[list[Example]] = []
        for example in whole:
            used = sum(len(each["inputs"]) for each in packed[-1]) if packed else 1e9
            if used + len(example["inputs"]) > self.spec["row"]:
                packed.append([])
            packed[-1].append(example)
        # As many batches as unpacked, so that a step sees as many examples.
        rows = -(-len(packed) // len(groups))
        targets *= max(map(len, packed))
        return [
            self._arrays(packed[at : at + rows], self.spec["row"], targets, rows)
            for at in range(0, len(packed), rows)
        ]

    def _arrays(
        self, rows: list[list[Example]], length: int, targets: int, count: int
    ) -> dict[str, Any]:
        shapes = {"encoder_input_tokens": length, "encoder_segment_ids": length}
        for name in ("input_tokens", "target_tokens", "segment_ids"):
            shapes[f"decoder_{name}"] = targets
        zeros = lambda width: self.np.zeros((count, width), self.np.int32)
        batch = {name: zeros(width) for name, width in shapes.items()}
        for i, row in enumerate(rows):
            at = {"encoder": 0, "decoder": 0}
            for number, example in enumerate(row, 1):
                fill = {
                    "encoder": {"input_tokens": example["inputs"]},
                    "decoder": {
                        "input_tokens": [0, *example["targets"][:-1]],
                        "target_tokens": example["targets"],
                    },
                }
                for part, features in fill.items():
                    size = max(len(ids) for ids in features.values())
                    here = slice(at[part], at[part] + size)
                    at[part] += size
                    batch[f"{part}_segment_ids"][i, here] = number
                    for name, ids in features.items():
                        batch[f"{part}_{name}"][i, here] = ids
        if not self.spec["row"]:
            del batch["encoder_segment_ids"], batch["decoder_segment_ids"]
        return batch

    def gradient(self) -> tuple[float, Any]:
        from prompt_tuning import trees

        loss = lambda tuned, frozen, batch: self.model.loss(
            trees.merge(tuned, frozen), batch
        )[0]
        value, grads = self.jax.jit(self.jax.value_and_grad(loss))(
            self.tuned, self.frozen, self.batches[0]
        )
        return float(value), self.np.asarray(grads["prompts"]["task"])

    def step(self, batch: dict[str, Any]) -> Callable[[], None]:
        self.state, metrics = self.train_step(self.state, self.frozen, batch)
        return lambda: self.jax.block_until_ready((self.state, metrics))

    def rate(self, size: int) -> Callable[[], None]:
        jnp = self.jax.numpy
        x = jnp.ones((size, size), self.spec["dtype"])
        dot = self.jax.jit(lambda x: jnp.dot(x, x))
        return lambda: self.jax.block_until_ready(dot(x))

    def peak(self) -> int:
        (device, *_) = self.jax.devices()
        if device.platform == "cpu":
            return peak_rss()
        return device.memory_stats()["peak_bytes_in_use"]


class Peft:
    """PEFT's prompt tuning of transformers' T5."""

    def __init__(self, spec: dict[str, Any], examples: list[Example], prompt: Any):
        import peft
        import torch
        import transformers

        self.version = f"peft {peft.__version__}, torch {torch.__version__}"
        self.torch, self.dtype = torch, getattr(torch, spec["dtype"])
        self.device = "cuda" if spec["device"] == "gpu" else "cpu"
        if self.device == "cpu":
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        model = transformers.T5ForConditionalGeneration.from_pretrained(
            spec["folder"], dtype=self.dtype
        ).to(self.device)
        # Keys and values for decoding would be kept for nobody.
        model.config.use_cache = False
        if spec["gradient_checkpointing"]:
            model.gradient_checkpointing_enable()
        # By default there would be a second prompt, which no T5 reads.
        config = peft.PromptTuningConfig(
            task_type="SEQ_2_SEQ_LM",
            num_virtual_tokens=len(prompt),
            num_transformer_submodules=1,
        )
        self.model = peft.get_peft_model(model, config).train()
        (self.weight,) = [p for p in self.model.parameters() if p.requires_grad]
        with torch.no_grad():
            self.weight.copy_(torch.from_numpy(prompt))
        self.optimizer = torch.optim.AdamW(
            [self.weight], lr=LEARNING_RATE, weight_decay=0.0
        )
        rows = spec["batch"]
        self.batches = [
            self._arrays(examples[at : at + rows], spec["targets"])
            for at in range(0, len(examples), rows)
        ]

    def _arrays(self, examples: list[Example], targets: int) -> dict[str, Any]:
        padded = lambda rows, length, value: self.torch.tensor(
            [ids + [value] * (length - len(ids)) for ids in rows]
        )
        inputs = [each["inputs"] for each in examples]
        longest = max(map(len, inputs))
        ones = [[1] * len(ids) for ids in inputs]
        return {
            "input_ids": padded(inputs, longest, 0),
            "attention_mask": padded(ones, longest, 0),
            "labels": padded([each["targets"] for each in examples], targets, -100),
        }

    def _backward(self, batch: dict[str, Any]):
        self.optimizer.zero_grad()
        on_device = {name: ids.to(self.device) for name, ids in batch.items()}
        loss = self.model(**on_device).loss
        loss.backward()
        return loss

    def gradient(self) -> tuple[float, Any]:
        loss = self._backward(self.batches[0])
        return loss.item(), self.weight.grad.float().cpu().numpy()

    def step(self, batch: dict[str, Any]) -> Callable[[], None]:
        self._backward(batch)
        self.optimizer.step()
        return self._wait

    def _wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def rate(self, size: int) -> Callable[[], None]:
        x = self.torch.ones((size, size), dtype=self.dtype, device=self.device)

        def multiply():
            self.torch.matmul(x, x)
            self._wait()

        return multiply

    def peak(self) -> int:
        if self.device == "cuda":
            return self.torch.cuda.max_memory_allocated()
        return peak_rss()


def seconds(action: Callable[[], Any]) -> float:
    """Time that an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def serve(name: str, folder: pathlib.Path) -> None:
    """Answers the parent in lines of JSON."""
    import numpy as np

    spec = json.loads((folder / f"{name}.json").read_text())
    examples = json.loads((folder / "examples.json").read_text())
    if spec["device"] == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    if spec["cores"]:
        # Both libraries start as many threads as they find cores.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec["cores"]])
    prompt = np.random.default_rng(0).normal(
        scale=0.5, size=(spec["prompt_length"], load.t5_config(spec["size"]).emb_dim)
    )
    make: dict[str, Callable[..., Side]] = {"prompt_tuning": Ours, "peft": Peft}
    side = make[spec["side"]](spec, examples, prompt.astype(np.float32))
    loss, gradient = side.gradient()
    np.save(folder / f"{name}.npy", gradient)
    for batch in side.batches:  # compiles every shape
        side.step(batch)()
    size = 2048 if spec["device"] == "cpu" else 8192
    multiply = side.rate(size)
    multiply()
    best = min(seconds(multiply) for _ in range(5))
    answer: dict[str, Any] = {
        "version": side.version,
        "loss": loss,
        "matrix_flops_per_second": 2 * size**3 / best,
        "batches": [list(next(iter(batch.values())).shape) for batch in side.batches],
    }
    print(json.dumps(answer), flush=True)

    def turn() -> None:
        # Steps follow each other as in training: waiting is for the last.
        for batch in side.batches:
            wait = side.step(batch)
        wait()

    for _ in sys.stdin:
        busy = time.process_time()
        answer = {"seconds": seconds(turn), "peak_bytes": side.peak()}
        answer["cpu_seconds"] = time.process_time() - busy
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], pathlib.Path(sys.argv[2]))
