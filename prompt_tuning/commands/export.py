# SPDX-License-Identifier: Apache-2.0
"""``export``: writes a model as programs that run without this package."""

from collections.abc import Sequence

from prompt_tuning import report
from prompt_tuning.checkpoints import base_models, formats
from prompt_tuning.errors import UserError
from prompt_tuning.inference import export
from prompt_tuning.network.transformer import T5Config
from prompt_tuning.types import (
    ActivationDtype,
    FeatureLengths,
    PathText,
    PositiveInt,
    PromptLength,
    WeightDtype,
)

LENGTHS = {"inputs", "targets"}


def export_model(
    *,
    config: T5Config,
    initial_checkpoint_path: str,
    output_dir: PathText,
    task_feature_lengths: FeatureLengths,
    prompt_length: PromptLength,
    num_prompts: PositiveInt = 1,
    frozen_dtype: WeightDtype = "auto",
    activation_dtype: ActivationDtype = "auto",
    platforms: Sequence[str] = export.PLATFORMS,
) -> None:
    """Writes programs that rank labels and decode answers, and the weights.

    Args:
      config: sizes of the model.
      initial_checkpoint_path: the base model (see `formats.open_model`), or
        ``embedded:NAME``.
      output_dir: the folder to make.
      task_feature_lengths: text tokens of a row, and tokens of a label or answer.
      prompt_length: positions of the longest prompt.
      num_prompts: prompts of that length that one batch may mix.
      frozen_dtype: dtype of the weights; 'auto' is that of this machine.
      activation_dtype: dtype of the computation.
      platforms: where the programs shall run: 'cpu', 'cuda', 'tpu'.

    Raises:
      UserError: lengths are missing, the checkpoint does not fit or the folder cannot
        be written.
    """
    if set(task_feature_lengths) != LENGTHS:
        raise UserError(
            f"TASK_FEATURE_LENGTHS={dict(task_feature_lengths)} must give 'inputs' and "
            "'targets'"
        )
    targets = task_feature_lengths["targets"]
    shapes = export.Shapes(
        encoder_length=task_feature_lengths["inputs"] + prompt_length,
        label_length=targets,
        max_decode_len=targets,
        prompt_rows=prompt_length * num_prompts,
    )
    checkpoint = base_models.open_checkpoint(initial_checkpoint_path)
    source = base_models.load(
        config,
        checkpoint,
        frozen_dtype=frozen_dtype,
        activation_dtype=activation_dtype,
    )
    report.say(f"exporting for {', '.join(platforms)}")
    export.write(
        output_dir,
        source.config,
        source.params,
        shapes,
        vocabulary=formats.find_vocabulary(checkpoint.path),
        platforms=platforms,
        metadata={"base_model": source.identity},
    )
    report.say(f"wrote {output_dir}")
