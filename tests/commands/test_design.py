# SPDX-License-Identifier: Apache-2.0
"""``design``: prompts in words from files, by the command line."""

import json

import pytest

import prompt_tuning as pt
from prompt_tuning import cli


@pytest.fixture
def design(tiny_checkpoint, reviews, tmp_path):
    """Runs the command; its exit code."""
    path = tmp_path / "dev.tsv"
    path.write_text("sentence\tlabel\na grand film\tgood\nso dull\tbad\n")

    def run(*words, **flags):
        flags = {
            "initial_checkpoint_path": tiny_checkpoint,
            "task_files": {"train": reviews["train"], "validation": str(path)},
            "template": "{sentence} It was",
            "label_names": ["good", "bad"],
            "output_dir": tmp_path / "words",
            **flags,
        }
        given = [
            f"--{name}={value}" for name, value in flags.items() if value is not None
        ]
        files = ("models/tiny.gin", "tasks/local_file.gin")
        return cli.main(["design", *(f"--gin_file={f}" for f in files), *given, *words])

    return run


def results(folder):
    return json.loads((folder / "words" / "results.json").read_text())


def test_templates_and_words_are_compared(design, tmp_path, capsys, tiny_checkpoint):
    flags = {
        "templates": ["Review: {sentence}"],
        "verbalizers": {"good": ["great", "fine"], "bad": "dull"},
    }
    assert design(**flags) == 0
    found = results(tmp_path)
    assert len(found["candidates"]) == 4 and found["rows"] == {"validation": 2}
    assert (found["encoder_passes"], found["decoder_passes"]) == (4, 12)
    assert found["template"] == found["candidates"][0]["template"]
    assert "encoder passes: 4\ndecoder passes: 12" in capsys.readouterr().out
    prompt = pt.load_prompt(tmp_path / "words" / "prompt.safetensors")
    said = pt.Predictor(pt.load(tiny_checkpoint), prompt)([{"sentence": "a fine film"}])
    assert said[0]["answer"] in ("good", "bad")
    # The same command asks for nothing; one more template for that alone.
    flags["templates"] = ["Review: {sentence}", "Is it good? {sentence}"]
    assert design(**flags) == 0
    assert results(tmp_path)["encoder_passes"] == 2


def test_errors_make_the_next_prompt(design, tmp_path, capsys):
    assert design(search="errors", rounds=2, errors_shown=2) == 0
    found = results(tmp_path)
    assert found["before"]["template"] == "{sentence} It was"
    assert found["after"]["template"] == found["template"]
    for name, value in found["before"]["metrics"].items():
        assert found["gain"][name] == found["after"]["metrics"][name] - value
    assert 1 <= len(found["rounds"]) <= 2
    out = capsys.readouterr().out
    assert "the errors that cost most" in out and "before" in out
    assert design(search="errors", rounds=2, errors_shown=2) == 0
    assert results(tmp_path)["encoder_passes"] == 0


def test_errors_of_free_text_are_told_by_rouge(design, tmp_path):
    flags = {"label_names": None, "rounds": 1, "max_decode_length": 2}
    assert design(search="errors", **flags) == 0
    assert set(results(tmp_path)["gain"]) >= {"accuracy", "rouge1", "rougeLsum"}


def test_tokens_are_swapped_and_then_evaluated(design, tmp_path, capsys):
    flags = {"prompt_length": 2, "steps": 3, "candidates": 3, "batch_size": 4}
    assert design(search="tokens", template="{prompt} {sentence}", **flags) == 0
    found = results(tmp_path)
    assert found["gain"]["loss"] == (
        found["after"]["metrics"]["loss"] - found["before"]["metrics"]["loss"]
    )
    assert found["gain"]["loss"] <= 0 and len(found["tokens"]) == 2
    assert found["backward_passes"] == 3 * 4
    assert f"backward passes: {3 * 4}" in capsys.readouterr().out
    # What was found is a prompt of rows, and its own tokens are the nearest to it.
    path = tmp_path / "words" / "prompt.safetensors"
    flags = {"prompt_file": path, "template": None, "output_dir": tmp_path / "near"}
    assert design(search="nearest", **flags) == 0
    near = json.loads((tmp_path / "near" / "results.json").read_text())
    assert near["tokens"] == found["tokens"] and near["gain"] == {"accuracy": 0.0}
    assert near["template"] == "{prompt} {sentence}"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"template": None}, "no template: give TEMPLATE"),
        ({"label_names": None}, "SEARCH='templates' ranks labels"),
        ({"search": "luck"}, "SEARCH='luck'"),
        ({"rounds": 2}, "ROUNDS goes with SEARCH='errors'"),
        ({"search": "nearest"}, "give PROMPT_FILE"),
        ({"search": "tokens", "template": None}, "no template"),
        (
            {"search": "errors", "templates": ["{sentence}"]},
            "TEMPLATES goes with SEARCH='templates', and",
        ),
        (
            {"search": "errors", "verbalizers": {"good": ["a", "b"], "bad": "c"}},
            "have several for 'good'",
        ),
        ({"task_files": {"test": "x.tsv"}}, "TASK_FILES has no 'validation'"),
    ],
)
def test_refused(design, flags, says, capsys, tmp_path):
    assert design(**flags) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "words").exists()
