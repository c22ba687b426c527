# SPDX-License-Identifier: Apache-2.0
"""Compiled programs are kept, for whoever has not said where, and never in the way."""

import os
import pathlib
import resource
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest

import prompt_tuning as pt
from prompt_tuning.checkpoints import prompt_file
from prompt_tuning.devices import compilation_cache

# Ranks, and says what came out and how many programs came from the folder.
PROGRAM = """
import sys
import jax
hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None
)
import prompt_tuning as pt
base = pt.load(sys.argv[1])
print(pt.Predictor(base, sys.argv[2])(["good film", "bad"]))
print(len(hits))
"""


@pytest.fixture
def untold(monkeypatch, tmp_path):
    """JAX as of a user who has set nothing, and a folder for all caches."""
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    names += tuple(compilation_cache._JAXS_OWN)
    before = {name: getattr(jax.config, name) for name in names}
    for name in names:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    jax.config.update("jax_compilation_cache_dir", None)
    for name, (default, _) in compilation_cache._JAXS_OWN.items():
        jax.config.update(name, default)
    with warnings.catch_warnings():
        yield
    for name, value in before.items():
        jax.config.update(name, value)


def used():
    compilation_cache.use()
    return jax.config.jax_compilation_cache_dir


def test_a_folder_of_the_users_own_below_the_cache_folder(untold, tmp_path):
    place = pathlib.Path(used())
    assert place.is_relative_to(tmp_path / "caches" / "prompt_tuning")
    assert place.stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_compilation_cache_max_size == compilation_cache.MOST_BYTES


@pytest.mark.parametrize("given", ["", "not/absolute"])
def test_without_a_cache_folder_it_is_the_systems(given, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    place = compilation_cache.folder({"XDG_CACHE_HOME": given})
    assert place.is_relative_to(tmp_path / ".cache")
    monkeypatch.setattr("sys.platform", "darwin")
    place = compilation_cache.folder({})
    assert place.is_relative_to(tmp_path / "Library" / "Caches")


def test_what_jax_was_told_stays(untold, monkeypatch, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
    assert used() == str(tmp_path / "mine")
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    assert used() is None
    assert not (tmp_path / "caches").exists()
    jax.config.update("jax_enable_compilation_cache", True)
    used()
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 1.0


def test_a_folder_that_cannot_be_used_is_one_line(untold, tmp_path, capsys):
    def refused():
        assert used() is None
        (line,) = capsys.readouterr().err.splitlines()
        return line

    (tmp_path / "caches").write_text("a file")
    assert "Not a directory" in refused()
    (tmp_path / "caches").unlink()
    place = compilation_cache.folder()
    place.mkdir(parents=True)
    place.chmod(0o777)
    assert f"others can write to {place}" in refused()
    place.chmod(0o700)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (compilation_cache.ROOM // 2, limits[1]))
    try:
        assert f"cannot write to {place} (File too large)" in refused()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert used() == str(place)


def test_a_program_that_was_cut_off_is_compiled_again(untold):
    place = compilation_cache.folder()
    place.mkdir(parents=True)
    for name in ("whole-cache", "whole-atime", "half-cache"):
        (place / name).write_bytes(b"12345678")
    used()
    left = {path.name for path in place.glob("*-*")}
    assert left == {"whole-cache", "whole-atime"}


@pytest.mark.slow
def test_the_next_process_compiles_nothing_and_answers_the_same(
    tiny_checkpoint, tmp_path
):
    """Bit for bit; also after two that began at once, which wrote the same programs."""
    base = pt.load(tiny_checkpoint)
    rng = np.random.default_rng(0)
    array = rng.normal(scale=3, size=(3, base.config.emb_dim)).astype(np.float32)
    prompt = tmp_path / "prompt.safetensors"
    card = {"base_model": base.identity, "labels": ["good", "bad"]}
    prompt_file.save_prompt(prompt, array, card)
    environ = {k: v for k, v in os.environ.items() if "CACHE" not in k}
    environ |= {"XDG_CACHE_HOME": str(tmp_path / "caches"), "XLA_FLAGS": ""}
    # What the loader of a program has to say of the processor would be seen.
    environ["TF_CPP_MIN_LOG_LEVEL"] = "1"

    def start():
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, tiny_checkpoint, str(prompt)],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ended(process):
        told, errors = process.communicate()
        assert process.returncode == 0 and errors == "", errors
        answers, hits = told.splitlines()
        return answers, int(hits)

    (first, _), (second, _) = map(ended, [start(), start()])
    again, hits = ended(start())
    assert again == first == second and "'scores'" in first
    assert hits >= 1
