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

import jax
import numpy as np
import sentencepiece
from film_opinions import training_rows
from labelled import render
from labelled_arrays import replace_task
from sentences import read_film_sentences
from sklearn.linear_model import LogisticRegression
from sources import Row
from teacher import FILM_VECTORS, known_vectors, read_packages, vectors

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
    return model.fit(features, praised)


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


def add_rows(rows, arrays):
    """Adds rows of `TASK` to the labelled examples of a folder, and to its sources.json."""
    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(arrays / "spiece.model")
    )
    examples = render(rows)
    counts = {}
    for name, held_out in (("labelled", False), ("labelled_validation", True)):
        part = [item for item in examples if item.held_out == held_out]
        counts[name] = replace_task(processor, part, arrays / f"{name}.npz")
    path = arrays / "sources.json"
    sources = json.loads(path.read_text("utf-8"))
    sources["labelled"][TASK] = sources["labelled"]["imdb"] | {
        "package": "sentences of imdb, labelled by the teacher's vectors",
        "rows": len(rows),
        "dropped_rows": 0,
        **counts["labelled"],
    }
    path.write_text(json.dumps(sources, indent=2) + "\n", "utf-8")


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
    features = np.float32(known_vectors(options.arrays / FILM_VECTORS))
    pairs = read_film_sentences(options.arrays)[: len(features)]
    praised = np.array([label == "positive" for _, label in pairs])
    model = classify(features, praised)
    probabilities = model.predict_proba(features)[:, 1]
    rows = sure_rows([text for text, _ in pairs], probabilities)
    add_rows(rows, options.arrays)

    texts, is_praise = training_rows(options.arrays / "probe")
    weights, tokenizer = read_packages(options.packages)
    unseen = vectors(jax.device_put(weights), tokenizer, texts)
    found = {
        "sentences": len(pairs),
        "agree_with_review": float(np.mean((probabilities > 0.5) == praised)),
        "sure": len(rows),
        "rotten_tomatoes_training_rows": len(texts),
        "right_about_them": float(model.score(np.float32(unseen), is_praise)),
    }
    text = json.dumps(found, indent=2) + "\n"
    options.output.write_text(text, "utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
