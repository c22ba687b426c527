# SPDX-License-Identifier: Apache-2.0
"""``plan``: whether a step fits chips that are not there, and what it costs."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import optax

from prompt_tuning import dtypes, files, report
from prompt_tuning.checkpoints import base_models, loading
from prompt_tuning.devices import topologies
from prompt_tuning.devices.topologies import GIB, Topology
from prompt_tuning.errors import UserError
from prompt_tuning.methods import registry
from prompt_tuning.methods.method import Method
from prompt_tuning.network.losses import LABEL_LOSSES
from prompt_tuning.network.transformer import T5Config
from prompt_tuning.planning import checks, flops, memory_report
from prompt_tuning.planning.checks import with_batch
from prompt_tuning.planning.workload import STEPS, TRAIN, Memory, Workload
from prompt_tuning.types import (
    ActivationDtype,
    BatchSize,
    FeatureLengths,
    PositiveInt,
    PromptLength,
    WeightDtype,
)


def plan(
    *,
    config: T5Config,
    topology: str,
    task_feature_lengths: FeatureLengths,
    batch_size: BatchSize,
    method: Method | str,
    optimizer: optax.GradientTransformation,
    initial_checkpoint_path: str | None = None,
    prompt_length: PromptLength = 100,
    frozen_dtype: WeightDtype = "auto",
    activation_dtype: ActivationDtype = "auto",
    num_partitions: PositiveInt = 1,
    parameter_partitioning_dims: Literal[1, 2] = 1,
    num_microbatches: PositiveInt = 1,
    step: str = TRAIN,
    num_labels: PositiveInt = 2,
    label_loss: str | None = None,
    compile_step: bool = True,
    find_largest: bool = True,
    output_file: str | None = None,
) -> dict[str, Any]:
    """Plans the step that ``train`` would take with the same values, or ``infer``.

    Args:
      config: sizes of the model, and the remat policy.
      topology: a slice such as ``v5e:2x4``, or ``local``.
      task_feature_lengths: text tokens of ``inputs`` and ``targets``.
      batch_size: rows of a batch over all chips.
      method: the method, or its kind for that with the default options.
      optimizer: moves the tuned leaves.
      initial_checkpoint_path: a checkpoint that ``config`` must be the sizes of.
      prompt_length: positions of the prompt; 0 for methods without one.
      frozen_dtype: dtype of frozen weights; 'auto' is bfloat16 for TPUs, 'int8'
        quantises kernels.
      activation_dtype: dtype of the computation, likewise.
      num_partitions: chips that share one copy of the model.
      parameter_partitioning_dims: 2 also cuts parameters over the other chips.
      num_microbatches: parts of a batch whose gradients are added up.
      step: 'train', or one of inference: 'rank' the labels, 'decode' an answer.
      num_labels: labels that are ranked, or that a ``label_loss`` reads.
      label_loss: what training compares labels by, one of `losses.LABEL_LOSSES`; None
        teaches target tokens.
      compile_step: ask the compiler; otherwise the estimate is all there is.
      find_largest: find the largest batch that fits.
      output_file: where to write what is returned, as JSON.

    Returns:
      Bytes by kind, FLOPs, collectives and the largest batch; see docs/plan.md.

    Raises:
      UserError: the step cannot be placed on these chips.
    """
    method = registry.named(method)
    if initial_checkpoint_path is not None:
        source = base_models.open_checkpoint(initial_checkpoint_path)
        loading.check_sizes(source, config)
    if step not in STEPS:
        raise UserError(f"STEP={step!r} is not one of {', '.join(map(repr, STEPS))}")
    if label_loss is not None and (label_loss not in LABEL_LOSSES or step != TRAIN):
        raise UserError(
            f"LABEL_LOSS={label_loss!r} must be one of {', '.join(LABEL_LOSSES)}, and is "
            "of STEP='train' alone"
        )
    missing = {"inputs", "targets"} - set(task_feature_lengths)
    if missing:
        raise UserError(f"TASK_FEATURE_LENGTHS lacks {' and '.join(sorted(missing))}")
    if topology != topologies.LOCAL:
        # Or JAX would look for a TPU in this machine, and libtpu complain at length.
        jax.config.update("jax_platforms", "cpu")
    place = topologies.parse(topology)
    weights_dtype: str = frozen_dtype
    if step == TRAIN:
        weights_dtype = registry.weights_dtype(method, frozen_dtype)
    else:
        num_microbatches = 1
    if weights_dtype != dtypes.INT8:
        weights_dtype = _dtype(weights_dtype, place)
    work = Workload(
        config=dataclasses.replace(config, dtype=_dtype(activation_dtype, place)),
        batch_size=batch_size,
        inputs=task_feature_lengths["inputs"],
        targets=task_feature_lengths["targets"],
        optimizer=optimizer,
        method=method,
        prompt_length=prompt_length if method.has_prompt else 0,
        frozen_dtype=weights_dtype,
        num_partitions=num_partitions,
        parameter_partitioning_dims=parameter_partitioning_dims,
        num_microbatches=num_microbatches,
        step=step,
        num_labels=num_labels,
        label_loss=label_loss,
    )
    checks.check(work, place)
    results = figures(work, place, compile_step, find_largest)
    if output_file is not None:
        files.write_json(pathlib.Path(output_file), results)
    return results


def figures(
    work: Workload, topology: Topology, compile_step: bool, find_largest: bool
) -> dict[str, Any]:
    """The figures of a step that `checks.check` let pass."""
    chips = topology.num_chips
    estimated = lambda batch: memory_report.estimate(with_batch(work, batch), topology)
    guess = estimated(work.batch_size)
    results: dict[str, Any] = {
        "step": work.step,
        "topology": topology.name,
        "num_chips": chips,
        "usable_bytes": topology.usable_bytes,
        "batch_size": work.batch_size,
        "encoder_tokens": work.inputs + work.prompt_length,
        "decoder_tokens": work.targets,
        "method": work.method.describe(),
        "frozen_dtype": work.frozen_dtype,
        "activation_dtype": work.config.dtype,
        "remat": work.config.remat,
        "num_partitions": work.num_partitions,
        "parameter_partitioning_dims": work.parameter_partitioning_dims,
        "num_microbatches": work.num_microbatches,
        "decoders": work.decoders,
        "estimate": _memory(guess, guess.total <= topology.usable_bytes),
        "flops": flops.count(work),
        "peak_tflops": topology.peak_tflops,
    }
    grain = work.grain(chips)
    if find_largest:
        results["estimate"]["largest_batch"] = memory_report.largest_batch(
            lambda batch: estimated(batch).total <= topology.usable_bytes,
            grain,
            work.batch_size,
        )
    if compile_step:
        answer = _compiled(work, topology)
        results["compiled"] = _memory(answer.memory, answer.fits)
        results["compiled"]["seconds"] = answer.seconds
        results["collectives"] = answer.collectives
    if compile_step and find_largest:
        results["compiled"]["largest_batch"] = memory_report.largest_batch(
            lambda batch: _compiled(with_batch(work, batch), topology).fits,
            grain,
            results["estimate"]["largest_batch"],
        )
    return {**results, "versions": report.versions()}


def table(results: Mapping[str, Any]) -> str:
    """The figures as lines for people."""
    gib = lambda number: f"{number / GIB:9.2f} GiB"
    kinds = [kind for kind in ("compiled", "estimate") if kind in results]
    heading = (
        f"{results['step']} on {results['topology']}, {results['num_chips']} chips; "
        f"batch {results['batch_size']}, encoder {results['encoder_tokens']} and "
        f"decoder {results['decoder_tokens']} tokens; weights "
        f"{results['frozen_dtype']}, remat {results['remat']}, "
        f"{results['num_partitions']} model partitions"
    )
    lines = [heading, f"{'per chip':<16}" + "".join(f"{kind:>13}" for kind in kinds)]
    for name in ("weights", "state", "activations", "total"):
        row = "".join(gib(results[kind][name]) for kind in kinds)
        lines.append(f"{name:<16}{row}")
    lines.append(f"{'usable':<16}{gib(results['usable_bytes']) * len(kinds)}")
    for name, label in (("fits", "fits"), ("largest_batch", "largest batch")):
        if name in results[kinds[-1]]:
            shown = {True: "yes", False: "no"}
            values = [results[kind][name] for kind in kinds]
            if name == "fits":
                values = [shown[value] for value in values]
            lines.append(f"{label:<16}" + "".join(f"{v:>13}" for v in values))
    number = results["flops"]
    lines.append(
        f"FLOPs a step: {number['total']:.4g} (weights {number['weights']:.4g}, "
        f"attention {number['attention']:.4g})"
    )
    if results["peak_tflops"]:
        peak = results["peak_tflops"] * 1e12 * results["num_chips"]
        lines.append(
            f"at the chips' peak of {results['peak_tflops']} TFLOP/s these take "
            f"{1000 * number['total'] / peak:.1f} ms; no step is as fast"
        )
    if results.get("collectives") is not None:
        for kind, item in results["collectives"].items():
            lines.append(
                f"{kind}: {item['count']} a step, {gib(item['bytes']).strip()}"
            )
        if not results["collectives"]:
            lines.append("collectives: none")
    return "\n".join(lines)


def cache_folder() -> pathlib.Path:
    """Where the compiler's answers are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "prompt_tuning" / "plan"


def _dtype(name: str, topology: Topology) -> str:
    if name == "auto" and topology.platform == "tpu":
        return "bfloat16"
    return base_models.resolve_dtype(name)


def _memory(memory: Memory, fits: bool) -> dict[str, Any]:
    return {**dataclasses.asdict(memory), "total": memory.total, "fits": fits}


@functools.lru_cache(maxsize=64)
def _compiled(work: Workload, topology: Topology) -> memory_report.Compiled:
    with report.doing(
        f"compiling batch {work.batch_size} for {topology.name}", after=0
    ):
        return memory_report.compiled(work, topology, cache_folder())
