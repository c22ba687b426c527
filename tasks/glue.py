# SPDX-License-Identifier: Apache-2.0
"""GLUE (Wang et al. 2019) in T5's text format, read through TFDS.

MNLI's mixture trains on MNLI and evaluates on its matched and mismatched parts. Zero-shot
transfer between paraphrase tasks (Lester et al. 2021, section 5) tunes on one and
evaluates on the other, whose rows are written in the labels of the first.
"""

import functools
from collections.abc import Sequence

import seqio

from prompt_tuning.tasks import preprocessors, registration

USUAL_SPLITS = ("train", "validation", "test")
_NLI = ("entailment", "neutral", "contradiction")
_RTE = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")
_MNLI = ("hypothesis", "premise")
_MNLI_SPLITS = (
    "train",
    *(
        f"{split}_{of}"
        for split in USUAL_SPLITS[1:]
        for of in ("matched", "mismatched")
    ),
)
_PARTS = USUAL_SPLITS[1:]
# Configuration of TFDS: columns in T5's order (alphabetical), labels, metrics, splits.
CLASSIFICATION = {
    "ax": (_MNLI, _NLI, ("accuracy",), ("test",)),
    "cola": (
        ("sentence",),
        ("unacceptable", "acceptable"),
        ("matthews",),
        USUAL_SPLITS,
    ),
    "mnli": (_MNLI, _NLI, ("accuracy",), _MNLI_SPLITS),
    "mnli_matched": (_MNLI, _NLI, ("accuracy",), _PARTS),
    "mnli_mismatched": (_MNLI, _NLI, ("accuracy",), _PARTS),
    "mrpc": (_PAIR, ("not_equivalent", "equivalent"), ("f1", "accuracy"), USUAL_SPLITS),
    "qnli": (("question", "sentence"), _RTE, ("accuracy",), USUAL_SPLITS),
    "qqp": (
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        ("f1", "accuracy"),
        USUAL_SPLITS,
    ),
    "rte": (_PAIR, _RTE, ("accuracy",), USUAL_SPLITS),
    "sst2": (("sentence",), ("negative", "positive"), ("accuracy",), USUAL_SPLITS),
    "wnli": (_PAIR, ("not_entailment", "entailment"), ("accuracy",), USUAL_SPLITS),
}
# What T5 calls a configuration in the inputs, where that is not its name.
_CALLED = {"ax": "mnli", "mnli_matched": "mnli", "mnli_mismatched": "mnli"}
# Tasks in the order of their sentinels; diagnostics share that of their task.
_INDEXED = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
# What TFDS 1.0.0 and 2.0.0 hold is the same; today's TFDS can only prepare 2.0.0.
_VERSIONS = {"v002": "1.0.0", "v200": "2.0.0"}


def classification(
    name: str,
    tfds_name: str,
    columns: Sequence[preprocessors.Column],
    label_names: Sequence[str],
    metrics: Sequence,
    splits: Sequence[str],
    *,
    task_text: str,
    index: int,
    **more,
) -> None:
    """Registers a data set of columns and a label under all its names."""
    rows = functools.partial(
        preprocessors.label_and_text,
        columns=columns,
        labels=label_names,
        column_names=True,
        **more.pop("text", {}),
    )
    registration.register(
        name,
        seqio.TfdsDataSource(tfds_name=tfds_name, splits=splits),
        rows,
        task_text=task_text,
        index=index,
        template=lambda text: preprocessors.template(columns, text, column_names=True),
        label_names=label_names,
        metrics=metrics,
        **more,
    )


def _register(config: str, version: str, answered_as: str | None = None) -> None:
    columns, label_names, metrics, splits = CLASSIFICATION[config]
    name = f"glue_{config}_{version}"
    if answered_as is not None:
        name = f"glue_{config}_from_{answered_as}_{version}"
        label_names, splits = CLASSIFICATION[answered_as][1], ("validation",)
    called = _CALLED.get(config, config)
    classification(
        name,
        f"glue/{config}:{_VERSIONS[version]}",
        columns,
        label_names,
        metrics,
        splits,
        task_text=called,
        index=_INDEXED.index(called),
    )


for _version, _tfds_version in _VERSIONS.items():
    for _config in CLASSIFICATION:
        _register(_config, _version)
    registration.register(
        f"glue_stsb_{_version}",
        seqio.TfdsDataSource(
            tfds_name=f"glue/stsb:{_tfds_version}", splits=USUAL_SPLITS
        ),
        preprocessors.similarity,
        task_text="stsb",
        index=_INDEXED.index("stsb"),
        template=lambda text: preprocessors.template(_PAIR, text, column_names=True),
        metrics=("pearson", "spearman"),
    )
    registration.register_mixture(
        f"glue_mnli_and_dev_{_version}",
        [f"glue_{part}_{_version}" for part in CLASSIFICATION if "mnli" in part],
    )
    for _tuned, _asked in (("qqp", "mrpc"), ("mrpc", "qqp")):
        _register(_asked, _version, answered_as=_tuned)
        registration.register_mixture(
            f"glue_{_asked}_from_{_tuned}_zeroshot_{_version}",
            [f"glue_{_tuned}_{_version}", f"glue_{_asked}_from_{_tuned}_{_version}"],
        )
