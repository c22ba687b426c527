# SPDX-License-Identifier: Apache-2.0
"""Pages that no file of docs/ holds: the README, and one for every module.

docs/ is written to be read on GitHub, so its links may lead to any file of the
repository; here those that leave the site become plain text.
"""

import pathlib
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parent
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)\s]+)\)")


def on_files(files, config):
    """Adds the README as the first page and the reference of every module."""
    files.append(File.generated(config, "index.md", content=_readme()))
    for name, text in _modules().items():
        files.append(File.generated(config, f"api/{name}.md", content=text))
    return files


def on_nav(nav, config, files):
    """A document that is in no section of the navigation is an error."""
    missing = {file.src_uri for file in files.documentation_pages() if not file.page}
    if missing:
        raise ValueError(f"mkdocs.yml does not name {sorted(missing)}")
    return nav


def on_config(config):
    """Puts the modules into the navigation, a section for each folder."""
    sections: dict[str, list[str]] = {}
    for name in _modules():
        folder, _, _ = name.rpartition(".")
        sections.setdefault(folder, []).append(f"api/{name}.md")
    (code,) = (entry["Code"] for entry in config["nav"] if "Code" in entry)
    code[-1] = {"Reference": [{folder: pages} for folder, pages in sections.items()]}
    return config


def on_page_markdown(markdown, page, config, files):
    """Takes links out that lead to files which are no pages."""
    folder = pathlib.PurePosixPath(page.file.src_uri).parent

    def kept(match: re.Match) -> str:
        target = str(folder / match[2].partition("#")[0])
        return match[0] if files.get_file_from_path(target) else match[1]

    return LINK.sub(kept, markdown)


def _readme() -> str:
    """README.md with its links as they are from within docs/."""
    text = (ROOT / "README.md").read_text()
    return text.replace("](docs/", "](")


def _modules() -> dict[str, str]:
    """The page of every module with a docstring's worth of public names."""
    pages = {}
    for path in sorted((ROOT / "prompt_tuning").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__main__":
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        pages[name] = f"# {name}\n\n::: {name}\n"
    return pages
