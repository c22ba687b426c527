# SPDX-License-Identifier: Apache-2.0
"""A card comes from anywhere: what is wrong with it shows before any of it is used."""

import json

import numpy as np
import pytest
import safetensors.numpy

from prompt_tuning.checkpoints import cards, prompt_file, prompt_formats
from prompt_tuning.data.template import Template
from prompt_tuning.errors import UserError

ARRAY = np.random.default_rng(0).standard_normal((4, 8), np.float32)
CARD = {
    "method": "prompt_tuning",
    "length": 4,
    "width": 8,
    "placement": "prepend",
    "template": "{sentence}",
    "task": "mine",
    "labels": ["no", "yes"],
    "vocabulary": "mini",
    "base_model": {"name": "tiny", "fingerprint": "ab"},
    "metric": {"accuracy": 100, "f1": None},
    "recipe": {"steps": 10, "own": [1, {"a": "b"}]},
    "of one's own": {"anything": True},
}


def nested(depth):
    value = "x"
    for _ in range(depth):
        value = [value]
    return value


def test_a_sound_card_comes_back():
    assert cards.check(CARD, "p") == CARD
    assert cards.check({}, "p") == {}


@pytest.mark.parametrize(
    "change, says",
    [
        ({"base_model": "x"}, "base_model"),
        ({"template": 5}, "template"),
        ({"template": "{a"}, "lone '{'"),
        ({"template": "{prompt:0:3000000000}{a}"}, "beyond any prompt"),
        ({"template": "{a}" * 100_000}, "at most 65536 characters"),
        ({"labels": "no"}, "labels"),
        ({"labels": ["no"]}, "labels"),
        ({"labels": ["no", "no"]}, "two are the same"),
        ({"labels": ["no", ""]}, "labels.1"),
        ({"labels": ["no", 1]}, "labels.1"),
        ({"labels": ["no", "good " * 3500]}, "labels.1"),
        ({"labels": [str(i) for i in range(5000)]}, "labels"),
        ({"placement": ["prepend"]}, "placement"),
        ({"metric": {"accuracy": float("inf")}}, "not finite"),
        ({"metric": {"accuracy": "high"}}, "metric.accuracy"),
        ({"metric": [1.0]}, "metric"),
        ({"task": "\ud800"}, "half a character"),
        ({"task": 5}, "task"),
        ({"own": {"\ud800": 1}}, "half a character"),
        ({"own": float("nan")}, "not finite"),
        ({"own": nested(20)}, "within one another"),
        ({"notes": "a note"}, "notes"),
        ({"length": True}, "length"),
        ({"length": 10**9}, "length"),
        ({"vocabulary": ["mini"]}, "vocabulary"),
        ({"vocabulary": "v" * 5000}, "vocabulary"),
    ],
)
def test_what_a_card_may_not_say(change, says, tmp_path):
    with pytest.raises(UserError) as caught:
        cards.check({**CARD, **change}, "a.safetensors")
    message = str(caught.value)
    assert message.startswith("a.safetensors has a damaged card: ")
    assert says in message and "\n" not in message and len(message) < 500
    # It is not written, either, and not read where somebody else wrote it.
    path = tmp_path / "p.safetensors"
    with pytest.raises((UserError, ValueError)):
        prompt_file.save_prompt(path, ARRAY, {**CARD, **change})
    assert not path.exists()
    metadata = {"card": json.dumps({**CARD, **change})}
    safetensors.numpy.save_file({"prompt": ARRAY}, path, metadata)
    with pytest.raises(UserError):
        prompt_formats.load(path)


def test_a_card_that_is_no_object_or_too_long(tmp_path):
    path = tmp_path / "p.safetensors"
    for text in (
        "[1]",
        "5",
        "{",
        '{"a": ' + "[" * 100_000,
        '"' + "a" * (1 << 21) + '"',
    ):
        safetensors.numpy.save_file({"prompt": ARRAY}, path, {"card": text})
        with pytest.raises(UserError, match="damaged card"):
            prompt_formats.load(path)


def test_slices_of_templates_are_bounded():
    assert len(Template.parse("{prompt:0:65536}{a}").parts[0].ids) == 65536
    for end in (65537, 3 * 10**9, 10**11):
        with pytest.raises(UserError, match="beyond"):
            Template.parse(f"{{prompt:0:{end}}}{{a}}")


@pytest.mark.parametrize("format", ["native", "peft"])
def test_every_flipped_bit_of_a_header_is_noticed_or_harmless(format, tmp_path):
    path = tmp_path / "p"
    prompt_formats.save(path, ARRAY, CARD, format)
    want, card = prompt_formats.load(path)
    file = path if path.is_file() else path / "adapter_model.safetensors"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    noticed = 0
    for bit in range(end * 8):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            array, found = prompt_formats.load(path)
        except UserError as error:
            assert "\n" not in str(error)
            noticed += 1
        else:
            np.testing.assert_array_equal(array, want)
            assert found == card, bit
    # What is harmless: the name of a checksum, the case of an escape.
    assert noticed > 0.97 * end * 8


def test_numbers_that_no_prompt_has(tmp_path):
    for value in (np.nan, np.inf, -np.inf):
        array = ARRAY.copy()
        array[1, 2] = value
        np.save(tmp_path / "p.npy", array)
        with pytest.raises(UserError, match="not finite"):
            prompt_formats.load(tmp_path / "p.npy")


def test_formats_without_checksums_say_so(tmp_path):
    np.save(tmp_path / "p.npy", ARRAY)
    _, card = prompt_formats.load(tmp_path / "p.npy")
    assert card["notes"] == [cards.NO_CHECKSUM]
    prompt_file.save_prompt(tmp_path / "p.safetensors", ARRAY, CARD)
    _, card = prompt_formats.load(tmp_path / "p.safetensors")
    assert "notes" not in card


def test_metrics_that_are_no_numbers_are_null():
    found = cards.finite_metrics({"a": np.float32(1), "b": float("nan")})
    assert found == {"a": 1.0, "b": None}
    assert cards.finite_metrics(None) == {}


def test_the_faults_that_were_found(shared):
    folder = shared / "faults"
    sound = ("prompt_card_ansi", "prompt_vocabulary_gs_url")
    for path in sorted(folder.glob("prompt_*.safetensors")):
        if path.stem in sound:
            prompt_formats.load(path)
            continue
        with pytest.raises(UserError) as caught:
            prompt_formats.load(path)
        assert path.name in str(caught.value) and "\n" not in str(caught.value)
