# SPDX-License-Identifier: Apache-2.0
"""From raw rows to the texts of inputs and targets, in T5's formats.

Each takes ``task_name``, what the inputs begin with; '' leaves it out.
"""

from collections.abc import Mapping, Sequence

import tensorflow as tf

from prompt_tuning.data.reach import WITHHELD

# A column, or what a column is called in the inputs and its own name.
Column = str | tuple[str, str]


def template(
    columns: Sequence[Column], task_name: str = "", column_names: bool = False
) -> str:
    """The template (see `data.template`) of what `label_and_text` makes of a row."""
    parts = [task_name] if task_name else []
    for called, column in map(_called, columns):
        parts += [f"{called}:"] * column_names + [f"{{{column}}}"]
    return " ".join(parts)


def _called(column: Column) -> tuple[str, str]:
    return (column, column) if isinstance(column, str) else column


def label_and_text(
    ds: tf.data.Dataset,
    columns: Sequence[Column],
    labels: Sequence[str],
    task_name: str = "",
    column_names: bool = False,
    keep: Mapping[str, tuple[str, ...]] | None = None,
    without_markup: bool = False,
) -> tf.data.Dataset:
    """Joins columns into ``inputs`` and writes the label's name into ``targets``.

    Args:
      ds: rows with the columns and an integer ``label``.
      columns: what the inputs are made of, in this order.
      labels: name of label i.
      task_name: what the inputs begin with, if anything.
      column_names: whether each column's name and a colon stand before it, as in T5's
        multitask text format.
      keep: features to hand on, by where they are in a row.
      without_markup: take line breaks and bold type of HTML out of the text.
    """
    names = tf.constant([*labels, WITHHELD])

    def convert(row):
        parts = [task_name] if task_name else []
        for called, column in map(_called, columns):
            parts += [f"{called}:", row[column]] if column_names else [row[column]]
        text = tf.strings.join(parts, separator=" ")
        if without_markup:
            text = tf.strings.regex_replace(text, "<br>", " ")
            text = tf.strings.regex_replace(text, "</?b>", "")
        label = tf.cast(row["label"], tf.int32)
        kept = {name: _inside(row, path) for name, path in (keep or {}).items()}
        return {
            "inputs": text,
            "targets": names[tf.where(label < 0, len(labels), label)],
            **kept,
        }

    return ds.map(convert, tf.data.AUTOTUNE)


def _inside(row, path):
    for name in path:
        row = row[name]
    return row


def similarity(ds: tf.data.Dataset, task_name: str = "") -> tf.data.Dataset:
    """STS-B: two sentences, and how alike they are in steps of 0.2, as text."""
    before = f"{task_name} sentence1:" if task_name else "sentence1:"

    def convert(row):
        parts = [before, row["sentence1"], "sentence2:", row["sentence2"]]
        return {
            "inputs": tf.strings.join(parts, separator=" "),
            "targets": tf.as_string(tf.round(row["label"] * 5) / 5, precision=1),
        }

    return ds.map(convert, tf.data.AUTOTUNE)


def text_to_text(
    ds: tf.data.Dataset,
    columns: Sequence[Column],
    target: str,
    task_name: str = "",
    column_names: bool = False,
) -> tf.data.Dataset:
    """Joins columns into ``inputs``; ``targets`` is a column as it is."""

    def convert(row):
        parts = [task_name] if task_name else []
        for called, column in map(_called, columns):
            parts += [f"{called}:", row[column]] if column_names else [row[column]]
        return {"inputs": tf.strings.join(parts, separator=" "), "targets": row[target]}

    return ds.map(convert, tf.data.AUTOTUNE)


def question_answering(
    ds: tf.data.Dataset, answers: tuple[str, ...] = ("answers",), task_name: str = ""
) -> tf.data.Dataset:
    """Question, context and all answers, of which the first is the target.

    Punctuation has spaces around it, as in T5's SQuAD.

    Args:
      ds: rows with ``question``, ``context`` and answers.
      answers: where a row has them.
      task_name: what the inputs begin with, if anything.
    """

    def convert(row):
        spaced = {x: _spaced(row[x]) for x in ("question", "context")}
        right = _spaced(_inside(row, answers))
        parts = [task_name] if task_name else []
        parts += ["question:", spaced["question"], "context:", spaced["context"]]
        joined = tf.strings.join(parts, separator=" ")
        return {
            "inputs": tf.strings.regex_replace(joined, r"\s+", " "),
            "targets": right[0],
            "answers": right,
        }

    return ds.map(convert, tf.data.AUTOTUNE)


