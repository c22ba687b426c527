# SPDX-License-Identifier: Apache-2.0
"""What a bag of words carries from the mixture's film reviews to Rotten Tomatoes.

The reviews are the labelled rows that are nearest to that task, so this says how much of
it there is to learn from them. Only training rows of Rotten Tomatoes are read:

  python film_opinions.py --packages DIR --probe ARRAYS/probe --output FILE.json
"""

import argparse
import json
import pathlib

import numpy as np
import scipy.sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sources import read_movie_reviews

FOLDS = 4
# The scale of the reviews' score beside TF-IDF, whose entries are below 1.
SCORE_SCALE = 0.1


def _tf_idf(least):
    return TfidfVectorizer(ngram_range=(1, 2), min_df=least, sublinear_tf=True)


def measure(reviews, texts, labels):
    """Compares three readers of the sentences.

    Args:
      reviews: Pairs of a review and whether it praises.
      texts: Sentences.
      labels: Whether each of them praises, an array.

    Returns:
      A dict of accuracies.
    """
    reader = _tf_idf(3)
    known = reader.fit_transform([text for text, _ in reviews])
    praised = [is_praise for _, is_praise in reviews]
    classifier = LogisticRegression(C=30, max_iter=200).fit(known, praised)
    scores = classifier.decision_function(reader.transform(texts))
    own = _tf_idf(1).fit_transform(texts)
    both = scipy.sparse.hstack([own, SCORE_SCALE * scores[:, None]]).tocsr()
    folded = lambda features: float(
        cross_val_score(
            LogisticRegression(C=10, max_iter=500), features, labels, cv=FOLDS
        ).mean()
    )
    return {
        "by_reviews": float(np.mean((scores > 0) == labels)),
        "by_reviews_threshold_at_median": float(
            np.mean((scores > np.median(scores)) == labels)
        ),
        "by_sentences": folded(own),
        "by_both": folded(both),
    }


def training_rows(probe):
    """Sentences of Rotten Tomatoes' training part and whether each praises.

    Args:
      probe: The folder that prepare.py wrote the probed tasks to.

    Returns:
      A list of texts and an array.
    """
    lines = (probe / "rotten_tomatoes.jsonl").read_text("utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["split"] == "train"]
    praised = np.array([row["label"] == "positive" for row in rows])
    return [row["text"] for row in rows], praised


def main(arguments=None):
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=pathlib.Path, required=True)
    parser.add_argument("--probe", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    options = parser.parse_args(arguments)
    reviews = [
        (text, label == "positive")
        for text, label, source in read_movie_reviews(options.packages)
        if source == "imdb"
    ]
    texts, labels = training_rows(options.probe)
    found = measure(reviews, texts, labels)
    found |= {"reviews": len(reviews), "sentences": len(texts), "folds": FOLDS}
    text = json.dumps(found, indent=2)
    options.output.write_text(text + "\n", "utf-8")
    print(text)


if __name__ == "__main__":
    main()
