# SPDX-License-Identifier: Apache-2.0
"""Kinds and ranges of values, from annotations alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pytest

from prompt_tuning import values
from prompt_tuning.devices.partitioner import Submesh
from prompt_tuning.errors import UserError
from prompt_tuning.types import (
    FeatureLengths,
    LearningRate,
    PathText,
    PositiveInt,
    PromptLength,
    Rate,
)

LABELS = Mapping[str | int, str] | Sequence[str] | None


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        (int, [1, -3], [True, 1.0, "1", None]),
        (float, [1, 1.5, -1e300], [True, "1", None, float("nan"), float("inf")]),
        (bool, [True], [1, "True", None]),
        (str, ["", "a"], [1, None, b"a", ["a"]]),
        (PathText, ["a"], ["", None, 7]),
        (PositiveInt, [1], [0, -1, 2.5, True, 10**10]),
        (LearningRate, [0.3, 1], [0, -1, True, float("nan"), 1e30, "0.1"]),
        (Rate, [0, 0.5], [1, -0.1, "x"]),
        (PromptLength, [0, 100], [-1, 1.5, "x", None, 10**9, 1e9]),
        (FeatureLengths, [{"inputs": 8}], [{"inputs": 2.5}, {"inputs": 0}, {1: 8}, []]),
        (LABELS, [None, ["a"], {0: "a"}], [[1, 2], [["a"]], "ab", {"a": 1}, 3]),
        (Submesh, [(2, 2, 1, 1), [2, 2, 1, 1]], [(2, 2), (2, 2, 1, 0), 4]),
        (tuple[str, ...], [("a",), ["a", "b"]], ["a", (1,)]),
        (Literal["auto", "int8"], ["auto"], ["int3", 1, None]),
        (Callable[..., Any] | str | None, [print, "x", None], [1, ["x"]]),
        (Sequence[Mapping[str, Any]], [[{"a": 1}], []], [{}, [1], "x"]),
    ],
)
def test_kinds_and_ranges(annotation, good, bad):
    for value in good:
        assert values.fits(value, annotation), value
    for value in bad:
        assert not values.fits(value, annotation), value


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (PositiveInt, "a whole number from 1 to 2,147,483,647"),
        (LearningRate, "a number above 0 and at most 1,000"),
        (Rate, "a number of at least 0 and below 1"),
        (Literal["auto", "int8"], "'auto' or 'int8'"),
        (str | None, "a text, or None"),
        (PathText | None, "a text that is not empty, or None"),
        (tuple[str, ...], "a list, each item a text"),
    ],
)
def test_in_words(annotation, words):
    assert values.wanted(annotation) == words


def test_all_that_is_wrong_is_said_at_once_under_the_users_names():
    def train(*, steps: PositiveInt, rate: LearningRate, name: str): ...

    given = {"steps": 2.5, "rate": float("nan"), "name": "x" * 500}
    with pytest.raises(UserError) as error:
        values.check(train, given, str.upper)
    assert str(error.value) == (
        "STEPS=2.5 must be a whole number from 1 to 2,147,483,647; "
        "RATE=nan must be a number above 0 and at most 1,000"
    )
    with pytest.raises(UserError) as error:
        values.check(train, {"steps": "x" * 500})
    assert len(str(error.value)) < 200
