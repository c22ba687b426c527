# SPDX-License-Identifier: Apache-2.0
"""Draws the pictures of docs/performance.md from what the other benchmarks wrote.

python benchmarks/plots.py
"""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib.figure
from matplotlib.axes import Axes

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PICTURES = ROOT / "docs/images"
SIZES = ("small", "base", "large", "xl", "xxl")
CHIPS = {"v5e": "v5e_1x1", "v6e": "v6e_1x1", "v5p": "v5p_1x1x1"}


def read(name: str) -> dict[str, Any]:
    """A result by its name."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def bars(axes: Axes, groups: Mapping[str, Mapping[str, float]], pattern: str) -> None:
    """Bars beside each other for each group, each with its value written on it."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [at for at, group in enumerate(groups.values()) if name in group]
        values = [group[name] for group in groups.values() if name in group]
        drawn = axes.bar([at + i * width for at in places], values, width, label=name)
        axes.bar_label(drawn, fmt=pattern, fontsize=7)
    middle = 0.4 - width / 2
    axes.set_xticks([at + middle for at in range(len(groups))], list(groups))
    axes.margins(y=0.2)  # room for the legend
    axes.legend(fontsize=7, loc="upper left", ncols=len(names))


def against_peft(left: Axes, right: Axes) -> None:
    """Speed and memory of a training step, PEFT's being 1."""
    speed: dict[str, dict[str, float]] = {}
    memory: dict[str, dict[str, float]] = {}
    for title, name in (("rows of 128", "train_step_cpu"), ("sentences", "train_real")):
        for dtype, sides in read(name)["dtypes"].items():
            peft = sides["peft"]["peak_bytes"]
            shown = {n: sides[n] for n in ("prompt_tuning", "packed") if n in sides}
            group = f"{title}\n{dtype}"
            speed[group] = {n: side["speed_ratio"] for n, side in shown.items()}
            memory[group] = {n: s["peak_bytes"] / peft for n, s in shown.items()}
    for axes, groups, what in (
        (left, speed, "examples per second"),
        (right, memory, "peak memory of the process"),
    ):
        bars(axes, groups, "%.2f")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_title(f"{what}, PEFT = 1", fontsize=9)
        axes.tick_params(labelsize=7)


def padding(left: Axes, right: Axes) -> None:
    """Examples a second by how rows are padded or packed, and what tokens fill."""
    cases = {k: v for k, v in read("packing").items() if isinstance(v, dict)}
    cases = {k: v["train"] for k, v in cases.items() if "train" in v}
    label = lambda way: "packed" if way.startswith("packed") else way
    for axes, figure, what in (
        (left, "times longest", "examples per CPU second, padded to the longest = 1"),
        (right, "tokens_share", "share of positions that tokens fill"),
    ):
        groups = {}
        for case, ways in cases.items():
            # Of two lengths of packed rows the faster one.
            ordered = sorted(ways.items(), key=lambda way: way[1]["times longest"])
            groups[case.replace(", ", "\n")] = {
                name: next(w[figure] for n, w in reversed(ordered) if label(n) == name)
                for name in dict.fromkeys(label(way) for way in ways)
            }
        bars(axes, groups, "%.2f")
        axes.set_title(what, fontsize=9)
        axes.tick_params(labelsize=7)


def largest_batches(left: Axes, right: Axes) -> None:
    """The largest batch that fits one chip, by size, chip and dtype of the weights."""
    for axes, dtype in ((left, "bfloat16"), (right, "int8")):
        for chip, slice_name in CHIPS.items():
            found = {s: read(f"plan/{s}_{slice_name}_{dtype}") for s in SIZES}
            fits = {s: f["batch_size"] for s, f in found.items() if f["num_partitions"]}
            axes.plot(list(fits), list(fits.values()), "o-", label=chip)
        axes.axhline(32, color="black", linewidth=0.8, linestyle=":")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:.0f}")
        axes.set_xticks(range(len(SIZES)), SIZES)
        axes.set_title(f"largest batch on one chip, {dtype} weights", fontsize=9)
        axes.legend(fontsize=7)


def logits(left: Axes, right: Axes) -> None:
    """Memory and time of the loss by how many logits it may hold."""
    for found in read("loss_chunk")["measured"]:
        limits = [row["limit_mib"] for row in found["limits"]]
        name = f"{found['all_logits_mib']:.0f} MiB of logits"
        memory = [row["temporary_mib"] / 1024 for row in found["limits"]]
        left.plot(limits, memory, "o-", label=name)
        times = [row["time_ratio"] for row in found["limits"]]
        right.plot(limits, times, "o-", label=name)
    for axes, what in ((left, "temporaries, GiB"), (right, "time, whole logits = 1")):
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("most logits held at a time, MiB", fontsize=8)
        axes.set_title(what, fontsize=9)
        axes.legend(fontsize=7)


def many_prompts(left: Axes, right: Axes) -> None:
    """What sharing one model costs, and how long a server's clients wait."""
    mixed = read("mixed_inference")["ratio_to_one_prompt"]["processor"]
    ratios = {
        "five prompts tuned\nin one run": read("train_many")["time_ratio"],
        "ensemble of five\nin one pass": read("ensemble")[
            "time_ratio_together_to_apart"
        ]["clock"],
        "1,000 prompts of\none length": 1 / mixed["mixed, one length"],
        "1,000 prompts of\n20 to 100": 1 / mixed["mixed"],
    }
    drawn = left.barh(list(ratios), list(ratios.values()))
    left.bar_label(drawn, fmt="%.2f", fontsize=7)
    left.axvline(1, color="black", linewidth=0.8)
    left.set_title("time, apart or with one prompt = 1", fontsize=9)
    left.tick_params(labelsize=7)
    latency = read("serving")["latency_ms"]
    drawn = right.bar(list(latency), list(latency.values()))
    right.bar_label(drawn, fmt="%.0f", fontsize=7)
    right.set_title("latency of a server with 64 clients, ms", fontsize=9)


PLOTS: dict[str, Callable[[Axes, Axes], None]] = {
    "against_peft": against_peft,
    "padding": padding,
    "largest_batches": largest_batches,
    "logits": logits,
    "many_prompts": many_prompts,
}


def main() -> None:
    """Writes all pictures."""
    PICTURES.mkdir(exist_ok=True)
    for name, draw in PLOTS.items():
        figure = matplotlib.figure.Figure((9, 3.2), layout="constrained", dpi=120)
        draw(*figure.subplots(1, 2))
        figure.savefig(PICTURES / f"{name}.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
