# SPDX-License-Identifier: Apache-2.0
"""The command line asks for huge pages, once, and overrides nobody."""

import os
import subprocess
import sys

import pytest

from prompt_tuning.devices import huge_pages

ASKS = "glibc.malloc.hugetlb=1"
# Takes 64 MiB after a restart, and says under which variable and with how many faults.
PROGRAM = """
from prompt_tuning.devices import huge_pages
huge_pages.restart()
import os, resource, sys
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
taken = bytearray(1 << 26)
taken[::4096] = bytes(1 << 14)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), faults, *sys.argv[1:])
"""


@pytest.mark.parametrize(
    "given, made",
    [
        (None, ASKS),
        ("", ASKS),
        ("glibc.malloc.arena_max=2", f"glibc.malloc.arena_max=2:{ASKS}"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
        (ASKS, ASKS),
    ],
)
def test_the_environment_keeps_what_it_has(given, made):
    environ = {"HOME": "/x"} | ({} if given is None else {"GLIBC_TUNABLES": given})
    asked = huge_pages.environment(environ)
    assert asked == {"HOME": "/x", "GLIBC_TUNABLES": made}


def run(**variables):
    environ = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "an argument", "--flag"],
        env=environ | variables,
        stdout=subprocess.PIPE,
        text=True,
    )
    pid, tunables, faults, *rest = process.communicate()[0].split()
    assert process.returncode == 0
    assert int(pid) == process.pid and rest == ["an", "argument", "--flag"]
    return tunables, int(faults)


def test_a_program_starts_itself_anew_with_huge_pages():
    if not huge_pages.on_request():
        pytest.skip("this system has no huge pages for those who ask")
    small = run(GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    huge = run()
    assert small[0] == "glibc.malloc.hugetlb=0" and huge[0] == ASKS
    assert small[1] > 16_000 and huge[1] < 4_000


@pytest.mark.parametrize("text", ["always [madvise] never", None])
@pytest.mark.parametrize("library", [("glibc", "2.34"), ("glibc", "2.41"), ("", "")])
def test_only_where_asking_helps(monkeypatch, tmp_path, text, library):
    setting = tmp_path / "enabled"
    if text:
        setting.write_text(text)
    monkeypatch.setattr(huge_pages, "SETTING", setting)
    monkeypatch.setattr("platform.libc_ver", lambda: library)
    assert huge_pages.on_request() == (bool(text) and library[1] == "2.41")
