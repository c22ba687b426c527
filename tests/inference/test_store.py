# SPDX-License-Identifier: Apache-2.0
"""Prompts come and go; what lies on the device is what the host has."""

import json
import threading

import jax
import numpy as np
import pytest

from prompt_tuning.checkpoints import base_models, prompt_file
from prompt_tuning.errors import UserError
from prompt_tuning.inference.store import PromptStore, name_of
from prompt_tuning.inference.table import PromptTable
from prompt_tuning.network.transformer import T5Config

H = 16
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def source(tiny_checkpoint):
    return base_models.load(T5Config(8192, H, 2, 1, 1, 8, 32), tiny_checkpoint)


@pytest.fixture
def card(source):
    return {"base_model": source.identity, "vocabulary": "mini"}


def array(length):
    return RNG.normal(size=(length, H)).astype(np.float32)


def read(table, prompts):
    """The rows of a lease, as the network would look them up."""
    with table.lease(prompts) as lease:
        found = np.asarray(lease.array)
        return {key: found[rows] for key, rows in lease.rows.items()}


def check(table, prompts):
    for key, found in read(table, prompts).items():
        np.testing.assert_array_equal(found, prompts[key])


def test_a_table_holds_what_it_is_given_whatever_came_before():
    table = PromptTable(300, H)
    prompts = {i: array(int(n)) for i, n in enumerate(RNG.integers(1, 100, 40))}
    for _ in range(60):
        keys = RNG.choice(40, RNG.integers(1, 4), replace=False).tolist()
        check(table, {key: prompts[key] for key in keys})
        assert table.rows_in_use <= 300


def test_a_prompt_may_fill_the_table():
    table = PromptTable(100, H)
    check(table, {"whole": array(100)})
    check(table, {"a": array(50), "b": array(50)})
    assert table.rows_in_use == 100
    with pytest.raises(ValueError, match="101 positions in a table of 100"):
        read(table, {"a": array(50), "b": array(51)})


def rows_of(table, prompts, name):
    with table.lease({name: prompts[name]}) as lease:
        return lease.rows[name].tolist()


def test_the_least_recently_used_prompt_makes_room():
    table = PromptTable(100, H)
    prompts = {name: array(40) for name in "abc"}
    for name in "aba":
        read(table, {name: prompts[name]})
    rows = rows_of(table, prompts, "a")
    assert rows_of(table, prompts, "c") == rows_of(table, prompts, "c") != rows
    # The first is where it was, so it was the second that left.
    assert rows_of(table, prompts, "a") == rows
    assert table.rows_in_use == 80


def test_writing_compiles_nothing_new():
    table = PromptTable(512, H)
    read(table, {0: array(3)})
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name)
    )
    for key, length in enumerate((1, 20, 128, 129, 300, 511), start=1):
        read(table, {key: array(length)})
    assert not [name for name in compiled if "backend_compile" in name]


def test_programs_that_run_keep_the_table_they_were_given():
    """A lease's array may be used until the next; what was computed of it stays."""
    table = PromptTable(64, H)
    double = jax.jit(lambda table: 2 * table)
    first = {"a": array(64)}
    with table.lease(first) as lease:
        started, rows = double(lease.array), lease.rows["a"]
    for _ in range(5):
        read(table, {object(): array(64)})
    np.testing.assert_array_equal(np.asarray(started)[rows], 2 * first["a"])


def test_a_thousand_prompts_from_a_folder(tmp_path, source, card):
    arrays = {}
    for i, length in enumerate(RNG.integers(20, 101, 1000)):
        arrays[f"p{i}"] = array(int(length))
        prompt_file.save_prompt(tmp_path / f"p{i}.safetensors", arrays[f"p{i}"], card)
    store = PromptStore(source, 4096)
    assert store.load_folder(tmp_path) == {}
    assert set(store.names()) == set(arrays) and len(store) == 1000
    for name in RNG.choice(list(arrays), 200).tolist():
        prompt = store.get(name)
        check(store.table, {prompt: arrays[name]})


def test_names_come_from_files_and_runs():
    assert name_of("prompts/boolq.safetensors") == "boolq"
    assert name_of("boolq.v2.npy") == "boolq.v2"
    assert name_of("runs/first/prompt.safetensors") == "first"
    assert name_of("somewhere/encoder.prompt.prompt.prompt") == (
        "encoder.prompt.prompt.prompt"
    )


