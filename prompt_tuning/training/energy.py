# SPDX-License-Identifier: Apache-2.0
"""Energy that a run takes, where counters of this machine say it; never an estimate.

The counters are read through codecarbon: RAPL of processors, NVML and ROCm of GPUs. What
else it offers are estimates (the nominal power of a processor times its load, watts for
each stick of memory), which are left alone, as is all that would ask the network.
"""

import importlib.util
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax

NOT_MEASURABLE = "not measurable here"
# A processor's counter goes round after some 15 minutes at 300 W: read it more often.
PERIOD = 15.0  # seconds
JOULES_PER_KWH = 3.6e6
# From the seconds since it was last called to the kWh since then; None if none is known.
Counter = Callable[[float], float | None]


class EnergyMeter:
    """Adds up the counters of the whole machine; a context manager that owns a thread.

    Other programs that run at the same time are in the sum.
    """

    def __init__(self, rapl_folder: str | None = None):
        """Finds the counters.

        Args:
          rapl_folder: where the counters of processors lie; None is where Linux has them.
        """
        self._counters: dict[str, Counter] = {}
        self._why = f"{NOT_MEASURABLE}: no counter of energy can be read"
        if importlib.util.find_spec("codecarbon") is None:
            self._why = (
                f"{NOT_MEASURABLE}: codecarbon is not installed (extra 'energy')"
            )
        else:
            logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
            if counter := _processors(rapl_folder):
                self._counters["processors"] = counter
            if jax.default_backend() == "gpu" and (counter := _gpus()):
                self._counters["GPUs"] = counter
        self._kwh = dict.fromkeys(self._counters, 0.0)
        self._read_at = time.monotonic()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        self._read_at = time.monotonic()
        if self._counters:
            self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._ended.set()
        if self._counters:
            self._thread.join()

    def read(self) -> dict[str, Any]:
        """What has been used since the start.

        Returns:
          ``joules``, and ``of``, whose; or None, nothing, and ``why``.
        """
        self._add()
        if not self._kwh:
            return {"joules": None, "of": [], "why": self._why}
        joules = JOULES_PER_KWH * sum(self._kwh.values())
        return {"joules": joules, "of": list(self._kwh)}

    def _follow(self) -> None:
        while not self._ended.wait(PERIOD):
            self._add()

    def _add(self) -> None:
        with self._lock:
            now = time.monotonic()
            seconds, self._read_at = now - self._read_at, now
            for name in list(self._kwh):
                used = self._counters[name](seconds)
                if used is None:
                    # A sum that lacks a part would be read as a whole one.
                    del self._kwh[name]
                    self._why = f"{NOT_MEASURABLE}: a counter of the {name} went away"
                else:
                    self._kwh[name] += used


def total(first: Mapping[str, Any], second: Mapping[str, Any]) -> Mapping[str, Any]:
    """What two calls used that `EnergyMeter.read` gave; unknown if it is of either.

    >>> total({"joules": 1.0, "of": ["GPUs"]}, {"joules": 2.0, "of": ["GPUs"]})
    {'joules': 3.0, 'of': ['GPUs']}
    """
    for one in (first, second):
        if one["joules"] is None:
            return one
    if first["of"] != second["of"]:
        why = (
            f"{NOT_MEASURABLE}: a part was of {first['of']}, another of {second['of']}"
        )
        return {"joules": None, "of": [], "why": why}
    return {"joules": first["joules"] + second["joules"], "of": first["of"]}


def _processors(folder: str | None) -> Counter | None:
    from codecarbon.core import cpu
    from codecarbon.core.units import Time

    if not cpu.is_rapl_available(folder):
        return None
    try:
        rapl = cpu.IntelRAPL() if folder is None else cpu.IntelRAPL(rapl_dir=folder)
    except OSError:  # It looks in fewer places than the question before.
        return None
    rapl.start()

    def used(seconds: float) -> float | None:
        found = rapl.get_cpu_details(Time(max(seconds, 1e-3)))
        energies = [value for name, value in found.items() if "Energy" in name]
        return sum(energies) if energies else None

    return used


def _gpus() -> Counter | None:
    from codecarbon.core import gpu
    from codecarbon.core.units import Time

    if not gpu.is_gpu_details_available():
        return None
    devices = gpu.AllGPUDevices()
    if not devices.device_count:
        return None
    devices.start()

    def used(seconds: float) -> float | None:
        found = devices.get_delta(Time(max(seconds, 1e-3)))
        if len(found) < devices.device_count:
            return None
        return sum(each["delta_energy_consumption"].kWh for each in found)

    return used
