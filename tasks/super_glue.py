# SPDX-License-Identifier: Apache-2.0
"""SuperGLUE (Wang et al. 2019) in T5's text format, read through TFDS.

WSC is answered with the referent, as T5 has it: rows that name the right one are tuned on,
all are evaluated. Definite pronoun resolution has the same form and goes with it.
"""

import functools

import seqio

from prompt_tuning.data import metrics, text_metrics
from prompt_tuning.tasks import glue, grouped, preprocessors, registration

_RTE = ("entailment", "not_entailment")
_BOOLEAN = ("False", "True")
_SPLITS = glue.USUAL_SPLITS
_MULTIRC = functools.partial(metrics.f1, positive="True")
# Configuration of TFDS: columns in T5's order, labels, metrics, splits.
CLASSIFICATION = {
    "axb": (
        (("hypothesis", "sentence2"), ("premise", "sentence1")),
        _RTE,
        ("accuracy",),
        ("test",),
    ),
    "axg": (("hypothesis", "premise"), _RTE, ("accuracy",), ("test",)),
    "boolq": (("passage", "question"), _BOOLEAN, ("accuracy",), _SPLITS),
    "cb": (
        ("hypothesis", "premise"),
        ("entailment", "contradiction", "neutral"),
        ("macro_f1", "accuracy"),
        _SPLITS,
    ),
    "copa": (
        ("choice1", "choice2", "premise", "question"),
        ("choice1", "choice2"),
        ("accuracy",),
        _SPLITS,
    ),
    "multirc": (
        ("question", "answer", "paragraph"),
        _BOOLEAN,
        (grouped.values(_MULTIRC), grouped.whole_groups),
        _SPLITS,
    ),
    "rte": (("hypothesis", "premise"), _RTE, ("accuracy",), _SPLITS),
    "wic": (("sentence1", "sentence2", "word"), _BOOLEAN, ("accuracy",), _SPLITS),
}
_CALLED = {"axb": "rte", "axg": "rte"}
# Tasks in the order of their sentinels.
_INDEXED = ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc")
_MORE = {
    "multirc": {
        "text": {"keep": {"group": ("idx", "question")}, "without_markup": True},
        "postprocess": grouped.label_in_group,
    }
}


def _tfds(config: str, *splits: str) -> seqio.TfdsDataSource:
    return seqio.TfdsDataSource(tfds_name=f"super_glue/{config}:1.0.2", splits=splits)


for _config, _row in CLASSIFICATION.items():
    _task_text = _CALLED.get(_config, _config)
    glue.classification(
        f"super_glue_{_config}_v102",
        f"super_glue/{_config}:1.0.2",
        *_row,
        task_text=_task_text,
        index=_INDEXED.index(_task_text),
        **_MORE.get(_config, {}),
    )
registration.register(
    "super_glue_record_v102",
    _tfds("record", *_SPLITS),
    preprocessors.cloze,
    task_text="record",
    index=_INDEXED.index("record"),
    metrics=(grouped.first_of_group(text_metrics.squad),),
    postprocess=grouped.answers_in_group,
)
_WSC = {"task_text": "wsc:", "index": _INDEXED.index("wsc")}
for _name, _source, _right_only, _metrics in (
    ("train", _tfds("wsc.fixed", "train"), True, ()),
    ("eval", _tfds("wsc.fixed", "validation", "test"), False, ("accuracy",)),
):
    registration.register(
        f"super_glue_wsc_v102_simple_{_name}",
        _source,
        functools.partial(preprocessors.marked_pronoun, right_only=_right_only),
        metrics=_metrics,
        postprocess=grouped.is_referent,
        **_WSC,
    )
registration.register_mixture(
    "super_glue_wsc_and_dev_v102_simple",
    [f"super_glue_wsc_v102_simple_{part}" for part in ("train", "eval")],
)
registration.register(
    "dpr_v001_simple",
    seqio.TfdsDataSource(
        tfds_name="definite_pronoun_resolution:1.1.0", splits=("train", "test")
    ),
    preprocessors.resolved_pronoun,
    metrics=("accuracy",),
    **_WSC,
)
# Rows of each train split, by which T5 mixes them; WSC's are all of them.
_SIZES = {
    "super_glue_wsc_v102_simple_train": 259,
    "super_glue_boolq_v102": 9_427,
    "super_glue_cb_v102": 250,
    "super_glue_copa_v102": 400,
    "super_glue_multirc_v102": 27_243,
    "super_glue_record_v102": 138_854,
    "super_glue_rte_v102": 2_490,
    "super_glue_wic_v102": 5_428,
}
for _name, _sizes in (
    ("super_glue_v102", _SIZES),
    ("super_glue_with_dpr_v102", {**_SIZES, "dpr_v001_simple": 1_322}),
):
    seqio.MixtureRegistry.add(
        f"task_index_{_name}_examples_proportional",
        [(f"task_index_{task}_examples", float(size)) for task, size in _sizes.items()]
        + [("task_index_super_glue_wsc_v102_simple_eval_examples", 0.0)],
    )
