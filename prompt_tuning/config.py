# SPDX-License-Identifier: Apache-2.0
"""gin for the command line: what files may name is registered, checked and run.

gin is used here and in `command_line.gin_files` alone; everything below takes plain
arguments.
"""

import copy
import dataclasses
import functools
import inspect
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gin
import optax

from prompt_tuning import files, report, values
from prompt_tuning.checkpoints import base_models, formats, prompt_formats
from prompt_tuning.command_line.configuration import Configuration
from prompt_tuning.command_line.gin_files import Binding, Reference
from prompt_tuning.command_line.table import COMMANDS, CONFIGURABLES, load
from prompt_tuning.errors import UserError
from prompt_tuning.training.optimizers import rates_around
from prompt_tuning.types import LearningRate, LearningRates

LEARNING_RATE = "LEARNING_RATE"
# What stands for rates around the method's own, and where rates to try go.
AUTO, RATES = "auto", "Settings.rates"
_NO_RATE = UserError(
    "PROMPTS give a learning_rate, but the optimizer uses no LEARNING_RATE: take it for "
    "the rate of adafactor or adamw, as the files in optimizers/ do"
)
# What stands where the sizes of a model are wanted. A file that gives one gives all.
_SIZES, _ONE_SIZE = Reference("T5Config", evaluate=True), "T5Config.vocab_size"
# The parameter beside them that says which model it is.
_CHECKPOINT = "initial_checkpoint_path"


class _Text(io.StringIO):
    """A gin text with the name that errors shall give it."""

    def __init__(self, text: str, name: str):
        super().__init__(text)
        self.name = name


@functools.cache
def configurable(name: str) -> Callable[..., Any]:
    """The function that gin files call by this name, registered when first asked for.

    Whatever gin hands it is checked against its annotations (see `values`).
    """
    function = load(CONFIGURABLES[name])

    @functools.wraps(function, updated=())
    def checked(*args, **kwargs):
        given = inspect.signature(function).bind_partial(*args, **kwargs)
        values.check(
            function, given.arguments, lambda parameter: _said_as(f"{name}.{parameter}")
        )
        return function(*args, **kwargs)

    return gin.external_configurable(checked, name, module=function.__module__)


# What gin holds came from here; gin itself is global, too.
_parsed = Configuration(())


def _said_as(target: str) -> str:
    """What the user calls a parameter; its bare name where no file speaks of it."""
    known = target in _parsed.bound
    return _parsed.said_as(target) if known else target.rpartition(".")[2]


def parse(configuration: Configuration) -> None:
    """Gives gin the values of a run.

    Raises:
      UserError: a name or a value is wrong.
    """
    global _parsed
    gin.clear_config()
    configuration = _with_rates(configuration)
    _parsed = configuration
    for name in configuration.names() & set(CONFIGURABLES):
        configurable(name)
    for name in sorted(configuration.names() & set(CONFIGURABLES)):
        literals = configuration.literals(name)
        if literals.get(_CHECKPOINT, "") is None:
            del literals[_CHECKPOINT]  # `run` looks for it
        # What gin evaluates is checked when it has been; a run would begin before.
        values.check(
            load(CONFIGURABLES[name]),
            literals,
            lambda parameter, name=name: _said_as(f"{name}.{parameter}"),
        )
    for text, source in configuration.texts:
        try:
            gin.parse_config(_Text(text, source))
        except Exception as error:
            message = files.first_line(error)
            raise UserError(f"{source}: {message}") from error


def _with_rates(configuration: Configuration) -> Configuration:
    """The same where rates to try stand apart from the rate that a file brings.

    Raises:
      UserError: they are no rates, or no file brings one.
    """
    said = configuration.value(LEARNING_RATE)
    if said != AUTO and not isinstance(said, list | tuple):
        return configuration
    if configuration.bound.get("train.settings") is None:
        raise UserError(
            f"{LEARNING_RATE}={said!r} is for train, which tries rates: give a number"
        )
    usual = [
        binding.value
        for file in configuration.files
        for binding in file.bindings
        if binding.target == LEARNING_RATE and values.fits(binding.value, LearningRate)
    ]
    if not usual:
        raise UserError(
            f"{LEARNING_RATE}={said!r} needs a file that brings a number: take one of "
            "methods/"
        )
    rates = rates_around(usual[-1]) if said == AUTO else tuple(said)
    if not values.fits(rates, LearningRates) or len(set(rates)) < max(2, len(rates)):
        raise UserError(
            f"{LEARNING_RATE}={said!r} must be a number, {AUTO!r}, or a list of several "
            "different numbers above 0 to choose from"
        )
    added = {LEARNING_RATE: usual[-1], RATES: rates}
    bindings = [Binding(name, value, AUTO) for name, value in added.items()]
    texts = [f"{name} = {value!r}" for name, value in added.items()]
    return dataclasses.replace(
        configuration,
        line=(*configuration.line, *bindings),
        line_texts=(*configuration.line_texts, *texts),
    )


def operative_config() -> str:
    """What the run used, as a gin file that gives the same run."""
    return gin.operative_config_str()


def optimizer_at(learning_rate: LearningRate) -> optax.GradientTransformation:
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


def run(command: str, given: Mapping[str, Any]) -> Any:
    """Runs a command with the parsed values.

    Args:
      command: its name.
      given: what was said on the line beside macros.

    Raises:
      UserError: a value is missing or wrong, or the command refuses its task.
    """
    function = configurable(COMMANDS[command].configurable)
    for target, binding in _parsed.bound.items():
        if binding.value == _SIZES:
            _find_model(target.rpartition(".")[0], given.get("prompt_files", ()))
    offered = {}
    if "on_start" in inspect.signature(function).parameters:
        offered["on_start"] = lambda folder: files.write_text(
            folder / report.CONFIG_FILE, operative_config()
        )
    return function(**given, **offered)


def _find_model(name: str, prompts: Sequence[str]) -> None:
    """Binds the checkpoint that a prompt names, and sizes that no file gives.

    Args:
      name: of the configurable that takes the sizes, and the checkpoint beside them.
      prompts: files of prompts on the line, if the command takes them there.

    Raises:
      UserError: nothing says which model it is.
    """
    has_sizes = _parsed.value(_ONE_SIZE) is not None
    function = load(CONFIGURABLES[name])
    if has_sizes and values.accepts(function, _CHECKPOINT, None):
        return
    checkpoint, prompt = f"{name}.{_CHECKPOINT}", f"{name}.prompt_file"
    path, given = _parsed.value(checkpoint), _parsed.value(prompt) or prompts
    if path is None and given:
        # Of several prompts, those of another model are refused when they are read.
        first = given if isinstance(given, str) else given[0]
        path = base_models.embedded_base(prompt_formats.load(first)[1])
        gin.bind_parameter(checkpoint, path)
    if path is None:
        said = _said_as(checkpoint)
        raise UserError(
            f"{said}=None is no model: say where one is, --{said.lower()}=PATH, or take "
            "a file of models/ that does, e.g. --gin_file=models/t5_1_1_mini.gin"
        )
    if has_sizes:
        return
    source = base_models.open_checkpoint(path)
    for size, value in vars(formats.architecture(source)).items():
        if f"T5Config.{size}" not in _parsed.bound:
            gin.bind_parameter(f"T5Config.{size}", value)
