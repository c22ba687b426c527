# SPDX-License-Identifier: Apache-2.0
"""Groups of rows in training: the gap between them counts, or is refused."""

import json

import numpy as np
import pytest

from prompt_tuning import cli
from prompt_tuning.checkpoints import prompt_file


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Rows of two groups, one of which has the longer answers."""
    path = tmp_path_factory.mktemp("people") / "people.tsv"
    rows = ["a fine film\tf\tgood", "a dull film\tm\tbad", "a fine story\tf\tgood"]
    path.write_text("\n".join(["sentence\tsex\tlabel", *rows, rows[1]]) + "\n")
    return {"train": str(path), "validation": str(path)}


def test_a_run_takes_the_gap_into_account(train_words, people, tmp_path):
    """Tuned for one step each, from one start: the gap's gradient tells them apart."""
    found = {}
    for name, weight in (("with", 50.0), ("less", 1e-9)):
        folder = tmp_path / name
        words = train_words(
            TASK_FILES=people,
            MIXTURE_OR_TASK_NAME="test_people",
            GROUP_COLUMN="sex",
            GAP_WEIGHT=weight,
            MODEL_DIR=folder,
            TRAIN_STEPS=2,
        )
        assert cli.main(words) == 0
        known = json.loads((folder / "run.json").read_text())["run"]
        assert known["objective"]["gap_weight"] == weight
        found[name], _ = prompt_file.load_prompt(folder / "prompt.safetensors")
    assert np.abs(found["with"] - found["less"]).max() > 1e-3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"GAP_WEIGHT": 1.0}, "GAP_WEIGHT=1.0 is of groups: name the column"),
        ({"GAP_WEIGHT": -1.0, "GROUP_COLUMN": "sex"}, "must be a number of at least 0"),
        ({"GROUP_COLUMN": "sex"}, "does nothing in training without GAP_WEIGHT"),
        ({"GAP_WEIGHT": 1.0, "GROUP_COLUMN": "age"}, "GROUP_COLUMN='age' is no column"),
        (
            {"GAP_WEIGHT": 1.0, "GROUP_COLUMN": "sex", "PACK": True},
            "and PACK=True leaves",
        ),
        (
            {"GAP_WEIGHT": 1.0, "GROUP_COLUMN": "sex", "NUM_MICROBATCHES": 2},
            "and NUM_MICROBATCHES leaves no such rows",
        ),
        (
            {"GAP_WEIGHT": 1.0, "GROUP_COLUMN": "sex", "TRAIN_SPLIT": "validation"},
            "is of the rows of 'train', and TRAIN_SPLIT is 'validation'",
        ),
        (
            {"BALANCE": ["sex"], "TRAIN_SPLIT": "validation"},
            "BALANCE=['sex'] is of the rows of 'train', and TRAIN_SPLIT is",
        ),
        (
            {
                "GAP_WEIGHT": 1.0,
                "GROUP_COLUMN": "sex",
                "LOCAL_TASK": None,
                "MIXTURE_OR_TASK_NAME": "rotten_tomatoes",
            },
            "is a column of local files, and rotten_tomatoes is a registered task",
        ),
    ],
)
def test_groups_that_cannot_be_compared(
    values, message, train_words, people, tmp_path, capsys
):
    words = train_words(
        **{
            "TASK_FILES": people,
            "MIXTURE_OR_TASK_NAME": "test_people",
            "MODEL_DIR": tmp_path / "run",
            **values,
        }
    )
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
