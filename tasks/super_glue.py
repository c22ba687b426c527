# SPDX-License-Identifier: Apache-2.0
"""SuperGLUE (Wang et al. 2019) in T5's text format, read through TFDS."""

from prompt_tuning.tasks import tfds_tasks

tfds_tasks.register(
    "super_glue_boolq_v102",
    tfds_name="super_glue/boolq:1.0.2",
    columns=("passage", "question"),
    label_names=("False", "True"),
    task_text="boolq",
)
