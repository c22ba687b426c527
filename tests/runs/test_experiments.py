# SPDX-License-Identifier: Apache-2.0
"""Grids: which cells share a run, which rows they see, what a table makes of them."""

import pytest

from prompt_tuning.errors import UserError
from prompt_tuning.network.transformer import T5Config
from prompt_tuning.runs import experiments, member_specs, seed_summary
from prompt_tuning.runs.experiments import ModelTuning
from prompt_tuning.runs.settings import Base, Data, Settings, Tuning
from prompt_tuning.training import optimizers
from prompt_tuning.training.schedule import Schedule

SETTINGS = Settings(
    base=Base(config=T5Config(256, 32, 4, 2, 2, 8, 64), initial_checkpoint_path="base"),
    data=Data(mixture_or_task_name="t", task_feature_lengths={"inputs": 64}),
    tuning=Tuning(
        method="prompt_tuning", optimizer=optimizers.adafactor(0.1), prompt_length=20
    ),
    schedule=Schedule(30),
)
BOTH = ["prompt_tuning", "model_tuning"]


def runs_of(grid, seeds=(0, 1), apart=False):
    cells = experiments.cells(grid, seeds, SETTINGS)
    return experiments.runs(cells, SETTINGS, ModelTuning(0.002, 10), apart)


def test_prompts_share_a_run_unless_padding_would_cost_more():
    runs = runs_of([{"prompt_length": [1, 5, 20, 100, 150]}])
    lengths = [sorted(c.values["prompt_length"] for c in run.cells) for run in runs]
    # 64 + 20 <= 1.5 (64 + 1) < 64 + 100, and 64 + 150 <= 1.5 (64 + 100).
    assert lengths == [[1, 1, 5, 5, 20, 20], [100, 100, 150, 150]]
    specs = member_specs.specs(runs[0].settings)
    assert [spec.name for spec in specs] == [cell.name for cell in runs[0].cells]
    assert {spec.seed for spec in specs} == {0, 1}
    assert len(runs_of([{"prompt_length": [1, 5]}], apart=True)) == 4


def test_a_tuned_model_has_a_run_and_a_recipe_of_its_own():
    prompts, first, second = runs_of([{"method": BOTH}])
    assert len(prompts.cells) == 2 and prompts.settings.schedule.steps == 30
    for seed, run in enumerate((first, second)):
        (spec,) = member_specs.specs(run.settings)
        found = member_specs.identity(spec, {})
        assert (spec.seed, spec.method.result) == (seed, "model")
        assert found["learning_rate"] == 0.002
        assert found["optimizer"]["multiply_by_parameter_scale"] is True
        assert run.settings.schedule.steps == 10


def test_each_base_model_has_runs_and_sizes_of_its_own(tiny_checkpoint):
    there = str(tiny_checkpoint)
    grid = [{"base_model": [there, "embedded:t5_1_1_mini"], "method": BOTH}]
    found = {}
    for run in runs_of(grid, seeds=(0,)):
        base = run.settings.base
        (spec,) = member_specs.specs(run.settings)
        assert base.config.remat == SETTINGS.base.config.remat
        where = spec.method.result, base.initial_checkpoint_path
        found[where] = base.config.emb_dim
        (cell,) = run.cells
        row = experiments.described(cell)
        assert row["base_model"] == base.initial_checkpoint_path
        assert (row["parameters"] == 7_279_104) == (base.config.emb_dim == 192)
    tiny = found["prompt", there]
    assert tiny != 192
    assert found == {
        ("prompt", there): tiny,
        ("model", there): tiny,
        ("prompt", "embedded:t5_1_1_mini"): 192,
        ("model", "embedded:t5_1_1_mini"): 192,
    }
    with pytest.raises(UserError, match="base_model=3 must be a path"):
        runs_of([{"base_model": 3}])


def test_each_seed_has_examples_of_its_own_the_same_for_all_methods():
    prompts, *models = runs_of([{"examples": [8], "method": BOTH}])
    specs = member_specs.specs(prompts.settings)
    slices = ["train[0:8]", "train[8:16]"]
    assert [spec.data.train_split for spec in specs] == slices
    assert [run.settings.data.train_split for run in models] == slices


@pytest.mark.parametrize(
    ("grid", "seeds", "message"),
    [
        ([{"prompt_lenght": [1]}], (0,), "GRID cannot set 'prompt_lenght'"),
        ([{"seed": [1]}], (0,), "GRID has no seeds"),
        ([{}], (), r"SEEDS=\[\] must be"),
        ([{}], (1, 1), r"SEEDS=\[1, 1\] must be"),
        ([], (0,), "GRID names no prompt"),
        (
            [{"method": "model_tuning", "prompt_length": 5}],
            (0,),
            "GRID gives prompt_length to model_tuning",
        ),
    ],
)
def test_grids_that_are_none(grid, seeds, message):
    with pytest.raises(UserError, match=message):
        runs_of(grid, seeds)


def test_a_table_has_mean_spread_and_seeds():
    row = lambda length, seed, value: {
        "prompt_length": length,
        "method": "prompt_tuning",
        "seed": seed,
        "metrics": {} if value is None else {"accuracy": value},
        "run": {"name": "prompts_1"},
    }
    rows = [row(1, 0, 50.0), row(1, 1, 60.0), row(5, 0, 70.0), row(5, 1, None)]
    groups = seed_summary.summary(rows, ["accuracy"])
    assert seed_summary.table(groups) == [
        ["prompt length", "method", "accuracy", "seeds"],
        ["1", "prompt tuning", "55 ± 7.1", "2"],
        # One diverged.
        ["5", "prompt tuning", "70", "1"],
    ]
    assert seed_summary.markdown([["a", "b"], ["1", "2"]]) == (
        "| a | b |\n|---|---|\n| 1 | 2 |\n"
    )