def test_a_folder_of_all_kinds(tmp_path, source, card):
    prompt_file.save_prompt(tmp_path / "ours.safetensors", array(3), card)
    prompt_file.save_prompt(tmp_path / "run/prompt.safetensors", array(4), card)
    (tmp_path / "run/config.gin").write_text("")
    other = {**card, "base_model": {"name": "other", "fingerprint": "0" * 64}}
    prompt_file.save_prompt(tmp_path / "other.safetensors", array(3), other)
    prompt_file.save_prompt(
        tmp_path / "wide.safetensors", np.zeros((3, 24), np.float32), card
    )
    changed = {**card, "vocabulary_fingerprint": "0" * 64}
    prompt_file.save_prompt(tmp_path / "words.safetensors", array(3), changed)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / ".hidden").write_text("left alone")
    whole = (tmp_path / "ours.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-3])
    (tmp_path / "ours").mkdir()
    prompt_file.save_prompt(tmp_path / "ours/prompt.safetensors", array(5), card)

    store = PromptStore(source, 64)
    refused = store.load_folder(tmp_path)
    assert set(store.names()) == {"ours", "run"}
    assert set(refused) == {"other", "wide", "words", "notes.txt", "cut", "ours"}
    files = {
        "other": "other.safetensors",
        "wide": "wide.safetensors",
        "words": "words.safetensors",
        "notes.txt": "notes.txt",
        "cut": "cut.safetensors",
    }
    for name, file in files.items():
        assert str(tmp_path / file) in refused[name]
        with pytest.raises(UserError, match="was refused"):
            store.get(name)
    assert "was tuned on other" in refused["other"]
    # The folder sorts before the file of the same name, so it has the name.
    assert "there is a prompt 'ours' already" in refused["ours"]
    assert len(store.get("ours").array) == 5
    # By force prompts of another model come in, of another width never.
    forced = PromptStore(source, 64, force=True)
    assert set(forced.load_folder(tmp_path)) == {"wide", "notes.txt", "cut", "ours"}
    assert set(forced.names()) == {"ours", "run", "other", "words"}


def test_refused_prompts(tmp_path, source, card):
    store = PromptStore(source, 10)
    store.add("a", array(3), card)
    for name, prompt, change, says in (
        ("a", array(3), {}, "already"),
        ("b", array(11), {}, "11 positions, the store 10"),
        ("b", array(3), {"base_model": {}}, "does not say which base model"),
        ("b", np.zeros((3, 8), np.float32), {}, "width 8"),
    ):
        with pytest.raises(UserError, match=says):
            store.add(name, prompt, {**card, **change})
    assert store.names() == ["a"]
    with pytest.raises(UserError, match="cannot read the folder"):
        store.load_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is empty"):
        store.load_folder(tmp_path / "empty")
    with pytest.raises(UserError, match="no prompt 'b'; did you mean ba"):
        store.add("ba", array(1), card)
        store.get("b")
    with pytest.raises(UserError, match="give it more"):
        PromptStore(source, 0)


def test_a_removed_prompt_serves_those_who_hold_it(source, card):
    store = PromptStore(source, 10)
    held = store.add("a", array(6), card)
    store.remove("a")
    with pytest.raises(UserError, match="no prompt 'a'"):
        store.get("a")
    with pytest.raises(UserError, match="no prompt 'a'"):
        store.remove("a")
    successor = store.add("a", array(6), card)
    for prompt in (held, successor, held):
        check(store.table, {prompt: prompt.array})


def test_the_digest_knows_every_number_and_name(source, card):
    def digest(*prompts):
        store = PromptStore(source, 10)
        for name, numbers, change in prompts:
            store.add(name, numbers, {**card, **change})
        return store.digest()

    a, b = array(2), array(3)
    same = digest(("a", a, {}), ("b", b, {}))
    assert digest(("b", b, {}), ("a", a, {})) == same
    others = [
        digest(("a", b, {}), ("b", a, {})),
        digest(("a", a, {})),
        digest(("a", a, {"labels": ["yes", "no"]}), ("b", b, {})),
    ]
    assert same not in others


def test_many_threads(source, card):
    """Prompts are added, leased and removed at once; no lease shows foreign rows."""
    store = PromptStore(source, 256)
    failures = []

    def work(worker):
        rng = np.random.default_rng(worker)
        try:
            for step in range(40):
                name = f"{worker}-{step}"
                prompt = store.add(
                    name, rng.normal(size=(rng.integers(1, 90), H)), card
                )
                check(store.table, {prompt: prompt.array})
                if step % 2:
                    store.remove(name)
                check(store.table, {prompt: prompt.array})
        except BaseException as error:  # noqa: BLE001  Raised in the main thread.
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(store) == 6 * 20


def test_cards_are_plain_json(source, card):
    store = PromptStore(source, 10)
    prompt = store.add("a", array(2), card)
    assert json.loads(json.dumps(prompt.card)) == card
    with pytest.raises(ValueError, match="read-only"):
        prompt.array[0] = 0
