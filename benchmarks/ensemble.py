# SPDX-License-Identifier: Apache-2.0
"""Five prompts of the demo's task in one forward against five separate passes.

    python benchmarks/ensemble.py --output benchmarks/results/ensemble.json

Tunes a prompt for each seed with ``prompt-tuning train`` (the commands are printed, and
those whose prompt is in --folder already are left out), then answers the 535 test
sentences with each prompt alone, by one call of the engine for each, and with all five
as an ensemble, by one call. The ways take turns; the figure is the median over rounds
of the ratio of their seconds, on the clock and of the processor. Accuracies are those of the paper's Table 3: the mean over
prompts, the best prompt, and the ensemble's vote.
"""

import argparse
import pathlib
import shlex
import statistics
import time

import environment

from prompt_tuning import cli
from prompt_tuning.checkpoints import base_models, prompt_file
from prompt_tuning.commands import demo, evaluate
from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.store import PromptStore
from prompt_tuning.tasks import rotten_tomatoes


def tune(folder: pathlib.Path, seed: int, steps: int) -> None:
    """Tunes a prompt by the documented command, with the demo's recipe."""
    words = [
        "train",
        "--gin_file=models/t5_1_1_mini.gin",
        "--gin_file=methods/prompt_tuning.gin",
        "--gin_file=prompts/class_labels.gin",
        f"--gin.MODEL_DIR={folder}",
        f"--gin.MIXTURE_OR_TASK_NAME={demo.ROTTEN_TOMATOES.name}",
        f"--gin.MIXTURE_OR_TASK_MODULE={demo.ROTTEN_TOMATOES.module}",
        f"--gin.TASK_FEATURE_LENGTHS={demo.ROTTEN_TOMATOES.lengths}",
        f"--gin.CLASS_LABELS={rotten_tomatoes.LABELS}",
        f"--gin.PROMPT_LENGTH={demo.PROMPT_LENGTH}",
        "--gin.LEARNING_RATE=0.1",
        f"--gin.TRAIN_STEPS={steps}",
        "--gin.EVAL_PERIOD=100",
        f"--gin.SEED={seed}",
    ]
    print("prompt-tuning", shlex.join(words), flush=True)
    if not (folder / "prompt.safetensors").exists() and cli.main(words):
        raise SystemExit(1)


def main() -> None:
    """Tunes what is missing, measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=pathlib.Path, default="runs/ensemble")
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    source = base_models.load(demo.CONFIG, demo.CHECKPOINT)
    store = PromptStore(source, 1024)
    names = [f"seed_{seed}" for seed in range(options.seeds)]
    for seed, name in enumerate(names):
        tune(options.folder / name, seed, options.steps)
        store.load(options.folder / name)
    engine = Engine(source, store)
    table = evaluate.evaluate(
        config=demo.CONFIG,
        initial_checkpoint_path=demo.CHECKPOINT,
        mixture_or_task_name=demo.ROTTEN_TOMATOES.name,
        mixture_or_task_module=demo.ROTTEN_TOMATOES.module,
        task_feature_lengths=demo.ROTTEN_TOMATOES.lengths,
        prompt_file=[str(options.folder / name / prompt_file.FILE) for name in names],
    )

    texts = rotten_tomatoes.texts_and_labels("test")[0]
    together = [{"prompt": names, "text": text} for text in texts]
    apart = [[{"prompt": name, "text": text} for text in texts] for name in names]

    def separately():
        return [engine.answer(rows) for rows in apart]

    alone, combined = separately(), engine.answer(together)
    agree = all(
        one["answer"] == row["answers"][e]["answer"]
        for e, answers in enumerate(alone)
        for one, row in zip(answers, combined, strict=True)
    )
    ways = {"together": lambda: engine.answer(together), "apart": separately}
    clocks = {"clock": time.perf_counter, "processor": time.process_time}
    seconds = {clock: {name: [] for name in ways} for clock in clocks}
    for _ in range(options.rounds):
        for name, answer in ways.items():
            start = {clock: now() for clock, now in clocks.items()}
            answer()
            for clock, now in clocks.items():
                seconds[clock][name].append(now() - start[clock])
    results = {
        "task": demo.ROTTEN_TOMATOES.name,
        "split": "test",
        "examples": len(texts),
        "prompts": len(names),
        "steps": options.steps,
        "accuracy": {
            "mean": table["mean"]["accuracy"],
            "best": table["best"]["accuracy"],
            "vote": table["combined"]["vote"]["accuracy"],
            "mean log-probability": table["combined"]["mean"]["accuracy"],
            "best by validation": table["combined"]["best"]["accuracy"],
        },
        "accuracy_by_prompt": {k: v["accuracy"] for k, v in table["prompts"].items()},
        "answers_agree": agree,
        "median_seconds": {
            name: statistics.median(times) for name, times in seconds["clock"].items()
        },
        "time_ratio_together_to_apart": {
            clock: statistics.median(
                one / five
                for one, five in zip(times["together"], times["apart"], strict=True)
            )
            for clock, times in seconds.items()
        },
        "rounds": options.rounds,
    }
    environment.publish(results, options.output)


if __name__ == "__main__":
    main()
