# SPDX-License-Identifier: Apache-2.0
"""The code's architecture, read from its syntax trees: layers, sizes, docstrings."""

import ast
import graphlib
import pathlib
import re
import statistics
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Imports point down: a folder is a layer, and its modules import only what stands above
# it here and, without going round in a circle, one another. The package's root has
# modules at both ends: what all use, and the doors.
VOCABULARY = (
    "errors",
    "types",
    "dtypes",
    "values",
    "processes",
    "trees",
    "files",
    "report",
    "plots",
    "prompt_names",
)
FOLDERS = (
    "devices",
    "decoding",
    "network",
    "methods",
    "data",
    "tasks",
    "checkpoints",
    "training",
    "inference",
    "serving",
    "planning",
    "runs",
    "library",
    "commands",
    "command_line",
)
DOORS = ("config", "cli", "__main__", "t5x_adapter")
ORDER = (*VOCABULARY, *FOLDERS, *DOORS)
# TensorFlow costs seconds to load: only what reads data may import it, and beside that
# only what always needs data may import what imports it.
DATA = {
    "data.batching",
    "data.examples",
    "data.feature_converter",
    "data.split_lengths",
    "inference.evaluation",
    "runs.task_data",
    "runs.task_view",
    "t5x_adapter",
}
NEEDS_DATA = {"inference.prompt_evaluation", "runs.evaluations"}
TENSORFLOW = {"tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio"}
GIN = {"config", "command_line.gin_files"}
LONGEST_MODULE = 450


