# SPDX-License-Identifier: Apache-2.0
"""``experiment``: from a name to a table, again without work, never with another grid."""

import json

import pytest

from prompt_tuning import cli
from prompt_tuning.command_line import gin_files

NAMES = [n for n in gin_files.shipped() if n.startswith("experiments/")]


@pytest.fixture(scope="module")
def run(tmp_path_factory, reviews, tiny_checkpoint):
    """Runs the command on the tiny model and eight sentences; returns folder and code."""
    folder = tmp_path_factory.mktemp("experiment") / "few"
    elsewhere = {
        "files": {"test": reviews["test"]},
        "template": "{sentence}",
        "label_names": ["good", "bad"],
    }

    def call(*more):
        code = cli.main(
            [
                "experiment",
                "few_shot",
                "--gin_file=tasks/local_file.gin",
                "--mixture_or_task_name=experiment_reviews",
                f"--task_files={reviews}",
                "--template={sentence}",
                "--label_names=['good', 'bad']",
                "--task_feature_lengths={'inputs': 8, 'targets': 4}",
                f"--initial_checkpoint_path={tiny_checkpoint}",
                "--grid=[{'examples': [2, 4]}, {'method': 'model_tuning'}]",
                "--prompt_length=2",
                "--seeds=(0,)",
                "--train_steps=2",
                "--model_steps=2",
                "--eval_period=2",
                "--batch_size=8",
                "--together",
                "--interpret",
                f"--other_tasks={ {'elsewhere': elsewhere} }",
                f"--model_dir={folder}",
                *more,
            ]
        )
        return folder, code

    return call


