# SPDX-License-Identifier: Apache-2.0
"""Jobs lose no row, keep their order, and go on where they were interrupted."""

import base64
import json
import os
import stat

import numpy as np
import pytest

from prompt_tuning.checkpoints import base_models
from prompt_tuning.errors import UserError
from prompt_tuning.inference import batch_jobs
from prompt_tuning.inference.batch_jobs import Job
from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.store import PromptStore
from prompt_tuning.network.transformer import T5Config

H = 16
SETTINGS = {"batch_size": 4}


@pytest.fixture(scope="module")
def engine(tiny_checkpoint):
    source = base_models.load(T5Config(8192, H, 2, 1, 1, 8, 32), tiny_checkpoint)
    store = PromptStore(source, 32)
    rng = np.random.default_rng(0)
    for name, length in (("a", 2), ("b", 5)):
        prompt = rng.normal(scale=3, size=(length, H)).astype(np.float32)
        card = {
            "base_model": source.identity,
            "vocabulary": "mini",
            "labels": ["good", "bad"],
        }
        store.add(name, prompt, card)
    return Engine(source, store, batch_sizes=(4,), longest=24)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(batch_jobs, "CHUNK", 4)


def lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def write(path, *rows):
    encoded = (r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows)
    path.write_bytes(b"\n".join(encoded))
    return path


GOOD = [
    {"prompt": "ab"[i % 2], "text": "fine " * (1 + i % 4), "id": f"row {i}"}
    for i in range(22)
]


def test_answers_come_in_order(engine, tmp_path):
    job = Job(write(tmp_path / "in.jsonl", *GOOD), tmp_path / "new/out.jsonl")
    progress = job.run(engine, SETTINGS)
    assert (progress.answered, progress.rejected) == (22, 0)
    found = lines(tmp_path / "new/out.jsonl")
    assert [row["line"] for row in found] == list(range(1, 23))
    assert [row["id"] for row in found] == [row["id"] for row in GOOD]
    for row, answer in zip(found, engine.answer(GOOD), strict=True):
        assert row["answer"] == answer["answer"]
        for label, score in answer["scores"].items():
            assert row["scores"][label] == pytest.approx(score, abs=2e-4)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.jsonl"]


BAD = [
    (b'{"prompt": "a", "text":', "not JSON"),
    (b"\xff\xfe\x00", "not UTF-8"),
    (b"[1, 2]", "no JSON object"),
    (b"[" * 100_000, "not JSON"),
    (b'{"n": ' + b"9" * 5000 + b"}", "not JSON"),
    ({"prompt": "c", "text": "x"}, "no prompt 'c'"),
    ({"text": "x"}, "names no prompt"),
    ({"prompt": "a"}, "no column 'text'"),
    ({"prompt": "a", "text": "  "}, "empty"),
    ({"prompt": "a", "text": "x " * 100}, "more than 24"),
    (b'{"prompt": "a", "text": "\\ud800"}', "half a character"),
    (b'{"prompt": "\\ud800", "text": "x"}', "no prompt"),
]


def test_bad_rows_are_written_aside_and_stop_nothing(engine, tmp_path):
    mixed = [part for (bad, _), good in zip(BAD, GOOD) for part in (bad, good, b" ")]
    path = write(tmp_path / "in.jsonl", *mixed)
    progress = Job(path, tmp_path / "out.jsonl").run(engine, SETTINGS)
    assert (progress.answered, progress.rejected) == (len(BAD), len(BAD))
    answered = lines(tmp_path / "out.jsonl")
    assert [row["line"] for row in answered] == list(range(2, 3 * len(BAD), 3))
    rejected = lines(tmp_path / "out.rejected.jsonl")
    assert [row["line"] for row in rejected] == list(range(1, 3 * len(BAD), 3))
    given = path.read_bytes().split(b"\n")
    for row, (_, says) in zip(rejected, BAD, strict=True):
        assert says in row["error"]
        kept = row.get("row", "").encode() or base64.b64decode(row["row_base64"])
        assert kept == given[row["line"] - 1]


def test_an_id_may_be_anything(engine, tmp_path):
    ids = ['"\\ud800"', "null", "[1, {}]", "1.5"]
    rows = [f'{{"prompt": "a", "text": "x", "id": {i}}}'.encode() for i in ids]
    rows[0] = b"\xef\xbb\xbf" + rows[0] + b"\r"  # A byte order mark, a CRLF.
    path = write(tmp_path / "in.jsonl", *rows)
    Job(path, tmp_path / "out.jsonl").run(engine, SETTINGS)
    found = [row["id"] for row in lines(tmp_path / "out.jsonl")]
    assert found == [json.loads(i) for i in ids]


