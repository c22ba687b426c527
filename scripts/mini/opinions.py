# SPDX-License-Identifier: Apache-2.0
"""Labels sentences of film reviews by what the teacher makes of them.

A review praises or pans, its sentences do not all. A logistic regression learns the label
of the review from the teacher's vectors of its sentences; no single sentence is known to
be right, but what most of them have in common is. Sentences that it is sure of become
labelled examples of the task `film_sentences`:

  python opinions.py --arrays DIR --packages DIR --output FILE.json

`--arrays` is the folder that prepare.py wrote and teacher.py computed vectors for; the
examples are added to its `labelled.npz`, in place of those that an earlier call added.
What the regression says of training rows of Rotten Tomatoes, of which it has seen none,
is written to the output.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
import sentencepiece
from labelled import render
from labelled_arrays import replace_task
from sklearn.linear_model import LogisticRegression
from sources import Row
from teacher import FILM_SENTENCES, FILM_VECTORS, known_vectors, read_packages, vectors

TASK = "film_sentences"
# Strong: labels are wrong as often as a sentence is not of its review's opinion.
INVERSE_REGULARISATION = 0.3
# Of the probability of either label.
SURE = 0.7


def classify(features, praised):
    """A logistic regression of reviews' labels on vectors of their sentences.

    Args:
      features: [N, D].
      praised: [N], whether the review praises.
    """
    model = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=1000)
    return model.fit(np.float32(features), praised)


def sure_rows(texts, probabilities):
    """Rows of the sentences whose label has a probability of `SURE` or more.

    Args:
      texts: The sentences.
      probabilities: [N], of praise.

    Returns:
      A list of Row, as many of either label.
    """
    groups = []
    for label, likely in (
        ("positive", probabilities),
        ("negative", 1.0 - probabilities),
    ):
        places = np.flatnonzero(likely >= SURE).tolist()
        groups.append([Row(TASK, texts[i], "", label, texts[i]) for i in places])
    count = min(map(len, groups))
    return [row for group in groups for row in group[:count]]


def main(arguments=None):
    """Labels, adds and measures.

    Args:
      arguments: The command line, or None for the process's own.

    Returns:
      The exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arrays", type=pathlib.Path, required=True)
    parser.add_argument("--packages", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    options = parser.parse_args(arguments)
    features = known_vectors(options.arrays / FILM_VECTORS)
    lines = (options.arrays / FILM_SENTENCES).read_text("utf-8").splitlines()
    pairs = [json.loads(line) for line in lines[: len(features)]]
    praised = np.array([pair["label"] == "positive" for pair in pairs])
    model = classify(features, praised)
    probabilities = model.predict_proba(np.float32(features))[:, 1]
    rows = sure_rows([pair["text"] for pair in pairs], probabilities)

    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(options.arrays / "spiece.model")
    )
    examples = render(rows)
    for name, held_out in (("labelled", False), ("labelled_validation", True)):
        part = [item for item in examples if item.held_out == held_out]
        path = options.arrays / f"{name}.npz"
        counts = replace_task(processor, part, path)
        print(f"{path.name}: {counts}", flush=True)
        if not held_out:
            sources = json.loads((options.arrays / "sources.json").read_text("utf-8"))
            sources["labelled"][TASK] = sources["labelled"]["imdb"] | {
                "package": "sentences of imdb, labelled by the teacher's vectors",
                "rows": len(rows),
                "dropped_rows": 0,
                **counts,
            }
            text = json.dumps(sources, indent=2) + "\n"
            (options.arrays / "sources.json").write_text(text, "utf-8")

    path = options.arrays / "probe" / "rotten_tomatoes.jsonl"
    known = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    known = [row for row in known if row["split"] == "train"]
    weights, tokenizer = read_packages(options.packages)
    read = np.float32(vectors(weights, tokenizer, [row["text"] for row in known]))
    right = model.predict(read) == [row["label"] == "positive" for row in known]
    found = {
        "sentences": len(pairs),
        "agree_with_review": float(np.mean((probabilities > 0.5) == praised)),
        "sure": len(rows),
        "rotten_tomatoes_training_rows": len(known),
        "right_about_them": float(np.mean(right)),
    }
    text = json.dumps(found, indent=2) + "\n"
    options.output.write_text(text, "utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
