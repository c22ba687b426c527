# SPDX-License-Identifier: Apache-2.0
"""Nothing but the output is written, and of a killed writer nothing stays."""

import os
import stat
import subprocess
import sys

import numpy as np
import pytest

from prompt_tuning import files
from prompt_tuning.errors import UserError


def write(path, text="new"):
    with files.replacing(path) as temporary:
        temporary.write_text(text)


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_a_device_or_a_pipe_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for path in (tmp_path / "pipe", tmp_path / "link", "/dev/full", "/dev/stdout", "-"):
        with pytest.raises(UserError, match="no file that can be replaced"):
            write(path)
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    code = (
        "import os, sys\n"
        "from prompt_tuning import files\n"
        "with files.replacing(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "config.gin")], check=False
    )
    assert killed.returncode == -9
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".config.gin.")
    with files.replacing(tmp_path / "other") as temporary:
        temporary.write_text("whole")
        # One that is being written is left alone, also by those who write beside it.
        files.remove_abandoned(tmp_path)
        assert os.listdir(tmp_path) == [temporary.name]
    assert os.listdir(tmp_path) == ["other"]


def test_another_machines_leftover_stays_for_a_day(tmp_path):
    left = tmp_path / ".a.00000000-1-12345678.tmp"
    left.mkdir()
    files.remove_abandoned(tmp_path)
    assert left.exists()
    os.utime(left, (0, 0))
    files.remove_abandoned(tmp_path)
    assert not left.exists()


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_modes_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write(tmp_path / "text")
        files.write(tmp_path / "tensors", {"a": np.zeros(3, np.float32)}, {})
    finally:
        os.umask(before)
    for name in ("text", "tensors"):
        assert stat.S_IMODE(os.stat(tmp_path / name).st_mode) == mode


def test_an_output_is_known_by_its_inode(tmp_path):
    (tmp_path / "in").write_text("data")
    (tmp_path / "folder").symlink_to(tmp_path)
    os.link(tmp_path / "in", tmp_path / "hard")
    (tmp_path / "soft").symlink_to("in")
    files.refuse_same([tmp_path / "in", None], [tmp_path / "out", tmp_path / "no/in"])
    for name in ("in", "hard", "soft", "folder/in"):
        with pytest.raises(UserError, match="which is read"):
            files.refuse_same([tmp_path / "in"], [tmp_path / name])


def test_streams(tmp_path, capfdbinary):
    for path in ("-", "/dev/stdout", "/dev/fd/1"):
        assert files.is_stream(path)
        with files.stream(path) as output:
            output.write(b"text\n")
    assert capfdbinary.readouterr().out == b"text\n" * 3
    assert not files.is_stream(tmp_path / "new")
    with (
        pytest.raises(UserError, match=r"cannot write to /dev/full: No space left"),
        files.stream("/dev/full") as output,
    ):
        output.write(b"text\n" * 10_000)
