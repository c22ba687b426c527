# SPDX-License-Identifier: Apache-2.0
"""`prompt-tuning audit` asks the engine, compares groups, and ends with a code for CI."""

import json

import numpy as np
import pytest

from prompt_tuning import cli
from prompt_tuning.checkpoints import base_models, prompt_file
from prompt_tuning.commands import audit, evaluate
from prompt_tuning.data import fairness
from prompt_tuning.data.local_task import LocalTask
from prompt_tuning.errors import UserError
from prompt_tuning.inference import audits
from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.store import PromptStore
from prompt_tuning.network.transformer import T5Config

CONFIG = T5Config(8192, 16, 2, 1, 1, 8, 32)
TEMPLATE = "{prompt} review: {sentence}"
LABELS = ["good", "bad"]
THINGS = ("film", "book", "song", "play", "dull story", "fine tale", "joke", "poem")
PEOPLE = [
    {
        "sentence": f"{who} saw the {thing} {times} times",
        # Unlike shares of labels, so that whatever is answered has a gap in accuracy.
        "label": LABELS[(i + times) % (2 if who == "He" else 4) > 0],
        "sex": who.lower(),
        # To the engine these would be options.
        "labels": "x",
        "combine": "y",
        "one": "z",
    }
    for i, thing in enumerate(THINGS)
    for times in (2, 3, 5)
    for who in ("He", "She")
]


@pytest.fixture(scope="module")
def source(tiny_checkpoint):
    return base_models.load(CONFIG, tiny_checkpoint)


@pytest.fixture(scope="module")
def prompts(source, tmp_path_factory):
    """Two prompts with labels, and one for free text."""
    folder, random = tmp_path_factory.mktemp("prompts"), np.random.default_rng(0)
    paths = []
    for name, labels in (("a", LABELS), ("b", LABELS), ("free", None)):
        card = {"base_model": source.identity, "vocabulary": "mini", "labels": labels}
        array = random.normal(scale=5, size=(3, 16)).astype(np.float32)
        paths.append(str(folder / f"{name}.safetensors"))
        prompt_file.save_prompt(paths[-1], array, card | {"template": TEMPLATE})
    return paths


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    path = tmp_path_factory.mktemp("people") / "people.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PEOPLE))
    return str(path)


