# SPDX-License-Identifier: Apache-2.0
"""The search among prompts in words: what it measures, keeps and says of its cost."""

import json

import numpy as np
import pytest

import prompt_tuning as pt
from prompt_tuning import cli
from prompt_tuning.library import prompt_design
from prompt_tuning.library.tuned_prompt import TunedPrompt

ROWS = [("a fine film", "good"), ("a dull film", "bad"), ("so {odd}", "bad")]
TEMPLATES = ["{text} It was", "Review: {text} All in all"]
WORDS = {"good": ["great", "fine"], "bad": ["terrible", "dull", "great"]}


@pytest.fixture(scope="module")
def search(base):
    return lambda **values: prompt_design.search(
        base,
        ROWS,
        **{
            "templates": TEMPLATES,
            "labels": ["good", "bad"],
            "verbalizers": WORDS,
            **values,
        },
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("design")


@pytest.fixture(scope="module")
def found(search, folder):
    return search(folder=folder)


def test_candidates_are_what_the_saved_prompt_of_each_answers(found, base, tmp_path):
    """All ways to choose the words, from one pass of each template."""
    assert len(found.candidates) == 2 * 5  # 'great' does not stand for both
    assert found.encoder_passes == 2 * 3 and found.decoder_passes == 2 * 3 * 4
    order = [(-one.accuracy, -one.log_likelihood) for one in found.candidates]
    assert order == sorted(order)
    card = found.prompt.card
    assert card["template"] == found.candidates[0].template
    for one in found.candidates[::3]:
        own = {"template": one.template, "verbalizers": [*one.verbalizers.values()]}
        prompt = TunedPrompt("p", found.prompt.array, {**card, **own})
        path = prompt.save(tmp_path / "words.safetensors")
        answers = pt.Predictor(base, path)([text for text, _ in ROWS])
        scores = [row["scores"][label] for row, (_, label) in zip(answers, ROWS)]
        assert np.log(scores).mean() == pytest.approx(one.log_likelihood, abs=1e-4)
        right = [row["answer"] == label for row, (_, label) in zip(answers, ROWS)]
        assert one.accuracy == pytest.approx(100 * np.mean(right))


def test_what_a_folder_knows_is_not_asked_again(found, search, folder):
    again = search(folder=folder, templates=[*TEMPLATES, "{text}"])
    assert again.encoder_passes == 3
    known = [one for one in again.candidates if one.template in TEMPLATES]
    assert known == list(found.candidates)


def test_means_favour_no_short_word(found, search, folder):
    """The words of one token and EOS are compared as before, up to a common factor."""
    mean = search(folder=folder, label_scores="mean")
    assert mean.encoder_passes == 0
    assert mean.prompt.card["label_scores"] == "mean"
    assert mean.candidates != found.candidates


def test_a_prompt_in_words_answers_on_the_command_line(
    found, base, tiny_checkpoint, tmp_path, capsys
):
    path = found.prompt.save(tmp_path / "words.safetensors")
    words = [f"--prompt_file={path}", f"--initial_checkpoint_path={tiny_checkpoint}"]
    assert cli.main(["infer", "--gin_file=models/tiny.gin", *words, "a fine film"]) == 0
    (wanted,) = pt.Predictor(base, path)(["a fine film"])
    assert json.loads(capsys.readouterr().out)["answer"] == wanted["answer"]
    words = ["eval", "--gin_file=models/tiny.gin", *words]
    words += ["--mixture_or_task_name=mini_glue_sst2_v002"]
    words += ["--task_feature_lengths={'inputs': 8, 'targets': 4}"]
    assert cli.main(words) == 2
    assert "answer rows with it by infer" in capsys.readouterr().err


def test_examples_before_a_text_are_no_columns():
    template = prompt_design.few_shot("{text} It was", ROWS[2:], between="\n")
    assert template == "so {{odd}} It was bad\n{text} It was"


def test_a_prompt_made_of_words_is_near_to_them(base):
    ids = base.vocabulary.encode("a dull film")
    rows = np.asarray(base.table, np.float32)[ids] * 3
    prompt = TunedPrompt("p", rows, {})
    assert prompt_design.nearest_words(prompt, base) == "a dull film"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"templates": "{text}"}, "must be a list of different texts"),
        ({"templates": ["{text}", "{text}"]}, "must be a list of different texts"),
        ({"templates": ["{prompt} {text}"]}, "has a place for a soft prompt"),
        ({"templates": ["no column"]}, "names no column"),
        ({"labels": None}, "give the answers to choose from"),
        ({"verbalizers": {"good": "fine"}}, "must have the words of good, bad"),
        ({"verbalizers": {"good": [], "bad": "x"}}, "give different words"),
        ({"verbalizers": {"good": "x", "bad": "x"}}, "stands for several labels"),
        (
            {"verbalizers": {k: [f"{k}{i}" for i in range(101)] for k in WORDS}},
            "10201 ways to choose the words",
        ),
        ({"label_scores": "max"}, "label_scores='max' must be 'sum'"),
    ],
)
def test_what_is_refused(search, values, message):
    with pytest.raises(pt.UserError, match=message):
        search(**values)


def test_a_damaged_card(found, tmp_path):
    card = {**found.prompt.card, "verbalizers": ["one"]}
    path = tmp_path / "words.safetensors"
    with pytest.raises(pt.UserError, match="not one word for each label"):
        TunedPrompt("p", found.prompt.array, card).save(path)
    with pytest.raises(pt.UserError, match="a prompt in words has no rows"):
        found.prompt.save(tmp_path / "peft", "peft")
    assert not path.exists()