def test_rows_without_a_prompt_take_the_only_one(engine, tmp_path):
    path = write(tmp_path / "in.jsonl", {"text": "x"}, {"prompt": "a", "text": "x"})
    Job(path, tmp_path / "out.jsonl").run(engine, SETTINGS, default_prompt="b")
    assert [row["prompt"] for row in lines(tmp_path / "out.jsonl")] == ["b", "a"]


class Interrupting:
    """An engine that is interrupted after some batches of rows."""

    def __init__(self, engine, runs):
        self.engine, self.left = engine, runs
        self.prepare = engine.prepare

    def run(self, requests):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return self.engine.run(requests)


@pytest.mark.parametrize("torn", [b"", b'{"line": 99, "answ'])
def test_an_interrupted_job_ends_with_the_same_files(engine, tmp_path, capsys, torn):
    rows = [part for bad, good in zip(BAD, GOOD) for part in (good, bad[0])]
    path = write(tmp_path / "in.jsonl", *rows)
    Job(path, tmp_path / "whole.jsonl").run(engine, SETTINGS)
    job = Job(path, tmp_path / "out.jsonl")
    for runs in (0, 1, 3):
        with pytest.raises(KeyboardInterrupt):
            job.run(Interrupting(engine, runs), SETTINGS)
        assert not (tmp_path / "out.jsonl").exists()
        part = tmp_path / "out.jsonl.part"
        # What a kill in the middle of a write leaves behind.
        if part.exists():
            part.write_bytes(part.read_bytes() + torn)
    capsys.readouterr()
    counted = Interrupting(engine, 2)
    progress = job.run(counted, SETTINGS)
    assert counted.left == 0, "24 lines in chunks of 4, of which 4 were done"
    assert "resuming after row 16" in capsys.readouterr().err
    assert progress.answered + progress.rejected == len(rows)
    for name in (".jsonl", ".rejected.jsonl"):
        whole = (tmp_path / f"whole{name}").read_bytes()
        assert (tmp_path / f"out{name}").read_bytes() == whole
    assert len(list(tmp_path.iterdir())) == 5


@pytest.fixture
def begun(engine, tmp_path):
    path = write(tmp_path / "in.jsonl", *GOOD)
    job = Job(path, tmp_path / "out.jsonl")
    with pytest.raises(KeyboardInterrupt):
        job.run(Interrupting(engine, 2), SETTINGS)
    return job


def test_a_changed_input_is_refused(begun, engine, tmp_path):
    write(tmp_path / "in.jsonl", *GOOD[:-1], {"prompt": "a", "text": "other"})
    with pytest.raises(UserError, match="begun with other input.*out.jsonl.job"):
        begun.run(engine, SETTINGS)
    (tmp_path / "out.jsonl.job").unlink()
    assert begun.run(engine, SETTINGS).answered == len(GOOD)
    assert len(lines(tmp_path / "out.jsonl")) == len(GOOD)


def test_changed_settings_are_refused(begun, engine):
    with pytest.raises(UserError, match="begun with other prompts or settings"):
        begun.run(engine, {"batch_size": 8})


def test_a_part_that_was_cut_is_refused(begun, engine, tmp_path):
    part = tmp_path / "out.jsonl.part"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(UserError, match="was cut short"):
        begun.run(engine, SETTINGS)


def test_a_damaged_state_is_refused(begun, engine, tmp_path):
    for text in ("{", '{"lines": 3}'):
        (tmp_path / "out.jsonl.job").write_text(text)
        with pytest.raises(UserError, match="out.jsonl.job"):
            begun.run(engine, SETTINGS)


@pytest.mark.parametrize(
    "name, value",
    [
        ("answered", -1),
        ("answered", 4.0),
        ("answered", "4"),
        ("answers_size", 3),
        ("rejected_size", 10**400),
        ("rejected", None),
    ],
)
def test_odd_numbers_in_a_state_are_refused(begun, engine, tmp_path, name, value):
    path = tmp_path / "out.jsonl.job"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, name: value}))
    before = (tmp_path / "out.jsonl.part").read_bytes()
    with pytest.raises(UserError, match="out.jsonl.job"):
        begun.run(engine, SETTINGS)
    assert (tmp_path / "out.jsonl.part").read_bytes() == before


