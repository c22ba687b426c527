# SPDX-License-Identifier: Apache-2.0
"""What a result has to say of where it was measured, and where it goes."""

import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from prompt_tuning import files, report


def describe(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Machine, versions (with those of other ``packages`` that took part), commit."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores",
        "processor": processor(),
        "versions": report.versions()
        | {name: metadata.version(name) for name in ("jaxlib", *packages)},
        "commit": commit.stdout.strip(),
    }


def processor() -> str:
    """The processor's name, where the system tells it."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return names[0].strip() if names else platform.processor()


def publish(
    results: dict[str, Any],
    output: pathlib.Path | None,
    packages: Sequence[str] = (),
) -> None:
    """Prints results with `describe`, and writes them if there is an output."""
    text = json.dumps({**results, **describe(packages)}, indent=2)
    print(text)
    if output is not None:
        files.write_text(output, text + "\n")
