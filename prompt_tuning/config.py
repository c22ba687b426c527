# SPDX-License-Identifier: Apache-2.0
"""gin for the command line: files in any order, errors in one line.

gin is read here and in `cli` alone; everything below takes plain arguments.
"""

import ast
import copy
import difflib
import importlib.util
import json
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import gin
import optax

from prompt_tuning import decoding
from prompt_tuning import files as own_files
from prompt_tuning.commands import evaluate, export, infer, plan, pretrain, train
from prompt_tuning.data.local_task import LocalTask
from prompt_tuning.devices.partitioner import Partitioner
from prompt_tuning.errors import UserError
from prompt_tuning.network.transformer import T5Config
from prompt_tuning.runs import settings
from prompt_tuning.training import optimizers, prompt_starts
from prompt_tuning.training.schedule import Schedule

# Everything a gin file may name.
CONFIGURABLES: tuple[Callable[..., Any], ...] = (
    train.train,
    evaluate.evaluate,
    infer.infer,
    export.export_model,
    pretrain.pretrain,
    plan.plan,
    settings.Settings,
    settings.Base,
    settings.Data,
    settings.Tuning,
    settings.Objective,
    Schedule,
    T5Config,
    optimizers.adafactor,
    optimizers.adamw,
    optimizers.learning_rate_schedule,
    decoding.Greedy,
    decoding.Sampling,
    decoding.Beam,
    LocalTask,
    Partitioner,
    prompt_starts.random_init,
    prompt_starts.sampled_vocab_init,
    prompt_starts.class_labels_init,
    prompt_starts.text_init,
    prompt_starts.saved_init,
)
CONFIGURABLE: dict[str, Callable[..., Any]] = {
    fn.__name__: gin.external_configurable(fn) for fn in CONFIGURABLES
}
# The function that each command runs, by the name that gin files use.
FUNCTIONS = {
    "train": "train",
    "eval": "evaluate",
    "infer": "infer",
    "export": "export_model",
    "pretrain": "pretrain",
    "plan": "plan",
}

CONFIG_FILE = "config.gin"
_MACRO = re.compile(r"^([A-Z][A-Z0-9_]*)\s*=")
_REFERENCE = re.compile(r"%([A-Z][A-Z0-9_]*)")
# What may stand for a value inside a list or a dict.
_CONFIGURABLE = re.compile(r"@[A-Za-z_][\w./]*(\(\))?|%[A-Za-z_]\w*")
LEARNING_RATE = "LEARNING_RATE"
_NO_RATE = UserError(
    "PROMPTS give a learning_rate, but the optimizer uses no LEARNING_RATE: take it for "
    "the rate of adafactor or adamw, as the files in methods/ do"
)


def configs_folder() -> pathlib.Path:
    """The folder of the configs that come with the package."""
    spec = importlib.util.find_spec("prompt_tuning.configs")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the package's configs are missing; install prompt-tuning anew")
    return pathlib.Path(next(iter(spec.submodule_search_locations)))


def find(name: str, search_paths: Sequence[str]) -> pathlib.Path:
    """A gin file by path, or below one of the search paths or the package's configs.

    Raises:
      UserError: no such file; names near to it are listed.
    """
    shipped = configs_folder()
    relative = name.removeprefix("configs/")
    candidates = [pathlib.Path(name)]
    candidates += [pathlib.Path(path) / name for path in search_paths]
    candidates += [shipped / relative]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted(str(p.relative_to(shipped)) for p in shipped.rglob("*.gin"))
    near = difflib.get_close_matches(relative, known, n=3, cutoff=0.4) or known[:3]
    raise UserError(f"no gin file {name}; did you mean {', '.join(near)}?")


