# SPDX-License-Identifier: Apache-2.0
"""SQuAD and the sets of the MRQA 2019 shared task, in T5's text format, through TFDS.

The mixtures tune on SQuAD and evaluate out of domain (Lester et al. 2021, table 1).
"""

import functools

import seqio

from prompt_tuning.tasks import grouped, preprocessors, registration

OUT_OF_DOMAIN = (
    "bio_asq",
    "drop",
    "duo_rc",
    "race",
    "relation_extraction",
    "textbook_qa",
)
IN_DOMAIN = ("hotpot_qa", "natural_questions", "news_qa", "search_qa", "trivia_qa")
SQUAD = "squad_v010_allanswers"


def _register(name: str, source: seqio.DataSource, *answers: str) -> None:
    registration.register(
        name,
        source,
        functools.partial(preprocessors.question_answering, answers=answers),
        metrics=("squad",),
        postprocess=grouped.all_answers,
        kinds=registration.NAMED,
    )


_register(
    SQUAD,
    seqio.TfdsDataSource(tfds_name="squad/v1.1:3.0.0", splits=("train", "validation")),
    "answers",
    "text",
)
for _name in IN_DOMAIN:
    _source = seqio.TfdsDataSource(
        tfds_name=f"mrqa/{_name}:1.0.0", splits=("train", "validation")
    )
    _register(f"mrqa_{_name}_v100", _source, "answers")
for _name in OUT_OF_DOMAIN:
    # They have a test split alone, which is what prompts are judged on.
    _source = seqio.TfdsDataSource(
        tfds_name=f"mrqa/{_name}:1.0.0", splits={"validation": "test"}
    )
    _register(f"mrqa_{_name}_v100", _source, "answers")
_MRQA = [f"mrqa_{name}_v100" for name in OUT_OF_DOMAIN]
for _name, _asked in (
    *((name, [task]) for name, task in zip(OUT_OF_DOMAIN, _MRQA)),
    ("mrqa", _MRQA),
):
    registration.register_mixture(
        f"squad_to_{_name}", [SQUAD, *_asked], registration.NAMED
    )
