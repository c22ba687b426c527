# SPDX-License-Identifier: Apache-2.0
"""`prompt-tuning tasks` lists tasks, shows what a model is given, and checks them."""

import dataclasses

import pytest
import seqio

import prompt_tuning.tasks  # noqa: F401  (registers the tasks)
from prompt_tuning.commands import tasks
from prompt_tuning.data.local_task import LocalTask
from prompt_tuning.errors import UserError
from prompt_tuning.runs import task_view

pytestmark = pytest.mark.tasks
TRAIN = "text\tlabel\na fine film\t1\na bad film\t0\n"


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Tables are cut at the terminal's width."""
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def local(tmp_path):
    """A task of files with the given lines."""

    def make(template="{prompt:0:2} review: {text} {prompt:2:5}", **lines):
        files = {}
        for split, text in lines.items():
            files[split] = str(tmp_path / f"{split}.tsv")
            (tmp_path / f"{split}.tsv").write_text(text)
        return LocalTask(files, template, "label", ("bad", "good"), vocabulary="mini")

    return make


def shown(capsys, *filters, **options) -> str:
    tasks.show_tasks(filters=filters, **options)
    return capsys.readouterr().out


def test_a_list_leaves_variants_out_unless_they_are_asked_for(capsys):
    assert task_view.names(["sst2", "v200"]) == ["glue_sst2_v200"]
    assert task_view.names(["mini", "taskless", "sst2", "v200"]) == [
        "mini_taskless_glue_sst2_v200"
    ]
    # A whole name is that task, though others hold it, too.
    assert task_view.names(["byt5_glue_sst2_v002"]) == ["byt5_glue_sst2_v002"]
    out = shown(capsys, "glue_sst2_v200")
    assert len(out.splitlines()) == 2
    assert out.split()[:5] == ["task", "vocabulary", "splits", "answers", "metrics"]
    assert "negative, positive" in out and "accuracy" in out


def test_a_narrow_terminal_cuts_no_word(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = shown(capsys)
    assert max(map(len, out.splitlines())) <= 80
    listed = [line for line in out.splitlines() if not line.startswith(" ")]
    assert listed == task_view.names([])
    for name in ("glue_ax_v002", "super_glue_wsc_and_dev_v102_simple"):
        _, _, after = out.partition(f"{name}\n")
        assert "vocabulary: t5; splits: " in after.splitlines()[0]
    # One that fits stays a table.
    assert shown(capsys, "glue_sst2_v200").split()[0] == "task"


def test_each_name_has_its_variants_pieces():
    every = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    for name in every:
        assert "".join(task_view.parted(name)) == name
    assert task_view.parted("t5_task_index_glue_rte_v002_examples") == (
        "t5_task_index_",
        "glue_rte_v002",
        "_examples",
    )


def test_a_preview_is_what_the_model_reads(capsys, local):
    out = shown(
        capsys,
        mixture_or_task_name="films",
        local_task=local(train=TRAIN),
        preview=1,
        prompt_length=5,
    )
    *_, head, target, counts = out.splitlines()
    assert head == "train: [prompt 0:2] review: a fine film [prompt 2:5]"
    assert target == "  -> good"
    ids = task_view.shown("films", "train", 1, 5, "prepend", None)
    tokens = next(iter(ids)).input_tokens
    assert counts == f"  {tokens} tokens with the prompt -> 2"


def test_a_preview_is_cut_as_training_cuts(local):
    tasks.show_tasks(mixture_or_task_name="films", local_task=local(train=TRAIN))
    whole, cut = (
        next(task_view.shown("films", "train", 1, 5, "prepend", lengths))
        for lengths in (None, {"inputs": 3, "targets": 4})
    )
    assert cut.input_tokens == 5 + 3 < whole.input_tokens
    assert cut.inputs.startswith("[prompt 0:2]") and "film" not in cut.inputs


def test_a_right_task_has_no_faults(capsys, local):
    out = shown(
        capsys,
        mixture_or_task_name="films",
        local_task=local(train=TRAIN, test="text\tlabel\nnice\t1\n"),
        lint=True,
        task_feature_lengths={"inputs": 32, "targets": 4},
    )
    assert out.splitlines()[-2:] == [
        "looked at 2 of train, 1 of test",
        "nothing is wrong with it",
    ]


def test_files_are_written_in_the_vocabulary_of_the_model_that_is_named(capsys, local):
    files = dataclasses.replace(local(train=TRAIN), vocabulary=None)
    with pytest.raises(UserError, match="name the model's in VOCABULARY"):
        tasks.show_tasks(mixture_or_task_name="films", local_task=files)
    out = shown(
        capsys,
        mixture_or_task_name="films",
        local_task=files,
        initial_checkpoint_path="embedded:t5_1_1_mini",
    )
    assert out.splitlines()[1].split()[:2] == ["films", "mini"]


def test_faults_are_listed_and_end_the_command(capsys, local):
    files = local(
        train="text\tlabel\nfine\t1\nfine\t1\n", test="text\tlabel\nfine\t1\n"
    )
    with pytest.raises(UserError, match="2 faults were found"):
        tasks.show_tasks(mixture_or_task_name="films", local_task=files, lint=True)
    out = capsys.readouterr().out
    assert "fault: no row of train has the label 'bad'" in out
    assert "fault: 1 of 1 different inputs of test are in train" in out
    assert "warning: 1 rows of train are there before already" in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"filters": ["glue_ssst2_v002"]}, "did you mean .*glue_sst2_v002"),
        ({"filters": ["nothing", "like", "it"]}, "no task or mixture is called"),
        ({"filters": ["glue"], "preview": 1}, "tasks are meant"),
        ({"mixture_or_task_module": "no.such"}, "does not import"),
        (
            {"filters": ["rotten_tomatoes"], "preview": 1, "split": "dev"},
            "has no split 'dev'",
        ),
    ],
)
def test_clumsy_input(options, said):
    with pytest.raises(UserError, match=said):
        tasks.show_tasks(**options)
