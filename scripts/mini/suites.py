# SPDX-License-Identifier: Apache-2.0
"""Reads training parts of GLUE and SuperGLUE, and rows that are prompted already.

Left out are ReCoRD and MultiRC, whose texts are too long for the model's rows, WiC and
WSC, which stay unseen kinds of task, and SST, whose sentences are Rotten Tomatoes'.
"""

import io
import json

from sources import Row, pair

# Templates of T0 that are left out: what-if reasoning is a kind of counterfactual
# inference, and the others mostly ask for texts far longer than a row of targets.
UNUSED_TEMPLATES = (
    "wiqa_",
    "multi_news_",
    "app_reviews_generate",
    "gigaword_write_an_article",
    "cnn_dailymail_3_0_0_generate_story",
    "cnn_dailymail_3_0_0_spice_up_story",
    "duorc_ParaphraseRC_build_story",
    "duorc_SelfRC_build_story",
)
_PARAPHRASE = {"0": "different", "1": "same"}
_ANSWERS = {True: "yes", False: "no"}
# Which words of a long passage are kept: those before this many.
LONGEST_PASSAGE = 70


def read_zstd(path):
    """Yields the lines of a compressed text, without their ends.

    Args:
      path: A file of UTF-8 text, compressed by zstandard.
    """
    import zstandard  # Here, so that what reads no compressed file needs none.

    with open(path, "rb") as file:
        reader = zstandard.ZstdDecompressor().stream_reader(file)
        for line in io.TextIOWrapper(reader, encoding="utf-8"):
            yield line.rstrip("\r\n")


def _objects(path):
    return [json.loads(line) for line in read_zstd(path)]


def read_glue(data, task, name, part, labels=None):
    """Returns the Rows of a set whose file holds text_a, text_b and a label.

    Args:
      data: The folder that holds glue9k.
      task: What the rows are to be called.
      name: What the file calls the set.
      part: `train` or `dev`.
      labels: What to call labels otherwise.
    """
    rows = []
    lines = read_zstd(data / "glue9k" / f"{name}.{part}.tsv.zst")
    next(lines)
    for line in lines:
        parts = line.split("\t")
        if len(parts) == 3:
            first, second, label = parts
            rows.append(pair(task, first, second, (labels or {}).get(label, label)))
    return rows


def read_qqp(data, part):
    """Returns the Rows of QQP's `part`, train or dev; labels are same or different."""
    return read_glue(data, "qqp", "QQP", part, _PARAPHRASE)


def _glue(data):
    rows = read_qqp(data, "train")
    for task, name in (("mnli", "MNLI"), ("qnli", "QNLI"), ("snli", "SNLI")):
        rows += read_glue(data, task, name, "train")
    return rows


def _passage(text):
    return " ".join(text.split()[:LONGEST_PASSAGE])


def _superglue(data):
    folder = data / "superglue"
    rows = []
    for item in _objects(folder / "BoolQ.train.jsonl.zst"):
        passage = _passage(item["passage"])
        rows.append(pair("boolq", passage, item["question"], _ANSWERS[item["label"]]))
    for item in _objects(folder / "CB.train.jsonl.zst"):
        rows.append(pair("cb", item["premise"], item["hypothesis"], item["label"]))
    for item in _objects(folder / "COPA.train.jsonl.zst"):
        choices = [item["choice1"], item["choice2"]]
        # Which of the two is the right one is no property of the text: each is a row
        # of its own, so that "yes" and "no" are equally frequent.
        for number, choice in enumerate(choices):
            text = f"{item['premise']} ({item['question']})"
            label = _ANSWERS[number == item["label"]]
            rows.append(pair("copa", text, choice, label))
    return rows


def _prompted(data):
    rows = []
    for item in _objects(data / "prompted" / "t0_52k.jsonl.zst"):
        if item["template"].startswith(UNUSED_TEMPLATES):
            continue
        prompt = " ".join(item["prompt"].split())
        completion = " ".join(item["completion"].split())
        if prompt and completion:
            rows.append(Row("prompted", prompt, "", completion, prompt))
    return rows


def read_suites(data):
    """Reads all sets of this module.

    Args:
      data: The folder with glue9k, superglue and prompted.

    Returns:
      A list of Row. A prompted row has the whole prompt for its text and the
      completion for its label.
    """
    return _glue(data) + _superglue(data) + _prompted(data)
