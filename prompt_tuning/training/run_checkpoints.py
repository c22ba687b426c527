# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: what is tuned, its optimizer, the step, key and data position.

Frozen parameters are not part of a run's checkpoints. Leaves are stored under one flat
name each ('tuned/NAME/prompts/NAME', 'opt_state/NAME/0/mu/...'), so that a checkpoint can be
compared with a run name by name before any array is read.
"""

import contextlib
import logging
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from prompt_tuning import files, processes
from prompt_tuning.errors import UserError
from prompt_tuning.training.step import TrainState
from prompt_tuning.types import PyTree

FOLDER = "checkpoints"
# Orbax renames a folder into place last; this file is in every one that is complete.
COMPLETE = "_CHECKPOINT_METADATA"
REMOVALS = 20  # attempts, a tenth of a second apart


class Damaged(UserError):
    """A checkpoint that cannot be read."""


class Checkpoints:
    """The checkpoints of one run, in ``MODEL_DIR/checkpoints/STEP``.

    Nothing is written before the first `save`. A folder that a killed process left half
    written is ignored. Several processes save and restore together: each writes what
    its devices hold, and all go by the steps that process 0 sees.

    Args:
      model_dir: folder of the run.
      max_to_keep: the newest so many are kept; None keeps all.
    """

    def __init__(self, model_dir: files.Path, max_to_keep: int | None = 2):
        if max_to_keep is not None and max_to_keep < 1:
            raise UserError(
                f"max_to_keep={max_to_keep} would keep no checkpoint; give 1 or more, "
                "or None to keep all"
            )
        self.folder = pathlib.Path(model_dir).absolute() / FOLDER
        self._max_to_keep = max_to_keep

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in ascending order."""
        return processes.agreed(self._complete() if processes.is_first() else None)

    def latest_step(self) -> int | None:
        """The newest step, or None if there is no checkpoint."""
        return max(self.steps(), default=None)

    def save(
        self,
        step: int,
        state: TrainState,
        position: dict[str, Any],
        record: dict[str, Any],
    ) -> None:
        """Writes a checkpoint and then deletes those beyond ``max_to_keep``.

        Args:
          step: steps taken; a step that is there already must be the newest and is
            left as it is, for its state is the same.
          state: what training changes.
          position: where in the data the run is; JSON.
          record: how far each member has come, by its name; JSON.

        Raises:
          UserError: the folder is not writable or the disk is full, or the folder
            already holds a later step.
        """
        latest = self.latest_step()
        if step == latest:
            return
        if latest is not None and step < latest:
            raise UserError(
                f"{self.folder} already holds step {latest}, later than step {step}; "
                "choose another MODEL_DIR or resume from that step"
            )
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(_pack(state)),
            position=ocp.args.JsonSave(position),
            record=ocp.args.JsonSave(record),
        )
        try:
            with _quiet(), self._manager() as manager:
                manager.save(step, args=arguments, force=True)
                manager.wait_until_finished()
        # Orbax passes on what its storage libraries raise, of no common class.
        except Exception as error:
            self._remove_unfinished(step)
            raise files.unwritable(self.folder / str(step), error) from error
        if step not in self.steps():
            raise RuntimeError(f"{self.folder} does not hold step {step} after a save")

    def restore(
        self, abstract_state: TrainState, step: int | None = None
    ) -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
        """Reads ``(state, position, record)`` of a step, by default of the newest.

        Args:
          abstract_state: shapes and dtypes to expect, e.g. of `jax.eval_shape` over
            `TrainState.create`; a leaf that carries a sharding is restored onto it,
            others onto the default device, uncommitted, like fresh arrays.
          step: the step.

        Raises:
          Damaged: it cannot be read.
          UserError: there is no such checkpoint, or its leaves are not those of the run.
        """
        steps = self.steps()
        step = step if step is not None else max(steps, default=None)
        if step is None or step not in steps:
            there = f"it holds {', '.join(map(str, steps))}" if steps else "it is empty"
            raise UserError(
                f"{self.folder} has no checkpoint {'' if step is None else step}; "
                f"{there}; choose another step or MODEL_DIR"
            )
        wanted = jax.eval_shape(_pack, abstract_state)
        shardings = {
            name: getattr(leaf, "sharding", None)
            for name, leaf in _named_leaves(abstract_state).items()
        }
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        targets = {
            name: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=shardings[name] or default
            )
            for name, leaf in wanted.items()
        }
        arguments = ocp.args.Composite(
            state=ocp.args.StandardRestore(targets),
            position=ocp.args.JsonRestore(),
            record=ocp.args.JsonRestore(),
        )
        with self._readable(step), _quiet(), self._manager() as manager:
            stored = manager.item_metadata(step)["state"]
            self._check_fit(step, stored, wanted)
            items = manager.restore(step, args=arguments)
        restored = {
            name: leaf if shardings[name] else jnp.asarray(np.asarray(leaf))
            for name, leaf in items["state"].items()
        }
        state = _unpack(restored, abstract_state)
        return state, items["position"], items["record"]

    def read_record(self, step: int) -> dict[str, Any]:
        """The record that `save` was given at a step; reads no array."""
        arguments = ocp.args.Composite(record=ocp.args.JsonRestore())
        with self._readable(step), _quiet(), self._manager() as manager:
            return manager.restore(step, args=arguments)["record"]

    def remove(self, step: int) -> None:
        """Deletes a checkpoint."""
        processes.in_first(lambda: shutil.rmtree(self.folder / str(step)))

    @contextlib.contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        """Turns whatever goes wrong with a step's files into `Damaged`."""
        try:
            yield
        except UserError:
            raise
        # Orbax passes on what its storage libraries raise, of no common class.
        except Exception as error:
            raise Damaged(
                f"the checkpoint {self.folder / str(step)} cannot be read "
                f"({files.first_line(error)})"
            ) from error

    def _manager(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=self._max_to_keep, enable_async_checkpointing=False
            ),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "position": ocp.JsonCheckpointHandler(),
                "record": ocp.JsonCheckpointHandler(),
            },
        )

    def _complete(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        return sorted(
            int(entry.name)
            for entry in self.folder.iterdir()
            if entry.name.isdecimal() and (entry / COMPLETE).exists()
        )

    def _remove_unfinished(self, step: int) -> None:
        if not processes.is_first():
            return
        # Orbax reports the first failure while its other writers are still at work, and
        # they make their folders again.
        for _ in range(REMOVALS):
            for folder in self.folder.glob(f"{step}.*tmp*"):
                shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.1)
            if not any(self.folder.glob(f"{step}.*tmp*")):
                break
        for folder in (self.folder, self.folder.parent):
            with contextlib.suppress(OSError):
                folder.rmdir()  # Only where empty: made for this checkpoint.

    def _check_fit(self, step: int, stored: PyTree, wanted: dict[str, Any]) -> None:
        """Compares names and shapes; what is tuned is named before what follows it."""
        have = {name: list(leaf.shape) for name, leaf in stored.items()}
        want = {name: list(leaf.shape) for name, leaf in wanted.items()}
        gaps = [
            f"{name} is {have.get(name, 'absent')} in the checkpoint, "
            f"{want.get(name, 'absent')} in this run"
            for name in sorted(have.keys() | want.keys())
            if have.get(name) != want.get(name)
        ]
        if not gaps:
            return
        tuned = [gap for gap in gaps if gap.startswith("tuned/")]
        cure = "PROMPT_LENGTH and method" if tuned else "optimizer"
        raise UserError(
            f"the checkpoint {self.folder / str(step)} does not fit this run: "
            f"{'; '.join(tuned or gaps)}; choose another MODEL_DIR or the same {cure}"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences Orbax: it logs every failure with its stack, beside raising it."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _named_leaves(state: TrainState) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }


def _pack(state: TrainState) -> dict[str, Any]:
    """A state as ``{name: array}``; typed random keys become their raw words."""
    return {
        name: jax.random.key_data(leaf) if _is_key(leaf) else leaf
        for name, leaf in _named_leaves(state).items()
    }


def _unpack(flat: dict[str, Any], like: TrainState) -> TrainState:
    """Inverse of `_pack`, in the structure of ``like``."""
    leaves = [
        jax.random.wrap_key_data(flat[name], dtype=leaf.dtype)
        if _is_key(leaf)
        else flat[name]
        for name, leaf in _named_leaves(like).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
