# SPDX-License-Identifier: Apache-2.0
"""The loop from errors to the next prompt: what it shows, compares, keeps and counts."""

import math

import numpy as np
import pytest

import prompt_tuning as pt
from prompt_tuning.data import text_metrics
from prompt_tuning.library import error_loop

TRAIN = [
    (f"a {word} film", label)
    for word, label in [
        ("fine", "good"),
        ("dull", "bad"),
        ("grand", "good"),
        ("flat", "bad"),
    ]
]
VALIDATION = [
    (f"{word} story", label)
    for word, label in [
        ("fine", "good"),
        ("dull", "bad"),
        ("slow", "bad"),
        ("odd", "good"),
    ]
]
TEMPLATE = "{text} It was"
OTHERS = ["Review: {text}", "{text} All in all", "Is it {text}?"]


@pytest.fixture(scope="module")
def refine(base):
    return lambda **values: error_loop.refine(
        base,
        TRAIN,
        VALIDATION,
        **{"template": TEMPLATE, "labels": ["good", "bad"], **values},
    )


def predicted(base, prompt, rows):
    return pt.Predictor(base, prompt)([text for text, _ in rows])


def test_scores_are_those_of_the_prompt_that_is_saved(refine, base):
    found = refine(propose=lambda template, errors: OTHERS, rounds=1)
    assert found.before.template == TEMPLATE
    scores = [found.before, *found.rounds[0].proposed]
    assert {one.template for one in scores} == {TEMPLATE, *OTHERS}
    best = max(scores, key=lambda one: one.value)
    assert found.after == best
    assert found.rounds[0].kept == (best.template != TEMPLATE)
    card = found.prompt.card
    assert card["template"] == best.template and card["metric"] == best.metrics
    said = predicted(base, found.prompt, VALIDATION)
    assert [row["answer"] for row in said] == list(best.answers)
    right = [row["scores"][target] for row, (_, target) in zip(said, VALIDATION)]
    np.testing.assert_allclose(best.costs, [-math.log(p) for p in right], rtol=1e-4)
    assert best.metrics["log_likelihood"] == pytest.approx(np.mean(np.log(right)))
    told = found.record()
    assert told["gain"]["accuracy"] == (
        best.metrics["accuracy"] - found.before.metrics["accuracy"]
    )


def test_the_costliest_errors_of_the_training_rows_are_shown(refine):
    shown = []

    def propose(template, errors):
        shown.append((template, errors))
        return ()

    found = refine(propose=propose, shown=2, rounds=3)
    # Nothing was proposed, so there is no second round.
    ((template, errors),) = shown
    assert template == TEMPLATE and list(found.rounds[0].errors) == list(errors)
    assert 1 <= len(errors) <= 2 and not found.rounds[0].kept
    assert found.after == found.before
    costs = [error.cost for error in errors]
    assert costs == sorted(costs, reverse=True)
    for error in errors:
        text, label = TRAIN[error.row]
        assert error.columns == {"text": text} and error.target == label
        assert error.answer != label and error.cost > math.log(2)


def test_worked_examples_stand_before_the_text():
    propose = error_loop.worked_examples("{text} It was", {"bad": "dull"})
    error = error_loop.Error(0, {"text": "so {odd}"}, "bad", "good", 2.0)
    (once,) = propose("{text} It was", [error])
    assert once == "so {{odd}} It was dull {text} It was"
    # What is shown already is not shown twice; another goes before it.
    other = error_loop.Error(1, {"text": "a fine film"}, "good", "bad", 1.0)
    assert propose(once, [error, other]) == [f"a fine film It was good {once}"]


def test_an_interrupted_loop_asks_for_nothing_twice(refine, tmp_path):
    whole = refine(folder=tmp_path, rounds=2)
    assert whole.encoder_passes > 0
    assert whole.decoder_passes == 2 * whole.encoder_passes
    again = refine(folder=tmp_path, rounds=2)
    assert (again.encoder_passes, again.decoder_passes) == (0, 0)
    assert again.record()["rounds"] == whole.record()["rounds"]
    one = next(tmp_path.glob("*.json"))
    one.unlink()
    assert 0 < refine(folder=tmp_path, rounds=2).encoder_passes <= 4
    # Without a folder, and of other words, all is asked for.
    assert refine(rounds=2).encoder_passes == whole.encoder_passes
    words = {"good": "great", "bad": "poor"}
    assert refine(folder=tmp_path, rounds=2, verbalizers=words).encoder_passes > 0


def test_free_text_is_compared_by_rouge(base):
    rows = [("a fine film", "a film that is fine"), ("a dull one", "one that is dull")]
    found = error_loop.refine(
        base,
        TRAIN,
        rows,
        template="{text}",
        propose=lambda template, errors: ["summarize: {text}"],
        max_answer_length=4,
        rounds=1,
    )
    said = [row["answer"] for row in predicted(base, found.prompt, rows)]
    want = text_metrics.rouge([target for _, target in rows], list(found.after.answers))
    assert {k: found.after.metrics[k] for k in want} == want
    if found.after.template == "{text}":
        # The prompt decodes more tokens than the loop did, from the same first ones.
        pairs = zip(said, found.after.answers, strict=True)
        assert all(whole.startswith(cut) for whole, cut in pairs)
    assert found.decoder_passes == found.encoder_passes


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"verbalizers": {"good": "fine"}},
            "one word of its own for each of good, bad",
        ),
        ({"verbalizers": {"good": "x", "bad": "x"}}, "one word of its own"),
        ({"labels": None, "verbalizers": {"good": "x"}}, "give labels, too"),
        ({"template": "{prompt} {text}"}, "has a place for a soft prompt"),
        ({"rounds": 0}, "rounds=0 must be a whole number, 1 or more"),
        ({"propose": lambda *_: ["{other}"]}, "must have the columns text"),
    ],
)
def test_refused(refine, values, says):
    with pytest.raises(pt.UserError, match=says):
        refine(**values)


def test_a_proposal_that_does_not_fit_is_said(refine, capfd):
    found = refine(propose=lambda *_: ["long " * 1500 + "{text}"], rounds=1)
    assert found.rounds[0].proposed == [] and found.after == found.before
    out, err = capfd.readouterr()
    assert "left out a template of 7506 characters" in out + err
