# SPDX-License-Identifier: Apache-2.0
"""What a result has to say of where it was measured."""

import os
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
