# SPDX-License-Identifier: Apache-2.0
"""Trackers get each record once, whatever happens to the run."""

import json

import pytest

from prompt_tuning import cli, report
from prompt_tuning.errors import UserError
from prompt_tuning.training import trackers
from prompt_tuning.training.tracked_records import FILE, Records

HPARAMS = {"seed": 1, "members": {"prompt": {"batch_size": 8}}}
LOSS = "train/loss/prompt"


class Writer:
    """What clu's metric writers can do, in memory."""

    def __init__(self):
        self.hparams, self.values, self.closed, self.fails = [], [], False, False

    def write_hparams(self, hparams):
        self.hparams.append(hparams)

    def write_scalars(self, step, scalars):
        if self.fails:
            raise ConnectionError("nobody\nanswers")
        self.values += [(step, name, value) for name, value in scalars.items()]

    def close(self):
        self.closed = True

    def losses(self):
        return [(step, value) for step, name, value in self.values if name == LOSS]


def go(folder, given, first, steps, *, killed=False):
    """A run from step ``first`` that records ``steps``; the loss is the step."""
    records = Records(trackers.named(given), folder, HPARAMS)
    records.begin(first)
    log = report.Log(folder, 9, first, ["prompt"], quiet=True, also=records.send)
    for step in steps:
        metrics = {"weight": 1, "token_loss": step, "correct": 0, "grad_norm": 0.5}
        log.training(step, "prompt", [metrics])
        log.pace(step, {"steps_per_second": 3.0})
    if not killed:
        with records, log:
            pass


def killed_twice(folder, given):
    """Ends at step 6; its newest checkpoint is that of step 2 both times."""
    go(folder, given, 0, [1, 2, 3, 4], killed=True)
    go(folder, given, 2, [3], killed=True)
    go(folder, given, 2, [3, 4, 5, 6])


EACH_ONCE = [(step, step) for step in range(1, 7)]


def test_a_writer_gets_each_record_once(tmp_path):
    writer = Writer()
    killed_twice(tmp_path, [writer])
    assert writer.losses() == EACH_ONCE and writer.closed
    assert writer.hparams == [{"seed": 1, "members/prompt/batch_size": 8}]
    assert len(writer.values) == len({value[:2] for value in writer.values}) == 24
    late = Writer()
    late.__class__ = type("Late", (Writer,), {})
    go(tmp_path, [writer, late], 6, [7])
    assert late.losses() == writer.losses() == [*EACH_ONCE, (7, 7)]


def test_one_that_fails_stops_nothing_and_gets_the_rest_later(tmp_path, capsys):
    writer = Writer()
    go(tmp_path, [writer], 0, [1, 2], killed=True)
    writer.fails = True
    go(tmp_path, [writer], 2, [3, 4])
    assert "Writer failed: nobody; it gets what it lacks" in capsys.readouterr().err
    writer.fails = False
    go(tmp_path, [writer], 4, [5, 6])
    assert writer.losses() == EACH_ONCE


def test_mlflow(tmp_path, monkeypatch):
    client = pytest.importorskip("mlflow.tracking").MlflowClient
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "reviews")
    uri = (tmp_path / "store").as_uri()
    folder = tmp_path / "first"
    folder.mkdir()
    killed_twice(folder, [trackers.MLflow(uri)])
    store = client(uri)
    experiment = store.get_experiment_by_name("reviews")
    (run,) = store.search_runs([experiment.experiment_id])
    history = store.get_metric_history(run.info.run_id, LOSS)
    assert [(metric.step, metric.value) for metric in history] == EACH_ONCE
    assert run.info.status == "FINISHED" and run.info.run_name == "first"
    assert run.data.params["members/prompt/batch_size"] == "8"
    store.delete_run(run.info.run_id)
    elsewhere = trackers.MLflow((tmp_path / "elsewhere").as_uri())
    with pytest.raises(UserError, match="trackers.json says .* delete that file"):
        go(folder, [elsewhere], 6, [])


def leveldb_records(data, start=7, block=32768):
    """The records of an offline run's file, which is a log of LevelDB's format."""
    at, record = start, b""
    while at + 7 <= len(data):
        if (room := block - at % block) < 7:
            at += room
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    folder = tmp_path / "first"
    folder.mkdir()
    go(folder, ["wandb"], 0, [1, 2, 3, 4])
    go(folder, ["wandb"], 2, [3, 4, 5, 6])
    found, runs = [], set()
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        runs.add(path.stem)
        for data in leveldb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            for item in record.history.item:
                if (item.key or "/".join(item.nested_key)) == LOSS:
                    found.append((record.history.step.num, json.loads(item.value_json)))
    assert found == EACH_ONCE and len(runs) == 1


@pytest.mark.parametrize(
    "given, says",
    [
        (["comet"], "no tracker is called 'comet': choose among 'mlflow', 'wandb'"),
        ("mlflow", "trackers='mlflow' must be a list"),
        ([3], "3 is no tracker"),
        ([Writer(), Writer()], "names 'Writer' twice"),
    ],
)
def test_what_is_no_tracker(given, says):
    with pytest.raises(UserError, match=says):
        trackers.named(given)


def test_the_command_line_sends_what_it_records(train_words, tmp_path, monkeypatch):
    client = pytest.importorskip("mlflow.tracking").MlflowClient
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    words = train_words(
        MODEL_DIR=tmp_path / "run",
        MIXTURE_OR_TASK_NAME="tracked_reviews",
        TRACKERS=["mlflow"],
    )
    assert cli.main(words) == 0
    known = json.loads((tmp_path / "run" / FILE).read_text())["mlflow"]["run"]
    store = client()
    expected = {}
    for record in report.read_metrics(tmp_path / "run"):
        for name, value in report.scalars(record).items():
            expected.setdefault(name, []).append((record["step"], value))
    assert LOSS in expected
    for name, values in expected.items():
        history = store.get_metric_history(known, name)
        assert [(metric.step, metric.value) for metric in history] == values