def binding(text: str) -> str:
    """``NAME=value`` as gin wants it: a value that gin cannot read becomes a string.

    >>> binding("MODEL_DIR=/tmp/run"), binding("TRAIN_STEPS=10")
    ("MODEL_DIR = '/tmp/run'", 'TRAIN_STEPS = 10')

    Raises:
      UserError: there is no '='.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--gin.{text} lacks a value: write --gin.{text}=VALUE")
    name, value = name.strip(), value.strip()
    if not (_is_literal(value) or _is_literal(_CONFIGURABLE.sub("None", value))):
        value = repr(value)
    return f"{name} = {value}"


def _is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return False
    return True


def parse(
    files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str]
) -> None:
    """Reads files, then bindings, which win over them.

    Raises:
      UserError: a file, a name or a value is wrong, two files define the same macro, or
        a macro is left without a value.
    """
    gin.clear_config()
    texts = []
    defined: dict[str, str] = {}
    for name in files:
        path = find(name, search_paths)
        text = path.read_text()
        texts.append(text)
        for line in text.splitlines():
            if match := _MACRO.match(line):
                macro = match[1]
                if macro in defined and defined[macro] != str(path):
                    raise UserError(
                        f"both {defined[macro]} and {path} define {macro}; use one file "
                        "of each kind (models, methods, prompts, runs)"
                    )
                defined[macro] = str(path)
    lines = [binding(text) for text in bindings]
    used = set(_REFERENCE.findall("\n".join(_without_comments([*texts, *lines]))))
    for line in lines:
        macro = _MACRO.match(line)
        if macro and macro[1] not in used:
            near = difflib.get_close_matches(macro[1], sorted(used), n=3, cutoff=0.6)
            hint = f"did you mean {', '.join(near)}?" if near else "no file uses it"
            raise UserError(f"--gin.{macro[1]} sets nothing: {hint}")
        if macro:
            defined[macro[1]] = "the command line"
    missing = sorted(used - set(defined))
    if missing:
        wanted = " ".join(f"--gin.{name}=..." for name in missing)
        raise UserError(f"not set: {wanted}")
    try:
        gin.parse_config([*texts, *lines])
    except Exception as error:
        raise UserError(f"gin: {own_files.first_line(error)}") from error


def with_run_file(
    command: str, files: Sequence[str], search_paths: Sequence[str]
) -> list[str]:
    """Adds the command's file of runs/ unless one of ``files`` does its work.

    A file does that which says what network the command runs: one's own run file, or
    the ``config.gin`` that an earlier run wrote.
    """
    line = re.compile(rf"^({FUNCTIONS[command]}|Base)\.config\s*=", re.MULTILINE)
    if any(line.search(find(name, search_paths).read_text()) for name in files):
        return list(files)
    return [*files, f"runs/{command}.gin"]


def operative_config() -> str:
    """What the run used, as a gin file that gives the same run."""
    return gin.operative_config_str()


@gin.configurable
def optimizer_at(learning_rate: float) -> optax.GradientTransformation:
    """The optimizer of a training run as if LEARNING_RATE had this value.

    Raises:
      UserError: no value of the configuration is made of LEARNING_RATE.
    """
    key = f"{LEARNING_RATE}/macro.value"
    try:
        usual = gin.query_parameter(key)
    except ValueError:
        raise _NO_RATE from None
    # To copy what is bound to a parameter is how gin makes the value of it.
    make = lambda: copy.deepcopy(gin.query_parameter("Tuning.optimizer"))
    gin.bind_parameter(key, learning_rate)
    try:
        optimizer = make()
        text = gin.operative_config_str()
    finally:
        gin.bind_parameter(key, usual)
        # What was used last is what a run's configuration is said to be.
        make()
    if f"\n{LEARNING_RATE} = {learning_rate!r}\n" not in text:
        raise _NO_RATE
    return optimizer


def _without_comments(texts: Sequence[str]) -> list[str]:
    return [line.split("#", 1)[0] for text in texts for line in text.splitlines()]


def run(command: str, texts: Sequence[str] | None = None) -> None:
    """Runs a command with the parsed values and prints what it returns.

    Raises:
      UserError: a file of a kind that the command needs is missing.
    """
    needed = {"T5Config.vocab_size": "models/t5_1_1_mini.gin"}
    if command in ("train", "plan"):
        needed["Tuning.method"] = "methods/prompt_tuning.gin"
    for name, example in needed.items():
        try:
            gin.query_parameter(name)
        except ValueError as error:
            kind = example.split("/")[0]
            raise UserError(
                f"no file of {kind}/ was given: add one, e.g. --gin_file={example}"
            ) from error
    function = CONFIGURABLE[FUNCTIONS[command]]
    if command == "infer":
        rows = function(texts=tuple(texts or ()))
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
        return
    if command == "plan":
        # A method file describes the run of `train`, whose step is planned.
        for name in ("method", "optimizer", "prompt_length"):
            gin.bind_parameter(f"plan.{name}", gin.query_parameter(f"Tuning.{name}"))
        print(plan.table(function()))
        return
    if command == "export":
        function()
        return
    results = function(
        on_start=lambda folder: own_files.write_text(
            folder / CONFIG_FILE, operative_config()
        )
    )
    print(json.dumps(results, indent=2, ensure_ascii=False))