@pytest.fixture(scope="module")
def pronouns(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "pronouns.tsv"
    path.write_text("he\tshe\n")
    return str(path)


@pytest.fixture
def audited(tiny_checkpoint, prompts, people, tmp_path):
    """What is found of prompt ``a``, or of others."""

    def run(numbers=(0,), **more):
        output = tmp_path / "audit.json"
        values = {
            "prompt_files": [prompts[i] for i in numbers],
            "input_file": people,
            "bootstrap_samples": 50,
            **more,
        }
        audit.audit(
            config=CONFIG,
            initial_checkpoint_path=str(tiny_checkpoint),
            output_file=str(output),
            batch_size=8,
            **values,
        )
        return json.loads(output.read_text())

    return run


def test_figures_are_those_of_the_engines_answers(
    audited, prompts, source, pronouns, capsys
):
    found = audited((0, 1), group_column="sex", swap_file=pronouns)
    assert list(found["prompts"]) == ["a", "b"] and found["over"] == []
    store = PromptStore(source, 8)
    for path in prompts[:2]:
        store.load(path)
    engine = Engine(source, store, batch_sizes=(8,), longest=32)
    texts = [row["sentence"] for row in PEOPLE]
    other = [
        text.replace("He", "x").replace("She", "He").replace("x", "She")
        for text in texts
    ]
    for name in "ab":
        said, after = (
            [
                row["answer"]
                for row in engine.answer({"prompt": name, "text": x} for x in each)
            ]
            for each in (texts, other)
        )
        targets, groups = ([row[k] for row in PEOPLE] for k in ("label", "sex"))
        want = fairness.of_groups(said, targets, groups, "bad", 50)
        told = found["prompts"][name]
        assert {k: told[k] for k in want} == json.loads(json.dumps(want))
        test = told["counterfactual"]
        changed = [i for i, pair in enumerate(zip(said, after)) if pair[0] != pair[1]]
        assert (test["rows"], test["changed"]) == (len(PEOPLE), len(changed))
        assert test["percent"] == 100 * len(changed) / len(PEOPLE)
        assert [each["row"] - 1 for each in test["changes"]] == changed
        assert [each["after"]["sentence"] for each in test["changes"]] == [
            other[i] for i in changed
        ]
        assert sum(n for row in test["from_to"].values() for n in row.values()) == 48
    out = capsys.readouterr().out
    assert "a: 48 rows" in out and "words exchanged in 48 rows" in out
    gaps = [found["prompts"][name]["gaps"]["accuracy"]["gap"] for name in "ab"]
    assert max(gaps) > 0


def test_eval_gives_the_same_figures(audited, prompts, people, tiny_checkpoint):
    options = {"group_column": "sex", "bootstrap_samples": 50}
    found = evaluate.evaluate(
        config=CONFIG,
        initial_checkpoint_path=str(tiny_checkpoint),
        mixture_or_task_name="audited_people",
        local_task=LocalTask({"test": people}, None, label_names=LABELS),
        task_feature_lengths={"inputs": 24, "targets": 4},
        prompt_file=prompts[0],
        batch_size=8,
        **options,
    )
    want = audited(**options)["prompts"]["a"]
    assert json.loads(json.dumps(found["fairness"])) == {
        key: want[key] for key in found["fairness"]
    }
    with pytest.raises(
        UserError, match="GROUP_COLUMN='sex' is a column of local files"
    ):
        evaluate.evaluate(
            config=CONFIG,
            initial_checkpoint_path=str(tiny_checkpoint),
            # It is registered by now, and no longer said to be of files.
            mixture_or_task_name="audited_people",
            task_feature_lengths={"inputs": 24, "targets": 4},
            **options,
        )


def test_exit_codes(prompts, people, pronouns, tiny_checkpoint, capsys):
    def code(*words):
        return cli.main(
            [
                "audit",
                "--gin_file=models/tiny.gin",
                f"--initial_checkpoint_path={tiny_checkpoint}",
                f"--input_file={people}",
                "--bootstrap_samples=0",
                "--eval_batch_size=8",
                *words,
            ]
        )

    groups = ["--group_column=sex", prompts[0]]
    assert code(*groups, "--max_gap=100") == 0
    out, err = capsys.readouterr()
    assert "gap" in out and "prompt-tuning:" not in err
    swaps = f"--swap_file={pronouns}"
    assert code(*groups, prompts[1], swaps, "--max_changed=100", "--max_gap=0") == 1
    out, err = capsys.readouterr()
    assert "words exchanged" in out
    assert err.splitlines()[-1].startswith(
        "prompt-tuning: over the threshold: accuracy"
    )
    assert code(*groups, "--max_gap={'acuracy': 3}") == 2
    assert "MAX_GAP has 'acuracy': choose from accuracy" in capsys.readouterr().err
    assert code(*groups, "--max_gap=-1") == 2
    assert "MAX_GAP=-1 must be a number of at least 0" in capsys.readouterr().err


def test_a_threshold_on_changed_answers(audited, prompts, pronouns, tmp_path):
    """A prompt that the pronouns sway: just under its figure, and at it."""
    array, card = prompt_file.load_prompt(prompts[0])
    path = str(tmp_path / "swayed.safetensors")
    prompt_file.save_prompt(path, array, {**card, "labels": ["place", "true"]})
    options = {"prompt_files": [path], "swap_file": pronouns}
    found = audited(**options)["prompts"]["swayed"]["counterfactual"]
    percent = found["percent"]
    assert found["changed"] > 0 and percent == 100 * found["changed"] / len(PEOPLE)
    assert audited(**options, max_changed=percent)["over"] == []
    with pytest.raises(audit.UnfairError, match=f"{audits.CHANGED} of swayed .* > "):
        audited(**options, max_changed=percent - 0.5)
    (over,) = json.loads((tmp_path / "audit.json").read_text())["over"]
    assert over == {
        "prompt": "swayed",
        "figure": audits.CHANGED,
        "value": percent,
        "limit": percent - 0.5,
    }


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"numbers": ()}, "no prompt to audit"),
        ({"input_file": None}, "INPUT_FILE is not set"),
        ({"input_file": "empty"}, "empty.tsv has no rows: give another INPUT_FILE"),
        ({"group_column": None}, "nothing to look for"),
        ({"group_column": "race"}, "row 1: GROUP_COLUMN='race' is no column of it"),
        ({"group_column": "labels"}, "has only the value 'x'"),
        ({"numbers": (0, 0)}, "two of the prompts are called 'a'"),
        ({"numbers": (2,)}, "the answers here are free text"),
        ({"positive_label": "fine"}, "POSITIVE_LABEL is 'fine', which is no label"),
        ({"label_names": ["no", "yes"]}, "LABEL_NAMES are no, yes, the prompt's"),
        ({"max_changed": 3.0}, "MAX_CHANGED is of exchanged words"),
        ({"swap_file": "rare"}, "no row holds a word of SWAP_FILE"),
        ({"target_column": "one"}, "line 1: label 'z' is none of"),
    ],
)
def test_refused(change, says, audited, tmp_path):
    (tmp_path / "rare.tsv").write_text("xylophone\tharp\n")
    (tmp_path / "empty.tsv").write_text("")
    if change.get("input_file") == "empty":
        change["input_file"] = str(tmp_path / "empty.tsv")
    if "swap_file" in change:
        change["swap_file"] = str(tmp_path / "rare.tsv")
    with pytest.raises(UserError, match=says):
        audited(**{"group_column": "sex"} | change)
    assert not (tmp_path / "audit.json").exists()


def test_a_threshold_on_a_figure_that_a_group_lacks(audited, tmp_path):
    path = tmp_path / "people.tsv"
    path.write_text("sentence\tlabel\tsex\nok\tbad\tx\nno\tgood\ty\n")
    options = {"input_file": str(path), "group_column": "sex"}
    with pytest.raises(UserError, match="group 'y' has no row whose target is 'bad'"):
        audited(**options, max_gap=5.0)
    found = audited(**options, max_gap={"accuracy": 100.0})
    assert found["prompts"]["a"]["gaps"]["true_positive_rate"] is None
