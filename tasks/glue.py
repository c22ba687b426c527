# SPDX-License-Identifier: Apache-2.0
"""GLUE (Wang et al. 2019) in T5's text format, read through TFDS."""

from prompt_tuning.tasks import tfds_tasks

# What TFDS 1.0.0 and 2.0.0 hold is the same; today's TFDS can only prepare 2.0.0.
for _version, _tfds_version in (("v002", "1.0.0"), ("v200", "2.0.0")):
    tfds_tasks.register(
        f"glue_sst2_{_version}",
        tfds_name=f"glue/sst2:{_tfds_version}",
        columns=("sentence",),
        label_names=("negative", "positive"),
        task_text="sst2",
    )