def _spaced(text):
    text = tf.strings.regex_replace(text, r"([[:punct:]])", r" \1 ")
    return tf.strings.regex_replace(text, r"\s+", " ")


def cloze(ds: tf.data.Dataset, task_name: str = "") -> tf.data.Dataset:
    """ReCoRD: which entity of the passage fills the query's gap; a row for each answer."""
    before = f"{task_name} query:" if task_name else "query:"

    def convert(row):
        passage = tf.strings.regex_replace(
            row["passage"], r"(\.|\?|\!|\"|\')\n@highlight\n", r"\1 "
        )
        passage = tf.strings.regex_replace(passage, r"\n@highlight\n", ". ")
        entities = tf.strings.reduce_join(row["entities"], separator=", ")
        parts = [before, row["query"], "entities:", entities, "passage:", passage]
        answers = row["answers"]
        some = tf.size(answers) > 0
        targets = tf.cond(some, lambda: answers, lambda: tf.constant([WITHHELD]))
        count = tf.size(targets)
        every = lambda value: tf.repeat(tf.expand_dims(value, 0), count, axis=0)
        return {
            "inputs": every(tf.strings.join(parts, separator=" ")),
            "targets": targets,
            "answers": every(answers),
            "group": every(
                tf.stack([row["idx"]["passage"], row["idx"]["query"]], axis=0)
            ),
        }

    return ds.map(convert, tf.data.AUTOTUNE).unbatch()


def marked_pronoun(
    ds: tf.data.Dataset, right_only: bool, task_name: str = ""
) -> tf.data.Dataset:
    """WSC: the pronoun in stars, and what it is said to stand for.

    The text is cut into words at spaces; of several words that are the pronoun, the one
    nearest to the row's index is marked, since two rows of WSC are off by one or have
    punctuation on it.

    Args:
      ds: rows of SuperGLUE's ``wsc.fixed``.
      right_only: leave rows out that name the wrong referent, from which nothing can be
        learned.
      task_name: what the inputs begin with, if anything.
    """
    if right_only:
        ds = ds.filter(lambda row: row["label"] == 1)

    def convert(row):
        words = tf.strings.split(row["text"], sep=" ")
        bare = tf.strings.regex_replace(words, r"^\W+|\W+$", "")
        index = tf.cast(row["span2_index"], tf.int64)
        places = tf.reshape(tf.where(bare == row["span2_text"]), [-1])
        last = tf.size(words, tf.int64) - 1
        if tf.size(places) == 0:
            places = tf.reshape(tf.clip_by_value(index, 0, last), [1])
        place = places[tf.argmin(tf.abs(places - index))]
        marked = tf.strings.regex_replace(
            words[place], r"^(\W*)(.*?)(\W*)$", r"\1*\2*\3"
        )
        words = tf.tensor_scatter_nd_update(words, [[place]], [marked])
        text = tf.strings.reduce_join(words, separator=" ")
        return {
            "inputs": tf.strings.join(
                [*([task_name] if task_name else []), text], separator=" "
            ),
            "targets": row["span1_text"],
            "label": row["label"],
        }

    return ds.map(convert, tf.data.AUTOTUNE)


def resolved_pronoun(ds: tf.data.Dataset, task_name: str = "") -> tf.data.Dataset:
    """Definite pronoun resolution: the pronoun in stars, and what it stands for.

    Of several such words the first is meant.
    """

    def convert(row):
        pattern = tf.strings.join([" (", row["pronoun"], r")( |\.|,)"])
        text = tf.strings.regex_replace(
            row["sentence"], pattern, r" *\1*\2", replace_global=False
        )
        return {
            "inputs": tf.strings.join(
                [*([task_name] if task_name else []), text], separator=" "
            ),
            "targets": row["candidates"][row["label"]],
        }

    return ds.map(convert, tf.data.AUTOTUNE)
