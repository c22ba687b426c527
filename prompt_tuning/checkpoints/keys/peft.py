# SPDX-License-Identifier: Apache-2.0
"""What PEFT calls the parts of a soft prompt: files, tensor and configuration.

The names are those of PEFT 0.21. Three fields of its configuration (``peft_version``,
``tokenizer_kwargs``, ``modules_to_save``) are not in here: PEFT fills them in by itself,
and its older versions do not know them.
"""

from typing import Any

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
TENSOR = "prompt_embeddings"

# Runs of P rows that the tensor holds: PEFT allocates one for the encoder and one for
# the decoder of such models, and then puts the first before the encoder's input only.
SUBMODULES = "num_transformer_submodules"
DEFAULT_SUBMODULES = 2

# The same in every configuration of a prompt of an encoder-decoder model.
CONSTANT: dict[str, Any] = {
    "peft_type": "PROMPT_TUNING",
    "task_type": "SEQ_2_SEQ_LM",
    "inference_mode": True,
}

# A multitask prompt: beside the shared rows, of every task a matrix of low rank by which
# they are multiplied, [tasks, rows, rank] and [tasks, rank, width].
MULTITASK = "MULTITASK_PROMPT_TUNING"
TASKS, TASK_COLUMNS, TASK_ROWS = "num_tasks", "prefix_task_cols", "prefix_task_rows"

# What a card calls the method of such a folder.
OWN_NAMES = {"PROMPT_TUNING": "prompt_tuning", MULTITASK: "multitask_prompt"}

# Fields that say what a card says, and where in the card that stands.
FROM_CARD: dict[str, tuple[str, ...]] = {
    "num_virtual_tokens": ("length",),
    "token_dim": ("width",),
    "base_model_name_or_path": ("base_model", "name"),
}

# Adapters: PEFT wraps the model, so that its modules begin like this. What stands beside
# a module by the kind of the adapter, and for IA3 whether it is at the input.
MODEL = "base_model.model."
LORA, IA3, PREFIX = "LORA", "IA3", "PREFIX_TUNING"
LORA_A, LORA_B, IA3_SCALE = ".lora_A.weight", ".lora_B.weight", ".ia3_l"
# What is written of an adapter of each kind beside its sizes and modules.
ADAPTER: dict[str, dict[str, Any]] = {
    LORA: {"bias": "none", "fan_in_fan_out": False, "modules_to_save": None},
    IA3: {"fan_in_fan_out": False, "modules_to_save": None},
}
# Fields that make another function of an adapter than ours, unless they are empty.
OTHER = (
    "alpha_pattern",
    "fan_in_fan_out",
    "layers_to_transform",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_qalora",
)
# Starts of LoRA that change the base model, to which the adapter then belongs.
OTHER_BASE = ("pissa", "olora", "corda", "loftq")

# Fields that mean something to PEFT alone, with PEFT's defaults. They outlast an import
# followed by an export in the card's entry 'peft'.
PEFT_ONLY: dict[str, Any] = {
    "auto_mapping": None,
    "num_attention_heads": None,
    "num_layers": None,
    "prompt_tuning_init": "RANDOM",
    "prompt_tuning_init_text": None,
    "revision": None,
    "tokenizer_name_or_path": None,
}