def test_a_part_that_is_a_link_is_not_followed(engine, tmp_path):
    path = write(tmp_path / "in.jsonl", *GOOD)
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "out.jsonl.part").symlink_to("precious")
    with pytest.raises(UserError, match="cannot write"):
        Job(path, tmp_path / "out.jsonl").run(engine, SETTINGS)
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.parametrize(
    "output", ["in.jsonl", "hard.jsonl", "soft.jsonl", "in.jsonl.part", "prompt"]
)
def test_what_is_read_is_not_written_over(tmp_path, output):
    path = write(tmp_path / "in.jsonl", *GOOD)
    before = path.read_bytes()
    (tmp_path / "hard.jsonl").hardlink_to(path)
    (tmp_path / "soft.jsonl").symlink_to(path)
    (tmp_path / "prompt").write_text("a prompt")
    if output.endswith(".part"):
        path = write(tmp_path / output.replace("part", "part.jsonl"), *GOOD)
        (tmp_path / output).symlink_to(path)
        output = "in.jsonl"
    with pytest.raises(UserError, match="which is read"):
        Job(path, tmp_path / output, read_too=[tmp_path / "prompt"])
    assert (tmp_path / "in.jsonl").read_bytes() == before


def test_an_input_with_the_rejecteds_name_is_refused(tmp_path):
    path = write(tmp_path / "out.rejected.jsonl", *GOOD)
    with pytest.raises(UserError, match=r"out\.rejected\.jsonl would be written over"):
        Job(path, tmp_path / "out.jsonl")


def test_a_table_is_read_as_one(engine, tmp_path):
    (tmp_path / "dev.tsv").write_text("text\tlabel\na fine film\tgood\n\tbad\n")
    job = Job(tmp_path / "dev.tsv", tmp_path / "out.jsonl")
    progress = job.run(engine, SETTINGS, default_prompt="a")
    assert (progress.answered, progress.rejected) == (1, 1)
    (row,) = lines(tmp_path / "out.jsonl")
    (same,) = engine.answer([{"prompt": "a", "text": "a fine film"}])
    assert (row["line"], row["answer"]) == (2, same["answer"])
    (rejected,) = lines(tmp_path / "out.rejected.jsonl")
    assert rejected == {"line": 3, "error": "the text is empty", "row": "\tbad"}
    (tmp_path / "bare.csv").write_text("a fine film,good\n")
    job = Job(tmp_path / "bare.csv", tmp_path / "o.jsonl", columns=["text", "label"])
    assert job.run(engine, SETTINGS, default_prompt="a").answered == 1


def test_a_null_prompt_is_none_named(engine, tmp_path):
    path = write(tmp_path / "in.jsonl", {"prompt": None, "text": "x"})
    Job(path, tmp_path / "out.jsonl").run(engine, SETTINGS, default_prompt="b")
    assert [row["prompt"] for row in lines(tmp_path / "out.jsonl")] == ["b"]


def test_a_stream_takes_answers_and_errors_in_order(engine, tmp_path, capfdbinary):
    path = write(tmp_path / "in.jsonl", GOOD[0], b"{", *GOOD[1:6])
    progress = Job(path, "-").run(engine, SETTINGS)
    assert (progress.answered, progress.rejected) == (6, 1)
    found = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert [row["line"] for row in found] == list(range(1, 8))
    assert ["error" in row for row in found] == [False, True, *[False] * 5]
    assert os.listdir(tmp_path) == ["in.jsonl"]
    with pytest.raises(UserError, match="cannot write to /dev/full"):
        Job(path, "/dev/full").run(engine, SETTINGS)
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_two_jobs_do_not_write_one_file(begun, engine):
    class Meanwhile(Interrupting):
        def run(self, requests):
            with pytest.raises(UserError, match="another process is writing"):
                begun.run(engine, SETTINGS)
            return super().run(requests)

    assert begun.run(Meanwhile(engine, 9), SETTINGS).answered == len(GOOD)


def test_a_new_job_leaves_nothing_of_an_old_one(engine, tmp_path):
    path = write(tmp_path / "in.jsonl", GOOD[0], {"prompt": "c"})
    job = Job(path, tmp_path / "out.jsonl")
    assert job.run(engine, SETTINGS).rejected == 1
    write(path, GOOD[0])
    assert job.run(engine, SETTINGS).rejected == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_inputs_that_are_none(engine, tmp_path):
    with pytest.raises(UserError, match="cannot read .*nowhere"):
        Job(tmp_path / "nowhere.jsonl", tmp_path / "out.jsonl").run(engine, SETTINGS)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="is empty"):
        Job(tmp_path / "empty.jsonl", tmp_path / "out.jsonl").run(engine, SETTINGS)
    path = write(tmp_path / "in.jsonl", *GOOD)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        Job(path, tmp_path / "file/out.jsonl").run(engine, SETTINGS)
    assert not (tmp_path / "out.jsonl.part").exists()
