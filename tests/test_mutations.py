# SPDX-License-Identifier: Apache-2.0
"""Damaged small files are read as what they were, or refused in one line.

Every mutant is made by a seed. Three things may not happen: another error than
`UserError` (a traceback), a file that reads as something else than what was written (a
silent change), and anything new in the folder (a write outside of the output).

What a reader cannot notice is not counted as silent: rows of people's files and the text
of gin files have no checksum, so that a changed letter is another letter.
"""

import collections
import json
import os
import random
import warnings

import numpy as np
import pytest

from prompt_tuning.checkpoints import prompt_formats
from prompt_tuning.data import rows
from prompt_tuning.data.local_task import LocalTask
from prompt_tuning.errors import UserError
from prompt_tuning.inference import batch_jobs
from prompt_tuning.runs import run_view

ARRAY = np.random.default_rng(0).standard_normal((4, 16), np.float32)
CARD = {
    "method": "prompt_tuning",
    "template": "{prompt:0:2} it says: {sentence} {prompt:2:4}",
    "task": "caf\u00e9",
    "labels": ["no", "yes"],
    "vocabulary": "mini",
    "base_model": {"name": "tiny", "fingerprint": "ab" * 32},
    "metric": {"accuracy": 87.5},
}
ROWS = "".join(
    json.dumps({"sentence": f"caf\u00e9 {i}", "label": i % 2}, ensure_ascii=i % 3 == 0)
    + "\n"
    for i in range(8)
)
TABLE = "sentence,label\n" + "".join(f'"a ""{i}"", b",{i % 2}\n' for i in range(8))
CONFIG = "import something\nTRAIN_STEPS = 20\nLABEL_NAMES = ('no', 'yes')\n" * 3


def prompt_of(path):
    array, card = prompt_formats.load(path)
    return array.tobytes(), card


def task_of(path):
    task = LocalTask({"train": str(path)}, "{sentence}", label_names=["no", "yes"])
    texts, targets = task.read("train")
    # Whatever was read can be tokenised, written down and sent.
    json.dumps([texts, targets], ensure_ascii=False, allow_nan=False).encode()
    assert len(texts) == len(targets) and set(targets) <= {"no", "yes"}


def scanned(path):
    found = list(rows.scan(path))
    for record in found:
        assert record.error is None or "\n" not in record.error
    # In order, none of them lost: the lines are those of the file.
    lines = [record.line for record in found]
    assert lines == sorted(set(lines))


def view_of(path):
    for facts in run_view.describe(path).values():
        str(facts).encode("utf-8", "replace")


def write_native(path):
    prompt_formats.save(path, ARRAY, CARD, "native")


def write_npy(path):
    with open(path, "wb") as file:
        np.save(file, ARRAY)


def write_job(path):
    done = batch_jobs.Progress("ab" * 32, {"seed": 0}, 1024, 3, 99_999, 77)
    path.write_text(done.to_json())


def text(content):
    return lambda path: path.write_text(content, encoding="utf-8")


# By kind: the file's name, how it is written and read, and where its data begins that
# has no checksum.
KINDS = {
    "prompt": ("p.safetensors", write_native, prompt_of, None),
    "numpy header": ("p.npy", write_npy, prompt_of, 128),
    "job": ("a.job", write_job, batch_jobs.Progress.read, None),
    "JSONL": ("a.jsonl", text(ROWS), task_of, None),
    "JSONL, row by row": ("a.jsonl", text(ROWS), scanned, None),
    "CSV": ("a.csv", text(TABLE), task_of, None),
    "CSV, row by row": ("a.csv", text(TABLE), scanned, None),
    "TSV, row by row": ("a.tsv", text(TABLE.replace(",", "\t")), scanned, None),
    "config": ("config.gin", text(CONFIG), view_of, None),
    "metrics": (
        "metrics.jsonl",
        text(ROWS.replace("sentence", "split")),
        view_of,
        None,
    ),
    "results": ("results.json", text(json.dumps(CARD)), view_of, None),
}
SPLICES = [b"\xff\xfe", b"\xed\xa0\x80", b"\0", b'"', b"\n", b"\r", b"[" * 2000]
SPLICES += [b"9" * 5000, b"NaN", b"-1", b"1e999", b"\\ud800", b"\x1b[2J", b"{", b"}"]


def mutate(content: bytes, end: int, chance: random.Random) -> bytes:
    """Changes something before ``end``."""
    at = chance.randrange(end)
    match chance.choice(["flip", "flip", "flip", "cut", "splice", "double", "move"]):
        case "flip":
            changed = bytes([content[at] ^ 1 << chance.randrange(8)])
            return content[:at] + changed + content[at + 1 :]
        case "cut":
            return content[:at]
        case "splice":
            stop = min(end, at + chance.choice([0, 0, 1, 8]))
            return content[:at] + chance.choice(SPLICES) + content[stop:]
        case "double":
            stop = min(end, at + chance.randrange(1, 64))
            return content[:stop] + content[at:stop] + content[stop:]
        case _:
            other = chance.randrange(end)
            first, last = sorted((at, other))
            return (
                content[:first]
                + content[last:end]
                + content[first:last]
                + (content[end:])
            )


def outcomes(kind, folder, count):
    """How many mutants of a kind were read and refused; fails at what may not happen."""
    name, write, read, end = KINDS[kind]
    path = folder / name
    write(path)
    content, want = path.read_bytes(), read(path)
    found = collections.Counter()
    for seed in range(count):
        mutant = mutate(content, end or len(content), random.Random(f"{kind} {seed}"))
        path.write_bytes(mutant)
        try:
            # What NumPy and Python say of a header that they parse is no news to users.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                got = read(path)
        except UserError as error:
            assert "\n" not in str(error), (kind, seed)
            found["refused"] += 1
        else:
            assert got == want, f"{kind} {seed} reads as something else"
            found["read"] += 1
        assert os.listdir(folder) == [name], (kind, seed)
        assert path.read_bytes() == mutant, (kind, seed)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_some_mutants(kind, tmp_path):
    assert sum(outcomes(kind, tmp_path, 40).values()) == 40


@pytest.mark.slow
def test_many_mutants(tmp_path, record_property):
    total = collections.Counter()
    for i, kind in enumerate(KINDS):
        folder = tmp_path / str(i)
        folder.mkdir()
        found = outcomes(kind, folder, 500)
        print(f"{kind}: {dict(found)}")
        total += found
    print(f"all: {dict(total)}")
    record_property("mutants", dict(total))
    assert sum(total.values()) == 500 * len(KINDS)
