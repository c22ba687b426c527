# SPDX-License-Identifier: Apache-2.0
"""Labelled examples as ragged arrays of token ids."""

import collections

import numpy as np
from check_leaks import EOS

MAXIMUM_INPUTS = 160
MAXIMUM_TARGETS = 32


def flatten(lists):
    """Lists of ids as one uint16 array, and where each starts and the last ends."""
    offsets = np.zeros(len(lists) + 1, np.int64)
    np.cumsum([len(item) for item in lists], out=offsets[1:])
    flat = np.empty(offsets[-1], np.uint16)
    for begin, item in zip(offsets[:-1], lists, strict=True):
        flat[begin : begin + len(item)] = item
    return flat, offsets


def tokenise(processor, examples):
    """Tokenises rendered examples; those that are too long are left out.

    Args:
      processor: The SentencePieceProcessor.
      examples: A list of Example.

    Returns:
      A dict of arrays, and one from task to counts: examples, too long, input and
      target tokens.
    """
    inputs = processor.encode([item.inputs for item in examples], num_threads=2)
    targets = processor.encode([item.targets for item in examples], num_threads=2)
    names = sorted({item.task for item in examples})
    kept, counts = [], {name: collections.Counter() for name in names}
    for example, first, second in zip(examples, inputs, targets, strict=True):
        count = counts[example.task]
        if len(first) >= MAXIMUM_INPUTS or len(second) >= MAXIMUM_TARGETS:
            count["too_long"] += 1
            continue
        count["examples"] += 1
        count["input_tokens"] += len(first) + 1
        count["target_tokens"] += len(second) + 1
        kept.append((names.index(example.task), [*first, EOS], [*second, EOS]))
    flat_inputs, input_offsets = flatten([item[1] for item in kept])
    flat_targets, target_offsets = flatten([item[2] for item in kept])
    arrays = {
        "inputs": flat_inputs,
        "input_offsets": input_offsets,
        "targets": flat_targets,
        "target_offsets": target_offsets,
        "task": np.array([item[0] for item in kept], np.uint8),
        "task_names": np.array(names),
    }
    return arrays, {name: dict(count) for name, count in counts.items()}


def write_labelled(processor, examples, path):
    """Writes what `tokenise` makes of examples to an .npz file; returns the counts."""
    arrays, counts = tokenise(processor, examples)
    np.savez(path, **arrays)
    return counts


def without_task(arrays, task):
    """The arrays of labelled examples without those of a task."""
    names = arrays["task_names"].tolist()
    if task not in names:
        return dict(arrays)
    own = names.index(task)
    kept = arrays["task"] != own
    found = {"task_names": np.array(names[:own] + names[own + 1 :])}
    numbers = arrays["task"][kept]
    found["task"] = np.where(numbers > own, numbers - 1, numbers).astype(np.uint8)
    for kind in ("input", "target"):
        lengths = np.diff(arrays[f"{kind}_offsets"])
        found[f"{kind}s"] = arrays[f"{kind}s"][np.repeat(kept, lengths)]
        found[f"{kind}_offsets"] = np.cumsum([0, *lengths[kept]])
    return found


def joined(known, added):
    """Arrays of labelled examples behind one another; their tasks are different."""
    first = len(known["task_names"])
    names = [*known["task_names"].tolist(), *added["task_names"].tolist()]
    found = {
        "task": np.concatenate([known["task"], added["task"] + first]).astype(np.uint8),
        "task_names": np.array(names),
    }
    for kind in ("input", "target"):
        tokens, offsets = f"{kind}s", f"{kind}_offsets"
        found[tokens] = np.concatenate([known[tokens], added[tokens]])
        found[offsets] = np.concatenate(
            [known[offsets], known[offsets][-1] + added[offsets][1:]]
        )
    return found


def replace_task(processor, examples, path):
    """Adds examples of one task to an .npz file, in place of those that it has of it.

    Args:
      processor: The SentencePieceProcessor.
      examples: A list of Example.
      path: The .npz file.

    Returns:
      Counts of the added ones, as `tokenise` gives them.
    """
    added, counts = tokenise(processor, examples)
    ((task, count),) = counts.items()
    with np.load(path) as known:
        whole = joined(without_task(known, task), added)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **whole)
    partial.rename(path)
    return count
