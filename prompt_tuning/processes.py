# SPDX-License-Identifier: Apache-2.0
"""Several processes that run one program: who joins, who writes, what all agree on.

Every process runs the same commands on its own devices. Process 0 alone writes files
and prints; what it decides or fails at is told to the others, and a process that fails
at anything else ends the others as it ends, so that none goes on, or waits, alone. In a
single process all of this costs nothing.
"""

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

# The coordination service that JAX's processes share has no public door to its keys.
from jax._src import distributed
from jax.experimental import multihost_utils

from prompt_tuning.errors import UserError
from prompt_tuning.types import Array

ADDRESS = "JAX_COORDINATOR_ADDRESS"
COUNT = "JAX_NUM_PROCESSES"
INDEX = "JAX_PROCESS_ID"
# What `srun` sets; JAX wants all of them. The shell and the batch script of an
# allocation have the number of tasks too, but are one process and no part of a step.
SLURM_STEP = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)
TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
# Texts are exchanged in blocks, since each length is a program to compile.
BLOCK = 1024
# Under this key a process that fails says so; every process looks now and then, and
# waits for the others' looks before it ends.
FAILURE = "prompt_tuning/failure"
LOOK_EVERY = 1.0  # seconds
LAST_WORDS = 5.0
# JAX aborts a process, with a code of its own, whose coordination service is gone. Process
# 0 holds the service and cannot see the others end: it gives them this time to do so.
HOLD_OPEN = 1.0
_leaving = threading.Lock()


def several(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment says that this process is one of several.

    ``JAX_NUM_PROCESSES`` decides where it is set, and so 1 keeps a process alone
    wherever it runs. Else there are several where ``JAX_COORDINATOR_ADDRESS`` is given,
    in a step of several tasks under SLURM, and where GKE names several hosts or slices
    of TPUs. TPU VMs keep this in their metadata only: what starts the workers there
    sets ``JAX_NUM_PROCESSES``.

    Raises:
      UserError: a number is none.
    """
    if COUNT in environ:
        return _number(environ, COUNT) > 1
    if environ.get(ADDRESS):
        return True
    if all(name in environ for name in SLURM_STEP):
        tasks = "SLURM_STEP_NUM_TASKS"
        return _number(environ, tasks if tasks in environ else "SLURM_NTASKS") > 1
    hosts = next((environ[name] for name in TPU_HOSTS if name in environ), "")
    slices = "MEGASCALE_NUM_SLICES"
    return "," in hosts or slices in environ and _number(environ, slices) > 1


def join() -> None:
    """Joins the other processes of the run, if there are any; before JAX is used.

    What the ``JAX_`` variables leave open is found by JAX itself: under SLURM, on GKE
    and on TPU VMs.

    Raises:
      UserError: the environment says too little, or the others do not answer.
    """
    if not several() or jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(
            num_processes=_number(os.environ, COUNT) if COUNT in os.environ else None,
            process_id=_number(os.environ, INDEX) if INDEX in os.environ else None,
        )
    # Other packages' errors pass through JAX here, of no common class.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"cannot join the other processes of the run ({reason}); set {ADDRESS}, "
            f"{COUNT} and {INDEX} in each of them, or {COUNT}=1 to run alone"
        ) from error
    _watch()


def leave(code: int, reason: str, trace: str = "") -> None:
    """Ends this process after a failure, and the others of its run with it.

    They would wait for it in the next collective operation, and it for them as it
    exits, until JAX gives up after minutes. Does nothing in a single process.

    Args:
      code: the exit code of all of them.
      reason: what process 0 prints of it if it was another that failed.
      trace: what this process prints before it ends.
    """
    if jax.distributed.is_initialized():
        index = jax.process_index()
        _leave(code, {"code": code, "process": index, "reason": reason}, trace)


def count() -> int:
    """The number of processes; asks no device where this one has joined no others."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this is process 0, which alone writes and prints."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def agreed(value: Any) -> Any:
    """What process 0 holds, in every process.

    Args:
      value: what JSON can say; it is not looked at in the other processes.
    """
    if count() == 1:
        return value
    text = json.dumps(value).encode() if is_first() else b""
    size = -(-len(text) // BLOCK) * BLOCK
    size = int(multihost_utils.broadcast_one_to_all(np.int32(size)))
    padded = np.frombuffer(text.ljust(size)[:size], np.uint8)
    told = multihost_utils.broadcast_one_to_all(padded)
    return json.loads(told.astype(np.uint8).tobytes())


def gather(value: Any) -> np.ndarray:  # [...] -> [processes, ...]
    """The numbers that each process gives, of one shape and dtype."""
    if count() == 1:
        return np.asarray(value)[None]
    return np.asarray(multihost_utils.process_allgather(np.asarray(value)))


def in_first(action: Callable[[], Any]) -> None:
    """Runs ``action`` in process 0; all processes wait for its end.

    Raises:
      UserError: the action raised it, in whichever process.
      RuntimeError: in the other processes, if the action raised anything else.
    """
    failure = None
    if is_first():
        try:
            action()
        except Exception as error:  # noqa: BLE001  It is raised below, in all.
            failure = error
    told = agreed(failure and [isinstance(failure, UserError), str(failure)])
    if failure is not None:
        raise failure
    if told is not None:
        cured_by_user, message = told
        if cured_by_user:
            raise UserError(message)
        raise RuntimeError(f"process 0 failed: {message}")


def whole(array: Array | np.ndarray) -> Array | np.ndarray:
    """An array that this process can read, whoever holds its parts.

    An array whose parts lie with several processes is laid whole on every device for
    the time of the call; all processes must make it. Any other comes back as it is.
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return array
    if array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _watch() -> None:
    """Looks for failures of other processes until this one has exited in good order."""
    client, done = _client(), threading.Event()

    def look() -> None:
        while not done.wait(LOOK_EVERY):
            try:
                told = client.key_value_try_get(FAILURE)
            except jax.errors.JaxRuntimeError as error:
                if "NOT_FOUND" in str(error):
                    continue
                return  # The service is gone; JAX ends this process for that.
            failure = json.loads(told)
            if failure["process"] == jax.process_index():
                return
            # Where all end for one reason, this process has said so itself.
            if is_first() and not _leaving.locked():
                print(
                    f"prompt-tuning: process {failure['process']} failed: "
                    f"{failure['reason']}",
                    file=sys.stderr,
                )
            _leave(failure["code"])

    def finish() -> None:
        # Waits for the others, of which one may still fail.
        jax.distributed.shutdown()
        done.set()
        watcher.join()

    watcher = threading.Thread(target=look, name="failures of others", daemon=True)
    watcher.start()
    atexit.register(finish)


def _leave(
    code: int, failure: Mapping[str, Any] | None = None, trace: str = ""
) -> None:
    # For good: of two threads that leave one is enough, and what the main thread meets
    # while the others end is a consequence of the failure, no news.
    _leaving.acquire()
    sys.stderr.write(trace)
    client = _client()
    # Another process may have failed before this one, and one may not answer any more.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        if failure is not None:
            client.key_value_set(FAILURE, json.dumps(failure))
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        # Process 0 keeps the keys; it must not go before the others have looked.
        client.wait_at_barrier(FAILURE, int(1000 * LAST_WORDS))
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(HOLD_OPEN)
    # An orderly exit would wait for the others, and they for this one.
    os._exit(code)


def _client() -> Any:
    """What this process talks to the others by."""
    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("there is no other process to talk to")
    return client


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError as error:
        raise UserError(
            f"{name}={environ[name]!r} is not a number; set it to one or unset it"
        ) from error
