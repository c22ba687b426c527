# SPDX-License-Identifier: Apache-2.0
"""Which run a MODEL_DIR holds, so that a run that is resumed is the same run.

`run.json` in the folder says of a run what its numbers follow from: base model, data by
their content, prompts, batch size, seed, learning rate and optimizer, loss, steps. A
command that means another run is refused before anything in the folder changes.
"""

import inspect
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from prompt_tuning import files, processes, trees
from prompt_tuning.errors import UserError
from prompt_tuning.training import optimizers
from prompt_tuning.training.optimizers import Optimizer
from prompt_tuning.training.run_checkpoints import Checkpoints

FILE = "run.json"
STEPS = "steps"
# Where a schedule is looked at to tell it from others.
_STEPS_OF_RATES = (0, 10, 100, 1_000, 10_000, 100_000)

Change = dict[str, Any]


def open_folder(
    model_dir: str,
    run: Mapping[str, Any],
    *,
    allow_changes: bool = False,
    on_start: files.OnStart | None = None,
) -> pathlib.Path:
    """Makes the folder of a run, or opens that of the same run.

    Args:
      model_dir: the folder.
      run: what its numbers follow from, as JSON; `STEPS` may grow.
      allow_changes: go on with a run that differs, and put it on record.
      on_start: called with the folder before anything else is written to it.

    Raises:
      UserError: it holds another run, or cannot be written; what differs is listed.
    """
    folder = pathlib.Path(model_dir)
    run = json.loads(json.dumps(run))  # as it is read back: a tuple becomes a list
    changes: list[Change] = []
    step = Checkpoints(folder).latest_step()
    if step is not None and (folder / FILE).is_file():
        known = files.read_json(folder / FILE)
        found = differences(known.get("run", {}), run)
        if found and not allow_changes:
            listed = "; ".join(
                f"{each['value']} is {each['now']!r} and was {each['was']!r}"
                for each in found
            )
            raise UserError(
                f"{folder} holds step {step} of another run: {listed}; choose another "
                "MODEL_DIR, or set ALLOW_CHANGES=True to go on with it all the same"
            )
        changes = known.get("changes", []) + [{**each, "step": step} for each in found]
    folder = files.writable_folder(model_dir, on_start)
    content = {"run": run, "changes": changes}
    processes.in_first(lambda: files.write_json(folder / FILE, content))
    return folder


def changes(folder: pathlib.Path) -> list[Change]:
    """What was changed in a run on its way, by ``ALLOW_CHANGES``."""
    path = folder / FILE
    return files.read_json(path)["changes"] if path.is_file() else []


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """The values in which two runs differ; more steps are no difference.

    >>> differences({"seed": 0, "steps": 10}, {"seed": 1, "steps": 20})
    [{'value': 'seed', 'was': 0, 'now': 1}]
    """
    flat_was, flat_now = trees.flatten(was), trees.flatten(now)
    found = []
    for name in dict.fromkeys([*flat_was, *flat_now]):
        before, after = flat_was.get(name), flat_now.get(name)
        grown = name == STEPS and before is not None and (after or 0) >= before
        if before != after and not grown:
            found.append({"value": name, "was": before, "now": after})
    return found


def describe_optimizer(tx: Any) -> dict[str, Any]:
    """What an optimizer says of itself: its rate (of some steps), name and values.

    One of optax's own says nothing, and so cannot be told from others.
    """
    if not isinstance(tx, Optimizer):
        return {}
    rates = [optimizers.learning_rate_of(tx, step) for step in _STEPS_OF_RATES]
    rates = [float(np.format_float_scientific(rate, 5)) for rate in rates]
    rate = rates[0] if len(set(rates)) == 1 else rates
    return {"learning_rate": rate, "optimizer": dict(tx.values)}


def describe_init(init: Callable[..., Any] | str | None) -> str:
    """The name of a prompt's initialisation and the values that it was made of.

    >>> from prompt_tuning.training import prompt_starts
    >>> describe_init(prompt_starts.random_init(0.5))
    'random_init(scale=0.5)'
    """
    if init is None or isinstance(init, str):
        return init or "sampled_vocab"
    if not inspect.isfunction(init):
        return repr(init)
    values = inspect.getclosurevars(init).nonlocals
    listed = ", ".join(f"{name}={value}" for name, value in sorted(values.items()))
    return f"{init.__qualname__.split('.')[0]}({listed})"
