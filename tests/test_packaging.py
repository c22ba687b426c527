# SPDX-License-Identifier: Apache-2.0
"""What an installation holds and finds: a wheel, an editable one, this one."""

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile

import pytest

import prompt_tuning

ROOT = pathlib.Path(__file__).parents[1]
# Prints where an interpreter finds the package and its two folders from elsewhere.
WHERE = """
import importlib.resources, importlib.util, pathlib, prompt_tuning
configs = importlib.resources.files("prompt_tuning.configs")
assert (configs / "runs" / "train.gin").is_file(), configs
assert (configs / "models" / "t5_1_1_mini.gin").is_file(), configs
for name in ("tasks", "configs"):
    print(pathlib.Path(importlib.util.find_spec("prompt_tuning." + name).origin).parent)
    assert importlib.util.find_spec(name) is None, f"a top-level {name}"
print(pathlib.Path(prompt_tuning.__file__).parent)
"""


def run(*command, cwd: pathlib.Path, **environment: str) -> str:
    """Standard output of a command."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def find_folders(python, cwd: pathlib.Path, **environment: str) -> list[str]:
    """Where tasks, configs and the package lie for this interpreter."""
    return run(python, "-c", WHERE, cwd=cwd, **environment).split()


def copy_sources(to: pathlib.Path) -> pathlib.Path:
    """The files that packaging reads, so that builds leave nothing in the checkout."""
    skip = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("prompt_tuning", "configs", "tasks", "docs"):
        shutil.copytree(ROOT / name, to / name, ignore=skip)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, to / name)
    return to


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """A wheel, built from a source distribution that lies beside it."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = copy_sources(folder / "sources")
    # With the setuptools at hand.
    build = [sys.executable, "-m", "build", "--no-isolation"]
    run(*build, "--outdir", folder, cwd=sources)
    (path,) = folder.glob("*.whl")
    return path


def files_below(folder: pathlib.Path) -> set[str]:
    """Relative paths of a folder's files but for compiled modules."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_wheel_holds_everything_below_one_name(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    info = f"prompt_tuning-{prompt_tuning.__version__}.dist-info"
    assert tops == {"prompt_tuning", info}
    expected = {f"prompt_tuning/{name}" for name in files_below(ROOT / "prompt_tuning")}
    for folder in ("configs", "tasks"):
        inside = files_below(ROOT / folder)
        expected |= {f"prompt_tuning/{folder}/{name}" for name in inside}
    assert {name for name in names if name.startswith("prompt_tuning/")} == expected
    assert f"{info}/licenses/LICENSE" in names


def test_the_source_distribution_holds_the_documentation(wheel):
    (path,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"docs/{name}" for name in files_below(ROOT / "docs")} <= names


def test_an_installed_wheel_runs_from_anywhere(wheel, tmp_path):
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    run(*install, "--target", site, wheel, cwd=tmp_path)
    found = find_folders(sys.executable, tmp_path, PYTHONPATH=str(site))
    package = site / "prompt_tuning"
    assert found == [str(package / "tasks"), str(package / "configs"), str(package)]


def test_an_editable_installation_finds_the_folders_of_the_checkout(tmp_path):
    sources = copy_sources(tmp_path / "sources")
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    # The build backend comes from the environment of the tests.
    run(
        *[*install, "--no-deps", "--no-build-isolation", "--editable", sources],
        cwd=tmp_path,
        PYTHONPATH=os.pathsep.join(sys.path),
    )
    found = find_folders(python, tmp_path)
    expected = [sources / "tasks", sources / "configs", sources / "prompt_tuning"]
    assert found == [str(path) for path in expected]


def test_this_installation_finds_its_folders_from_anywhere(tmp_path):
    assert len(find_folders(sys.executable, tmp_path)) == 3


def test_metadata_of_this_installation():
    distribution = importlib.metadata.distribution("prompt-tuning")
    assert distribution.version == prompt_tuning.__version__
    (script,) = distribution.entry_points
    assert (script.name, script.value) == ("prompt-tuning", "prompt_tuning.cli:main")
    extras = set(distribution.metadata.get_all("Provides-Extra"))
    assert extras == {
        "energy",
        "tpu",
        "cuda",
        "plan",
        "demo",
        "serve",
        "hub",
        "metrics",
        "mlflow",
        "wandb",
        "parity",
        "docs",
        "dev",
    }


def test_dev_holds_what_the_demo_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(extras["demo"]) <= set(extras["dev"])


def test_changelog_names_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"\n## [{prompt_tuning.__version__}]" in changelog
