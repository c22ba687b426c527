# SPDX-License-Identifier: Apache-2.0
"""What a result has to say of where it was measured, and where it goes."""

import json
import os
import pathlib
import platform
import subprocess
from typing import Any

from prompt_tuning.commands import common


def describe() -> dict[str, Any]:
    """Machine, versions and commit."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores",
        "versions": common.versions(),
        "commit": commit.stdout.strip(),
    }


def publish(results: dict[str, Any], output: pathlib.Path | None) -> None:
    """Prints results with `describe`, and writes them if there is an output."""
    text = json.dumps({**results, **describe()}, indent=2)
    print(text)
    if output is not None:
        common.write_text(output, text + "\n")
