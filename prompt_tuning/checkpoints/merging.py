# SPDX-License-Identifier: Apache-2.0
"""An adapter in the weights themselves: a model that answers as base and adapter do.

``x W + x A B`` is ``x (W + A B)`` and scaling what leaves or enters a kernel is scaling its
columns or rows, so LoRA and IA3 need no place beside the weights once they are tuned. A
prompt, and what stands at its positions, has no such form.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from prompt_tuning import files
from prompt_tuning.checkpoints import adapter_file, layout, loading, prompt_file
from prompt_tuning.checkpoints.source import Source
from prompt_tuning.errors import UserError
from prompt_tuning.network.adapters import INPUT, OUTPUT, Slot
from prompt_tuning.network.slots import LowRank, Scale

KERNEL = "/kernel"


def merge(source: Source, adapter: files.Path, *, force: bool = False) -> Source:
    """A model with an adapter in its kernels, which are computed in float32.

    Args:
      source: the base model.
      adapter: a file of `adapter_file`.
      force: take an adapter that was tuned on another model of these shapes.

    Raises:
      UserError: the file is no adapter, holds what weights cannot, or is another
        model's.
    """
    if not adapter_file.is_adapter(adapter):
        raise UserError(
            f"{adapter} is no adapter: give the {adapter_file.FILE} that a run of LoRA "
            "or IA3 wrote"
        )
    rows, slots, card = adapter_file.load(adapter)
    beside = [
        site for site, slot in slots.items() if not isinstance(slot, (LowRank, Scale))
    ]
    if len(rows) or beside:
        what = f"a prompt of {len(rows)} rows" if len(rows) else beside[0]
        raise UserError(
            f"{adapter} holds {what}, for which weights have no place; only LoRA and IA3 "
            "can be merged"
        )
    prompt_file.check_compatible(
        card, loading.fingerprint(source), _width(source), force=force
    )
    adapter_file.check_fits(slots, _stacked(source))

    def read(name: str) -> np.ndarray:
        found, kernel = layout.LAYER.fullmatch(name), source.read(name)
        if found is None or not name.endswith(KERNEL):
            return kernel
        path = f"{found[1] or ''}layers/{found[3]}".removesuffix(KERNEL)
        return _kernel(kernel, path, int(found[2]), slots)

    return dataclasses.replace(source, read=read)


def _kernel(
    kernel: np.ndarray, path: str, layer: int, slots: Mapping[str, Slot]
) -> np.ndarray:  # [in, out]
    """The kernel of one layer with what stands at its output and its input."""
    own = {place: slots.get(f"{path}/{place}") for place in (INPUT, OUTPUT)}
    if not any(own.values()):
        return kernel
    made = kernel.astype(np.float32)
    arrays = {
        place: {name: np.asarray(array)[layer] for name, array in slot.arrays().items()}
        for place, slot in own.items()
        if slot is not None
    }
    if isinstance(own[OUTPUT], LowRank):
        made = made + arrays[OUTPUT]["a"] @ arrays[OUTPUT]["b"]
    elif isinstance(own[OUTPUT], Scale):
        made = made * arrays[OUTPUT]["by"]
    if isinstance(own[INPUT], Scale):
        made = made * arrays[INPUT]["by"][:, None]
    return made.astype(kernel.dtype)


def _stacked(source: Source) -> dict[str, Any]:
    """Shapes of the leaves under our names, as `adapters.widths_at` reads them."""
    return {
        name: jax.ShapeDtypeStruct(shape, np.float32)
        for name, shape in loading.stacked_shapes(source).items()
    }


def _width(source: Source) -> int:
    return source.specs["token_embedder/embedding"].shape[1]
