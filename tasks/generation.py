# SPDX-License-Identifier: Apache-2.0
"""Tasks of TFDS with free answers: summaries, grade-school mathematics.

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
