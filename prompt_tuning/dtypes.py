# SPDX-License-Identifier: Apache-2.0
"""The dtypes of weights and prompts, by the names of users and of files."""

import ml_dtypes
import numpy as np

from prompt_tuning.errors import UserError

FLOAT32, BFLOAT16, INT8 = "float32", "bfloat16", "int8"
# What weights that are not quantised are kept and written in.
FLOATS = {
    FLOAT32: np.dtype(np.float32),
    BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}
# What safetensors files call them.
CODES = {
    FLOAT32: "F32",
    "float16": "F16",
    BFLOAT16: "BF16",
    INT8: "I8",
    "int32": "I32",
    "uint32": "U32",
}
# What a tensor of such a file, by its code, is read as. Of our two only float32 holds
# every number of float16.
READ_AS = {"F32": FLOAT32, "BF16": BFLOAT16, "F16": FLOAT32}


def floating(name: str) -> np.dtype:
    """The dtype of weights that users call ``name``.

    Raises:
      UserError: there is no such dtype.
    """
    if name not in FLOATS:
        also = ""
        if name == INT8:
            also = "; 'int8' is for frozen weights alone (FROZEN_DTYPE)"
        raise UserError(f"dtype {name!r} is not one of {', '.join(FLOATS)}{also}")
    return FLOATS[name]