@pytest.mark.slow
def test_a_grid_its_table_and_its_repetition(run, capsys):
    folder, code = run()
    assert code == 0
    found = json.loads((folder / "experiment.json").read_text())
    assert found["experiment"] == "few_shot" and found["figure"]["x"] == "examples"
    rows = [row for row in found["rows"] if row["combine"] == "alone"]
    # The prompts trained together, the model by itself; all were measured twice.
    domains = ["experiment_reviews", "elsewhere"]
    assert [
        (row["method"], row.get("examples"), row["domain"], row["seed"]) for row in rows
    ] == [
        *(("prompt_tuning", n, domain, 0) for domain in domains for n in (2, 4)),
        *(("model_tuning", None, domain, 0) for domain in domains),
    ]
    assert len({row["run"]["name"] for row in rows}) == 2
    for row in rows:
        assert 0 <= row["metrics"]["accuracy"] <= 100
        is_prompt = row["method"] == "prompt_tuning"
        assert ("nearest_cosine" in row["metrics"]) == is_prompt
        assert row["run"]["bytes"] > 0 and row["run"]["cost"]["steps"] == 2
    # The same four sentences.
    here, there = ([r["metrics"] for r in rows if r["domain"] == d] for d in domains)
    assert here == there
    rules = [row["combine"] for row in found["rows"] if row not in rows]
    assert rules == ["vote", "mean", "best"] * 2
    head, _, *lines = (folder / "table.md").read_text().splitlines()
    assert head == "| examples | method | combine | domain | accuracy | seeds |"
    assert len(lines) == 2 * (2 + 3 + 1)
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr()
    assert "run 2 of 2" in said.err and "prompt tuning" in said.err

    written = {path: path.stat().st_mtime_ns for path in folder.glob("runs/**/*.json")}
    assert run()[1] == 0
    assert "run 1 of 2" not in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in written} == written

    for more, line in {
        "--seeds=(0, 1)": "seeds is [0, 1] and was [0]",
        "--train_steps=3": "train_steps is 3 and was 2",
        "--model_learning_rate=0.1": "model_tuning/learning_rate is 0.1 and was 0.001",
        "--experiment=other": "holds the experiment 'few_shot'",
        "--batch_size=12": "BATCH_SIZE=12 does not divide",
        "--prompts=[{}]": "GRID says what is trained: leave PROMPTS out",
        "--test_split=tset": "TEST_SPLIT='tset' is no split of experiment_reviews",
    }.items():
        assert run(more)[1] == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("prompt-tuning: ") and line in message


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        (
            "--figure={}",
            "FIGURE: x=None is no value of GRID's cells: choose one of exam",
        ),
        ("--figure={'x': 'lenght'}", "FIGURE: x='lenght' is no value of GRID's cells"),
        ("--figure={'x': 'examples', 'by': 'seed'}", "FIGURE: by='seed' is no value"),
        (
            "--figure={'x': 'examples', 'lgo': 1}",
            "FIGURE has no lgo: it may have x, by",
        ),
        ("--grid=[{'prompt_length': 'x'}]", "GRID: prompt_length='x' must be a number"),
        (
            "--grid=[{'examples': [0]}]",
            "GRID: examples=0 must be a number of 1 or more",
        ),
        ("--grid=[{}, {'examples': []}]", "GRID: 'examples' is a choice of nothing"),
        (
            "--other_tasks={'a': {'files': {'test': 'nowhere.tsv'}}}",
            "OTHER_TASKS: 'a': cannot read nowhere.tsv: No such file",
        ),
        ("--other_tasks={'a': {'template': '{x}'}}", "'a': it has no files"),
        ("--other_tasks={'a': {'file': 'x.tsv'}}", "OTHER_TASKS: 'a' has no file"),
        (
            "--other_tasks={'a': {'files': {'dev': 'nowhere.tsv'}}}",
            "'a': TEST_SPLIT='test' is no split of a: choose one of dev",
        ),
        (
            "--other_tasks={'a': {'files': {'test': 'x.tsv'}, 'label_names': ['a', 'b']}}",
            "'a': LABEL_NAMES are a, b, the prompt's labels good, bad",
        ),
        (
            "--other_tasks={'experiment_reviews': {'files': {'test': 'nowhere.tsv'}}}",
            "is what the task itself is called",
        ),
        ("--other_tasks={'a': {}}", "no task or mixture is called 'a'"),
        ("--grid=[]", "give a dict for each, e.g. [{'prompt_length': [5, 20]}]"),
    ],
)
def test_what_cannot_be_trained_or_drawn_is_refused_first(
    run, tmp_path, capsys, flag, line
):
    assert run(flag, f"--model_dir={tmp_path / 'new'}")[1] == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("prompt-tuning: ") and line in message
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "record", ['{"experiment": "few_shot"}', '{"grid": {}, "rows": 3}']
)
def test_a_record_of_another_kind_is_no_experiment(run, tmp_path, capsys, record):
    (tmp_path / "experiment.json").write_text(record)
    assert run(f"--model_dir={tmp_path}")[1] == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "is no record of an experiment, it has no " in message
    assert [path.name for path in tmp_path.iterdir()] == ["experiment.json"]


@pytest.mark.slow
def test_a_folder_in_which_nothing_was_trained_takes_another_grid(
    run, tmp_path, capsys
):
    where = f"--model_dir={tmp_path}"
    wrong = "--grid=[{'prompt_init': 'magic', 'examples': 4}]"
    assert run(wrong, where)[1] == 2
    assert "no prompt_init is called 'magic'" in capsys.readouterr().err
    right = "--grid=[{'prompt_init': 'random', 'examples': 4}]"
    figure = "--figure={'x': 'prompt_init', 'metrics': ['f1']}"
    assert run(right, where, figure)[1] == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "FIGURE: no metric is called 'f1': choose from accuracy" in said
    # Cured, nothing is trained again.
    assert run(right, where, figure.replace("f1", "accuracy"))[1] == 0
    assert "run 1 of 1" not in capsys.readouterr().err
    assert "| prompt init |" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_is_a_name_a_grid_and_a_figure(name):
    file = gin_files.read_shipped(name)
    values = file.macros_set
    assert name == f"experiments/{values['EXPERIMENT']}.gin"
    assert values["GRID"] and values["FIGURE"]["x"] and file.summary