def modules() -> dict[str, pathlib.Path]:
    """Every installed module by its name below `prompt_tuning`; the root is ''."""
    found = {}
    for prefix, folder in [("", "prompt_tuning"), ("tasks", "tasks")]:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            parts = (prefix, *parts) if prefix else parts
            found[".".join(parts).removesuffix("__init__").rstrip(".")] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imported(nodes) -> set[str]:
    """Dotted names that the import statements among ``nodes`` bring in."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports in full"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                own = whole.removeprefix("prompt_tuning.")
                names.add(whole if own in MODULES else node.module)
    return names


def imports(name: str) -> set[str]:
    """All imports of a module, also those inside functions."""
    return imported(ast.walk(TREES[name]))


def imports_on_load(name: str) -> set[str]:
    """The imports that run as soon as the module is loaded."""
    return imported(TREES[name].body)


def own(names: set[str]) -> set[str]:
    """Keeps this package's modules, without the package's name."""
    prefix = "prompt_tuning."
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def top(names: set[str]) -> set[str]:
    """First parts of dotted names."""
    return {name.split(".")[0] for name in names}


def is_data(name: str) -> bool:
    """Whether the module may import TensorFlow."""
    return name in DATA or name == "tasks" or name.startswith("tasks.")


def layer(name: str) -> str:
    """The folder of a module, or the module itself where it lies in the root."""
    return name.split(".")[0]


def test_every_module_has_a_layer():
    assert {layer(name) for name in MODULES if name} == set(ORDER)


@pytest.mark.parametrize("name", sorted(set(MODULES) - {""}))
def test_imports_point_down(name):
    rank = ORDER.index(layer(name))
    up = {
        other
        for other in own(imports(name))
        if ORDER.index(layer(other)) > rank or other == name
    }
    assert not up, f"{name} must not import {sorted(up)}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_inside_a_folder_do_not_go_round(folder):
    inside = {name for name in MODULES if layer(name) == folder and name != folder}
    order = graphlib.TopologicalSorter({n: own(imports(n)) & inside for n in inside})
    order.prepare()  # raises where there is a circle


def test_the_package_itself_loads_only_the_standard_library():
    assert top(imports_on_load("")) <= sys.stdlib_module_names


@pytest.mark.parametrize("name", sorted(MODULES))
def test_tensorflow_stays_in_data_code(name):
    if not is_data(name):
        assert not top(imports(name)) & TENSORFLOW


@pytest.mark.parametrize("name", sorted(MODULES))
def test_gin_stays_in_the_command_line(name):
    if name not in GIN:
        assert "gin" not in top(imports(name))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module_is_short(name):
    assert len(MODULES[name].read_text().splitlines()) <= LONGEST_MODULE


def test_the_median_module_is_under_200_lines():
    lines = [len(path.read_text().splitlines()) for path in MODULES.values()]
    assert statistics.median(lines) < 200


def public_definitions(body):
    """Public functions and classes, and the methods that classes do not inherit."""
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        yield node
        if isinstance(node, ast.ClassDef) and not node.bases:
            yield from public_definitions(node.body)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_public_names_have_docstrings(name):
    tree = TREES[name]
    assert ast.get_docstring(tree), "say why the module exists"
    definitions = public_definitions(tree.body)
    assert not [node.name for node in definitions if not ast.get_docstring(node)]


def test_every_python_file_names_its_licence():
    folders = ("prompt_tuning", "configs", "tasks", "tests", "scripts", "benchmarks")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert paths
    for path in [ROOT / "setup.py", *paths]:
        lines = path.read_text().splitlines()
        first = lines[1] if lines[0].startswith("#!") else lines[0]
        assert first == "# SPDX-License-Identifier: Apache-2.0", path


def run_python(code: str) -> str:
    """Standard output of a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def names_of(path: pathlib.Path) -> set[str]:
    """What a module binds, wherever in it."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    definitions = (ast.FunctionDef, ast.ClassDef)
    return {
        *(node.name for node in nodes if isinstance(node, definitions)),
        *(node.id for node in nodes if isinstance(node, ast.Name)),
        *(alias.asname or alias.name for node in nodes for alias in names_in(node)),
    }


def names_in(node: ast.AST) -> list[ast.alias]:
    """The names of an import statement."""
    return node.names if isinstance(node, ast.Import | ast.ImportFrom) else []


# T5X's gin files begin with imports, in Python's words.
SCRIPTS = (
    *(
        path
        for name in ("benchmarks", "examples")
        for path in (ROOT / name).rglob("*.py")
    ),
    *(ROOT / "configs" / "t5x").glob("*.gin"),
)


@pytest.mark.parametrize(
    "path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_what_scripts_import_is_there(path):
    lines = path.read_text()
    if path.suffix == ".gin":
        lines = "\n".join(re.findall(r"^(?:from|import) .*", lines, re.MULTILINE))
    for node in ast.walk(ast.parse(lines)):
        home = getattr(node, "module", None) or ""
        if isinstance(node, ast.ImportFrom) and home.startswith("prompt_tuning"):
            home = home.removeprefix("prompt_tuning").removeprefix(".")
            for alias in node.names:
                whole = f"{home}.{alias.name}".removeprefix(".")
                assert whole in MODULES or alias.name in names_of(MODULES[home])


def test_importing_the_package_is_quick_and_light(record_property):
    start = time.monotonic()
    loaded = run_python("import sys, prompt_tuning; print(*sys.modules)").split()
    seconds = time.monotonic() - start
    print(f"import prompt_tuning: {seconds:.2f} s with the interpreter's start")
    record_property("import_seconds", seconds)
    # Far above the 0.1 s it takes, far below what JAX or TensorFlow would add on a
    # machine that is busy with other things.
    assert seconds < 10
    assert not set(loaded) & {*TENSORFLOW, "gin", "jax"}


def test_the_public_names_load_no_tensorflow():
    loaded = run_python(
        "import sys, prompt_tuning\n"
        "for name in prompt_tuning.__all__:\n"
        "    assert getattr(prompt_tuning, name) and name in dir(prompt_tuning)\n"
        "print(*sys.modules)"
    ).split()
    assert "jax" in loaded
    assert not set(loaded) & {*TENSORFLOW, "gin"}


def test_unknown_public_name():
    import prompt_tuning

    with pytest.raises(AttributeError, match="no attribute 'Promt'"):
        prompt_tuning.Promt  # noqa: B018


def test_only_data_code_loads_tensorflow():
    heavy = NEEDS_DATA | {"__main__"}
    light = [name for name in MODULES if name not in heavy | {""} and not is_data(name)]
    lines = [f"import prompt_tuning.{name}" for name in light]
    loaded = run_python("\n".join(["import sys", *lines, "print(*sys.modules)"]))
    assert not set(loaded.split()) & TENSORFLOW
