# SPDX-License-Identifier: Apache-2.0
"""Where the package's folders lie; all metadata is in pyproject.toml."""

import setuptools

# Both lie at the top of the repository, where users look for them, and are installed
# inside the package, so that no module called `tasks` or `configs` lands beside it.
FOLDERS = {"prompt_tuning.configs": "configs", "prompt_tuning.tasks": "tasks"}

setuptools.setup(
    packages=[*setuptools.find_packages(include=["prompt_tuning*"]), *FOLDERS],
    package_dir=FOLDERS,
)
