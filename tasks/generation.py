# SPDX-License-Identifier: Apache-2.0
"""Tasks of TFDS with free answers: summaries, translations, grade-school mathematics.

GSM8K's targets show the steps and end with ``#### 72``; the last number is compared.
"""

import functools

import seqio

from prompt_tuning.tasks import preprocessors, registration

_ALL = ("train", "validation", "test")
# Name: data set of TFDS, what is read, what is written, what T5's inputs begin with,
# metrics, splits.
TASKS = {
    "xsum_v110": ("xsum:1.1.0", "document", "summary", "summarize:", "rouge", _ALL),
    # Today's TFDS prepares 3.4.0; the text is the same.
    "cnn_dailymail_v310": (
        "cnn_dailymail:3.1.0",
        "article",
        "highlights",
        "summarize:",
        "rouge",
        _ALL,
    ),
    "cnn_dailymail_v340": (
        "cnn_dailymail:3.4.0",
        "article",
        "highlights",
        "summarize:",
        "rouge",
        _ALL,
    ),
    "samsum_v100": (
        "samsum:1.0.0",
        "dialogue",
        "summary",
        "summarize:",
        "rouge",
        _ALL,
    ),
    "gsm8k_v100": (
        "gsm8k:1.0.0",
        "question",
        "answer",
        "gsm8k",
        "math_accuracy",
        ("train", "test"),
    ),
}
# T5's translations, out of English (Raffel et al. 2020, section 2.3): name, data set, the
# language's code and name.
for _name, _tfds, _code, _language in (
    ("wmt14_ende_v003", "wmt14_translate/de-en:1.0.0", "de", "German"),
    ("wmt14_enfr_v003", "wmt14_translate/fr-en:1.0.0", "fr", "French"),
    ("wmt15_enfr_v003", "wmt15_translate/fr-en:1.0.0", "fr", "French"),
    ("wmt16_enro_v003", "wmt16_translate/ro-en:1.0.0", "ro", "Romanian"),
    ("wmt_t2t_ende_v003", "wmt_t2t_translate/de-en:1.0.0", "de", "German"),
):
    _text = f"translate English to {_language}:"
    TASKS[_name] = (_tfds, "en", _code, _text, "bleu", _ALL)

for _name, (_tfds, _input, _target, _text, _metric, _splits) in TASKS.items():
    registration.register(
        _name,
        seqio.TfdsDataSource(tfds_name=_tfds, splits=_splits),
        functools.partial(
            preprocessors.text_to_text, columns=(_input,), target=_target
        ),
        task_text=_text,
        template=functools.partial(preprocessors.template, (_input,)),
        metrics=(_metric,),
        kinds=("", registration.TASKLESS),
    )
