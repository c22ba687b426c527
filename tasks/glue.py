# SPDX-License-Identifier: Apache-2.0
"""GLUE (Wang et al. 2019) in T5's text format, read through TFDS."""

from prompt_tuning.tasks import tfds_tasks

tfds_tasks.register(
    "glue_sst2_v002",
    tfds_name="glue/sst2:1.0.0",
    columns=("sentence",),
    label_names=("negative", "positive"),
    task_text="sst2",
)
