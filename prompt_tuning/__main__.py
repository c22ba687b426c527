# SPDX-License-Identifier: Apache-2.0
"""``python -m prompt_tuning``."""

import sys

from prompt_tuning.cli import main

if __name__ == "__main__":
    sys.exit(main())
