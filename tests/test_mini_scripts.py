# SPDX-License-Identifier: Apache-2.0
"""The mini's scripts: rows are found however they are written, cards say what was run."""

import importlib
import pathlib
import sys

import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "scripts" / "mini"


@pytest.fixture(scope="module")
def script():
    """Imports a script by its name."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))


def test_a_row_is_found_inside_another_text_whatever_its_spacing(script):
    index = script("leaks").LeakIndex(
        ["A gorgeous , witty and seductive movie .", "too short"]
    )
    texts = [
        "Nothing of it.",
        'He wrote: "a gorgeous, witty and SEDUCTIVE movie". So he did.',
        "It is too short for that.",
        "Too short!",
    ]
    # Short rows count as whole texts alone.
    assert [at for at, _ in index.find(texts)] == [1, 3]


def test_rows_are_found_in_every_batch_of_texts(script):
    leaks = script("leaks")
    row = "six words are in this row"
    filler = "letters and digits " * 1000
    texts = [f"{filler} {row if number % 50 == 7 else ''}" for number in range(400)]
    assert sum(map(len, texts)) > leaks._BATCH_BYTES
    found = [at for at, _ in leaks.LeakIndex([row]).find(texts)]
    assert found == list(range(7, 400, 50))


def test_window_hashes_tell_windows_apart(script):
    leaks = script("leaks")
    data = bytes(np.random.default_rng(0).integers(0, 4, 3000, dtype=np.uint8))
    hashes = leaks.window_hashes(data + data)
    assert len(hashes) == 6000 - leaks.WINDOW + 1
    np.testing.assert_array_equal(hashes[: 3000 - leaks.WINDOW], hashes[3000:][:-1])
    windows = {data[i : i + leaks.WINDOW] for i in range(3000 - leaks.WINDOW)}
    assert len(set(hashes[: 3000 - leaks.WINDOW].tolist())) == len(windows)


def test_a_card_says_what_the_records_say(script):
    record = {
        "run": {
            "config": {"emb_dim": 256, "logits_via_embedding": False},
            "task_weights": {"imdb": 0.1, "bbc": 0.3},
            "batch_size": 32,
            "inputs_length": 192,
            "targets_length": 48,
            "span_corruption": 0.2,
            "prefix_lm": 0.1,
            "distilled": 0.25,
            "start_table": False,
            "seed": 0,
            "optimizer": {"name": "adafactor"},
        },
        "changes": [{"step": 90, "value": "learning_rate", "was": 0.01, "now": 0.02}],
    }
    source = {"package": "somewhere", "licence": "MIT"}
    sources = {
        "text": {"moby": {**source, "tokens": 1234}},
        "labelled": {name: {**source, "examples": 7} for name in ("imdb", "bbc")},
    }
    records = [
        {"split": "train", "step": 100, "loss": 1.0, "learning_rate": 0.003},
        {"split": "validation", "step": 100, "labelled_accuracy": 0.5, "cosine": 0.25},
    ]
    found = {"classes": 2, "majority": 0.5, "tf_idf": 0.7}
    found |= {"embeddings": 0.6, "states": 0.8, "prompt_by_seed": [0.7, 0.8]}
    probed = {"recipe": {"steps": 200}, "tasks": {"offence": found}}
    answered = {"majority class": 0.5, "hand-written: {text} It was": 0.625}
    shown = {"tasks": {"rotten_tomatoes": {"accuracy": answered}}}
    text = script("card").card("tiny", sources, record, records, probed, 4096, shown)
    for line in (
        "| emb_dim | 256 |",
        "| bbc | somewhere | 7 | 0.750 | MIT |",
        "| labelled | 0.450 |",
        "| 100 | 0.500 | 0.250 |",
        "| offence | 2 | 0.500 | 0.700 | 0.600 | 0.800 | 0.750 |",
        "From step 90 on, learning_rate was 0.02, before 0.01.",
        "| rotten_tomatoes | `{text} It was` | 0.625 |",
        "# stopped at step 90",
        "export MODEL=tiny",
        "sh scripts/mini/long_run.sh arrays PACKAGES runs/long 10 runs/model",
    ):
        assert line in text.splitlines()
    assert "768,000 positions" in text and "4,096 sentences" in text
    assert "logits_via_embedding" not in text and "began as" not in text
    change = {"step": 90, "value": "prefix_lm", "was": 0.0, "now": 0.1}
    record["changes"].append(change)
    adapted = script("card").card("a_lm_b", sources, record, records, probed, 1, None)
    assert "export MODEL=a_b" in adapted and "hand-written" not in adapted
    assert "PREFIXES=0.0 sh scripts/mini/long_run.sh arrays PACKAGES" in adapted


def test_no_sentence_of_a_test_pair_is_in_train_of_any_domain(script):
    pairs = script("paraphrase_domains")
    news = [(f"news {n}", f"tidings {n}", "same") for n in range(200)]
    asked = [(f"question {n}?", f"asked {n}?", "different") for n in range(200)]
    # Another domain's test has two of news' sentences, one in either place.
    test = [("NEWS  3 .", "elsewhere", "same"), ("another", "tidings 4", "different")]
    rows, dropped = pairs.apart({"news": (news, []), "asked": (asked, test)})
    assert rows["asked", "test"] == test and dropped == 2
    kept = rows["news", "train"] + rows["news", "validation"]
    assert sorted(kept) == sorted(news[:3] + news[5:])
    assert 5 < len(rows["news", "validation"]) < 40
    # Whole sentences count, in whatever pair they stand: `asked 7?` is validation or not.
    again = [*asked, *((f"asked {n}?", "why?", "same") for n in range(200))]
    rows, dropped = pairs.apart({"asked": (again, [])})
    seen = {text for row in rows["asked", "validation"] for text in row[:2]}
    assert dropped > 10
    assert not seen & {text for row in rows["asked", "train"] for text in row[:2]}


class Letters:
    """A processor whose ids are those of letters."""

    def encode(self, texts, num_threads):
        return [[ord(letter) for letter in text] for text in texts]


def test_examples_of_a_task_replace_those_that_were_there(script, tmp_path):
    arrays, example = script("labelled_arrays"), script("labelled").Example
    path = tmp_path / "labelled.npz"
    make = lambda task, *texts: [example(task, text, text[:1], False) for text in texts]
    read = lambda: {
        (str(names[task]), "".join(map(chr, inputs[a : b - 1])))
        for names, inputs in [(file["task_names"], file["inputs"])]
        for task, a, b in zip(
            file["task"],
            file["input_offsets"][:-1],
            file["input_offsets"][1:],
            strict=True,
        )
    }
    known = make("b", "one", "two", "three") + make("d", "four", "five")
    arrays.write_labelled(Letters(), known, path)
    kept = {("b", t) for t in ("one", "two", "three")} | {("d", "four"), ("d", "five")}
    for task in ("c", "a"):
        for texts in (["seven", "eight"], ["nine"]):
            counts = arrays.replace_task(Letters(), make(task, *texts), path)
            assert counts["examples"] == len(texts)
            with np.load(path) as file:
                assert read() == kept | {(task, text) for text in texts}
                assert file["target_offsets"][-1] == len(file["targets"])
        kept |= {(task, "nine")}
    assert [each.name for each in tmp_path.iterdir()] == ["labelled.npz"]


def test_only_sentences_that_the_teacher_is_sure_of_get_labels(script):
    pytest.importorskip("tokenizers")
    opinions = script("opinions")
    features = np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float16)
    is_praise = features[:, 0] > 0
    # A third of the sentences are not of the opinion of their review.
    noisy = np.where(np.arange(2000) % 3 == 0, ~is_praise, is_praise)
    found = opinions.classify(features, noisy).predict_proba(np.float32(features))[:, 1]
    assert np.mean((found > 0.5) == is_praise) > 0.9
    rows = opinions.sure_rows([f"{n}" for n in range(2000)], found)
    labels = [row.label for row in rows]
    assert 0 < labels.count("positive") == labels.count("negative") < 900
    for row in rows:
        assert (row.label == "positive") == is_praise[int(row.text)] or (
            abs(features[int(row.text), 0]) < 0.5
        )


def test_labels_are_drawn_equally_often(script):
    pairs = script("paraphrase_domains")
    draw = script("domain_files").draw
    rows = [(f"{n}", "b", "same" if n % 4 else "different") for n in range(40)]
    drawn = draw(rows, pairs.LABELS, 100, pairs.digest)
    assert [row[2] for row in drawn] == ["different", "same"] * 10
    assert len(set(drawn)) == 20 and set(drawn) <= set(rows)
    assert draw(rows[::-1], pairs.LABELS, 6, pairs.digest) == drawn[:6]
