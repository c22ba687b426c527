# SPDX-License-Identifier: Apache-2.0
"""Many prompts in one run: each ends where it would alone, whatever the others do."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest

from prompt_tuning import cli, report, trees
from prompt_tuning.checkpoints import prompt_file
from prompt_tuning.devices import sharding
from prompt_tuning.devices.partitioner import Partitioner
from prompt_tuning.errors import UserError
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt, virtual_ids
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.runs import member_specs
from prompt_tuning.training import (
    loop,
    optimizers,
    prompt_lists,
    shared_batches,
)
from prompt_tuning.training.members import Member
from prompt_tuning.training.schedule import Schedule

CONFIG = T5Config(
    vocab_size=64,
    emb_dim=16,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=1,
    head_dim=8,
    mlp_dim=32,
)
KEY = jax.random.key(7)
BASE = jax.jit(Model(Transformer(CONFIG)).init)(jax.random.key(0))
BATCH = 4
ADAFACTOR = optimizers.adafactor(
    0.3, multiply_by_parameter_scale=False, weight_decay_rate=1e-5
)
CLIPPED = optimizers.adamw(
    optimizers.learning_rate_schedule("constant * linear_warmup", 0.1, 2),
    max_grad_norm=0.1,
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A prompt of the tests: what its rows look like, and what moves it."""

    name: str
    length: int
    text: int = 7
    targets: int = 4
    packed: bool = False
    tx: optax.GradientTransformation = ADAFACTOR
    seed: int = 0

    @property
    def start(self) -> np.ndarray:
        draw = np.random.default_rng(self.seed).normal(size=(self.length, 16))
        return draw.astype(np.float32)

    @property
    def tuned(self) -> dict:
        return {"prompts": {self.name: self.start}}

    def batch(self, number: int) -> dict[str, np.ndarray]:
        """Rows whose ids from V on are positions of this prompt alone."""
        rng = np.random.default_rng([self.seed, number])
        rows = [self._row(rng) for _ in range(BATCH)]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

    def _row(self, rng) -> dict[str, np.ndarray]:
        examples = 2 if self.packed else 1
        room = {"encoder": self.length + self.text, "decoder": self.targets}
        row = {
            f"{side}_{what}": np.zeros(examples * room[side], np.int32)
            for side in room
            for what in ("input_tokens", "segment_ids")
        }
        row["decoder_target_tokens"] = np.zeros_like(row["decoder_input_tokens"])
        at = dict.fromkeys(room, 0)
        for segment in range(1, examples + 1):
            text = rng.integers(2, 64, rng.integers(2, self.text + 1))
            ids = np.concatenate([64 + np.arange(self.length), text])
            target = np.append(rng.integers(2, 64, rng.integers(1, self.targets)), 1)
            for side, tokens in (("encoder", ids), ("decoder", target)):
                here = slice(at[side], at[side] + len(tokens))
                row[f"{side}_segment_ids"][here] = segment
                if side == "encoder":
                    row["encoder_input_tokens"][here] = tokens
                else:
                    row["decoder_target_tokens"][here] = tokens
                    row["decoder_input_tokens"][here] = [0, *tokens[:-1]]
                at[side] += len(tokens)
        if not self.packed:
            del row["encoder_segment_ids"], row["decoder_segment_ids"]
        weights = row["decoder_target_tokens"] > 0
        return {**row, "decoder_loss_weights": weights.astype(np.float32)}

    def batches(self, start: int):
        while True:
            yield self.batch(start)
            start += 1


# They differ in rows, lengths of everything, optimizers and learning rates.
KINDS = (
    Kind("a", 3),
    Kind("b", 5, text=9, targets=6, tx=CLIPPED, seed=1),
    Kind(
        "c", 3, tx=optimizers.adafactor(0.03, multiply_by_parameter_scale=False), seed=2
    ),
)
STEPS = Schedule(4, log_period=1)


def norm(tuned, frozen):
    """A metric that only depends on the prompt."""
    (prompt,) = tuned["prompts"].values()
    return {"score": -float(np.linalg.norm(np.asarray(prompt)))}


def network(kinds, factor=None):
    bank = tuple(Prompt(kind.name, kind.length) for kind in kinds)
    model = Model(Transformer(CONFIG, bank), loss_normalizing_factor=factor)
    return model


def together(kinds, schedule=STEPS, factor=None, evaluate=None, frozen=BASE, **more):
    """Runs them as one; ``evaluate`` gives each prompt's evaluation by its name."""
    everyone = [
        Member(
            kind.name,
            kind.tuned,
            kind.tx,
            kind.batches,
            evaluate and evaluate(kind.name),
        )
        for kind in kinds
    ]
    more = {"key": KEY, "quiet": True, **more}
    return loop.fit(network(kinds, factor), frozen, everyone, schedule, **more)


def single(kind, *args, **more):
    """Runs one by itself."""
    return together([kind], *args, **more)[kind.name]


def assert_same(found, expected):
    """Results to float32 rounding."""
    assert (found.step, found.last_step) == (expected.step, expected.last_step)
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)
    assert found.metrics.keys() == expected.metrics.keys()
    for name, leaf in trees.flatten(expected.tuned).items():
        np.testing.assert_allclose(
            trees.flatten(found.tuned)[name], leaf, rtol=1e-5, atol=2e-5
        )


# Equality.


@pytest.mark.parametrize("factor", [None, "NUM_REAL_TARGET_TOKENS"])
def test_each_prompt_ends_where_its_own_run_would(factor):
    kinds = KINDS[:2]
    found = together(kinds, factor=factor)
    for kind in kinds:
        assert_same(found[kind.name], single(kind, factor=factor))
        moved = found[kind.name].tuned["prompts"][kind.name] - kind.start
        assert np.abs(moved).min() > 1e-3


@pytest.mark.parametrize(
    "factor",
    [
        pytest.param("AVERAGE_PER_SEQUENCE", marks=pytest.mark.slow),
        "NUM_TOTAL_TARGET_TOKENS",
    ],
)
def test_so_does_each_of_packed_rows(factor):
    kinds = [dataclasses.replace(kind, packed=True) for kind in KINDS[:2]]
    found = together(kinds, factor=factor)
    for kind in kinds:
        assert_same(found[kind.name], single(kind, factor=factor))


def test_microbatches_and_another_company_change_nothing():
    factor = "NUM_REAL_TARGET_TOKENS"
    pair = together(KINDS[:2], factor=factor)
    three = together(KINDS, factor=factor, num_microbatches=2)
    for name in ("a", "b"):
        assert_same(three[name], pair[name])


def test_what_clips_one_prompts_gradient_does_not_see_the_others():
    kinds = {
        kind.name: kind
        for kind in (KINDS[1], dataclasses.replace(KINDS[1], name="d", seed=9))
    }
    tuned = {name: kind.tuned for name, kind in kinds.items()}
    grads = jax.tree.map(lambda leaf: leaf**3, tuned)
    tx = optimizers.by_member({name: kind.tx for name, kind in kinds.items()})
    state = tx.init(tuned)
    own = {name: kind.tx.init(kind.tuned) for name, kind in kinds.items()}
    for _ in range(3):
        updates, state = tx.update(grads, state, tuned)
        for name, kind in kinds.items():
            expected, own[name] = kind.tx.update(grads[name], own[name], kind.tuned)
            jax.tree.map(np.testing.assert_array_equal, updates[name], expected)
    jax.tree.map(np.testing.assert_array_equal, state, own)


def test_on_eight_devices_rows_are_filled_up(tmp_path):
    """Three times four rows do not divide over eight devices; nor do two times."""
    evaluate = stops_early("b")
    schedule = Schedule(6, eval_period=2, patience=1, log_period=1)
    expected = together(KINDS, schedule, evaluate=evaluate)
    partitioner = Partitioner()
    assert partitioner.mesh.shape[sharding.DATA] == 8
    frozen = sharding.replicate(BASE, partitioner.mesh)
    found = together(
        KINDS, schedule, evaluate=evaluate, frozen=frozen, partitioner=partitioner
    )
    for name, result in expected.items():
        assert_same(found[name], result)
    assert found["b"].last_step == 4


# Leaving.


def stops_early(*names):
    """Evaluations that are the best at step 2 for these prompts, and rise for others."""

    def evaluate(name):
        seen = []

        def metrics(tuned, frozen):
            seen.append(norm(tuned, frozen))
            better = len(seen) == 1 or name not in names
            return {"score": float(len(seen)) if better else 0.0}

        return metrics

    return evaluate


EARLY = Schedule(14, 2, 2, log_period=1, patience=2)


def test_a_prompt_that_stopped_leaves_the_batch_to_the_others():
    drawn = {kind.name: 0 for kind in KINDS}

    class Counted(Kind):
        def batches(self, start):
            for batch in super().batches(start):
                drawn[self.name] += 1
                yield batch

    counted = [Counted(**vars(kind)) for kind in KINDS]
    found = together(counted, EARLY, evaluate=stops_early("a"))
    # Some batches are drawn ahead of the step; those of others are not drawn twice.
    assert 6 <= drawn["a"] <= 9 and 14 <= drawn["b"] == drawn["c"] <= 17
    assert (found["a"].step, found["a"].last_step) == (2, 6)
    for kind in KINDS:
        assert_same(found[kind.name], single(kind, EARLY, evaluate=stops_early("a")))


def test_a_resumed_run_of_many_equals_the_uninterrupted_one(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    # Evaluated by what is the same after an interruption.
    evaluate = lambda name: (
        lambda tuned, frozen: (
            norm(tuned, frozen)
            if name == "c"
            else {"score": -norm(tuned, frozen)["score"]}
        )
    )
    schedule = dataclasses.replace(EARLY, steps=7, patience=1)
    expected = together(KINDS, schedule, evaluate=evaluate, model_dir=whole)
    assert min(r.last_step for r in expected.values()) < 5
    assert max(r.last_step for r in expected.values()) == 7
    for steps in (5, 7):
        part = dataclasses.replace(schedule, steps=steps)
        found = together(KINDS, part, evaluate=evaluate, model_dir=parts)
    for name, result in expected.items():
        assert (found[name].step, found[name].last_step, found[name].loss) == (
            result.step,
            result.last_step,
            result.loss,
        )
        jax.tree.map(np.testing.assert_array_equal, found[name].tuned, result.tuned)
    # The first part ends at a step that the whole run does not evaluate.
    records = [
        [r for r in report.read_metrics(folder) if r["split"] == "train"]
        for folder in (whole, parts)
    ]
    assert records[0] == records[1] and {r["member"] for r in records[0]} == set("abc")
    again = together(KINDS, schedule, evaluate=evaluate, model_dir=parts)
    assert {n: r.last_step for n, r in again.items()} == {
        n: r.last_step for n, r in expected.items()
    }


def test_a_run_of_other_prompts_is_not_resumed(tmp_path):
    schedule = Schedule(2, checkpoint_period=1)
    together(KINDS[:2], schedule, model_dir=tmp_path)
    with pytest.raises(UserError, match="other prompts.*another MODEL_DIR"):
        together(KINDS, schedule, model_dir=tmp_path)
    with pytest.raises(UserError, match="other prompts.*another MODEL_DIR"):
        single(KINDS[0], schedule, model_dir=tmp_path)


def test_a_prompt_that_diverges_leaves_the_others_alone():
    bad = dataclasses.replace(KINDS[1], tx=optax.sgd(float("nan")))
    found = together([KINDS[0], bad, KINDS[2]])
    assert set(found) == {"a", "c"}
    assert_same(found["a"], single(KINDS[0]))
    with pytest.raises(UserError, match="the loss is nan at step 2"):
        together([bad])


def test_frozen_leaves_are_untouched():
    before = trees.fingerprint(BASE)
    together(KINDS[:1], evaluate=lambda name: norm)
    assert trees.fingerprint(BASE) == before


# Mixing.


def test_a_mixed_batch_holds_the_rows_of_all():
    bank = [Prompt("a", 3), Prompt("b", 5)]
    streams = {kind.name: kind.batches(0) for kind in KINDS[:2]}
    batch = next(
        shared_batches.Mixed(streams, bank, 64, [p.name for p in bank], multiple=3)
    )
    a, b = (kind.batch(0) for kind in KINDS[:2])
    tokens = batch["encoder_input_tokens"]
    assert tokens.shape == (9, 14) and batch["decoder_target_tokens"].shape == (9, 6)
    np.testing.assert_array_equal(tokens[:4, :10], a["encoder_input_tokens"])
    ids = virtual_ids(bank, 64)
    np.testing.assert_array_equal(tokens[4:8, :5], np.tile(ids["b"], (4, 1)))
    np.testing.assert_array_equal(tokens[4:8, 5:], b["encoder_input_tokens"][:, 5:])
    assert batch["prompt_index"].tolist() == [0] * 4 + [1] * 4 + [0]
    assert batch["targets_length"].tolist() == [4] * 4 + [6] * 4 + [0]
    for name in a:
        assert (
            not batch[name][8].any() and not batch[name][:4, a[name].shape[1] :].any()
        )
        assert batch[name].dtype == a[name].dtype


# What users write.


@pytest.mark.parametrize(
    ("prompts", "names"),
    [
        ([{"seed": [0, 1]}], ["seed_0", "seed_1"]),
        (
            [{"learning_rate": [0.1, 1e-3]}],
            ["learning_rate_0.1", "learning_rate_0.001"],
        ),
        (
            [{"seed": [0, 1], "prompt_length": [5, 20]}],
            [
                "prompt_length_5-seed_0",
                "prompt_length_5-seed_1",
                "prompt_length_20-seed_0",
                "prompt_length_20-seed_1",
            ],
        ),
        ([{"name": "x", "seed": 3}, {"seed": 4}], ["x", "seed_4"]),
        ([{"name": "x", "seed": [3, 4]}], ["x-seed_3", "x-seed_4"]),
        ([{"mixture_or_task_name": ["a/b", "c"]}], ["a_b", "c"]),
        (
            [{"prompt_init": ["text:a film", "random"]}],
            ["prompt_init_text_a_film", "prompt_init_random"],
        ),
        ([{}], ["prompt"]),
    ],
)
def test_names_are_made_of_what_differs(prompts, names):
    found = prompt_lists.expand(prompts, tuple(member_specs.OWN_VALUES))
    assert [each.name for each in found] == names


def test_the_values_of_a_combination_are_its_own():
    found = prompt_lists.expand([{"name": "x", "seed": [3, 4]}], ["seed"])
    assert [each.values for each in found] == [{"seed": 3}, {"seed": 4}]


@pytest.fixture
def arguments(tmp_path, train_words):
    """Words of the command for a folder and what differs."""
    return lambda folder, **values: train_words(
        **{
            "MODEL_DIR": tmp_path / folder,
            "MIXTURE_OR_TASK_NAME": "many_reviews",
            "EVAL_PERIOD": 2,
            **values,
        }
    )


@pytest.mark.slow
def test_one_command_equals_the_runs_it_stands_for(arguments, tmp_path, capsys):
    """Seeds, learning rates, lengths and initialisations through the command line."""
    prompts = [
        {"seed": [1, 2], "learning_rate": 0.1},
        {"name": "long", "prompt_length": 5, "prompt_init": "class_labels"},
    ]
    assert cli.main(arguments("many", PROMPTS=prompts)) == 0
    shown = capsys.readouterr()
    results = json.loads(shown.out)
    assert json.loads((tmp_path / "many/results.json").read_text()) == results
    names = {"seed_1-learning_rate_0.1", "seed_2-learning_rate_0.1", "long"}
    assert {row["name"] for row in results["members"]} == names
    assert all(name in shown.err for name in names)
    scores = [row["selected_by"] for row in results["members"]]
    assert scores == sorted(scores, reverse=True)
    assert results["best"] == {"many_reviews": results["members"][0]["name"]}
    assert f"the best on many_reviews: {results['members'][0]['name']}" in shown.err
    for name, values in (
        ("seed_2-learning_rate_0.1", {"SEED": 2, "LEARNING_RATE": 0.1}),
        ("long", {"PROMPT_LENGTH": 5, "Tuning.prompt_init": "class_labels"}),
    ):
        assert cli.main(arguments(name, **values)) == 0
        found, card = prompt_file.load_prompt(
            tmp_path / "many/prompts" / f"{name}.safetensors"
        )
        expected, same_card = prompt_file.load_prompt(
            tmp_path / name / "prompt.safetensors"
        )
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)
        assert card == same_card
        (row,) = (row for row in results["members"] if row["name"] == name)
        run = json.loads((tmp_path / name / "results.json").read_text())["members"][0]
        for key in ("best_step", "last_step", "validation"):
            assert row[key] == run[key]
    # What it wrote gives the same run: every learning rate is still its own.
    again = tmp_path / "again.gin"
    text = (tmp_path / "many/config.gin").read_text()
    again.write_text(text.replace(str(tmp_path / "many"), str(tmp_path / "copy")))
    assert cli.main(["train", f"--gin_file={again}"]) == 0
    copied = json.loads((tmp_path / "copy/results.json").read_text())
    took = {"pace": None, "cost": None}
    assert copied | took == results | took
    assert (tmp_path / "many/learning_curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"PROMPTS": [{"sed": 1}]}, "PROMPTS cannot set 'sed'"),
        ({"PROMPTS": []}, "PROMPTS names no prompt"),
        ({"PROMPTS": {"seed": 1}}, "must be a list, each item a dict"),
        ({"PROMPTS": [{"seed": 1}, {"seed": 1}]}, "give each dict its own 'name'"),
        (
            {"PROMPTS": [{"seed": "one"}]},
            "PROMPTS: seed='one' must be a whole number from 0",
        ),
        ({"PROMPTS": [{"prompt_init": "magic"}]}, "no prompt_init is called 'magic'"),
        ({"PROMPTS": [{"learning_rate": -1.0}]}, "must be a number above 0"),
        (
            {"PROMPTS": [{}, {"mixture_or_task_name": "byt5_rotten_tomatoes"}]},
            "vocabulary",
        ),
        (
            {"PROMPTS": [{}, {"mixture_or_task_name": "roten_tomatoes"}]},
            "rotten_tomatoes",
        ),
        (
            {"PROMPTS": [{"learning_rate": 0.1}], "adafactor.learning_rate": 0.3},
            "uses no LEARNING_RATE",
        ),
        (
            {"PROMPTS": [{"seed": 1}], "METHOD": "model_tuning"},
            "leave PROMPTS out",
        ),
        ({"PROMPTS": [{"prompt_length": 0}]}, "PROMPT_LENGTH=0 must be 1 or more"),
        ({"PROMPTS": [{"method": "absent"}]}, "no method is called 'absent'; choose"),
        ({"PROMPTS": [{"method": "model_tuning"}]}, "is no prompt: model_tuning"),
        (
            {"PROMPTS": [{"method": "decomposed_prompt", "prompt_init": "random"}]},
            "decomposed_prompt has a start of its own",
        ),
        (
            {"PROMPTS": [{"method": ["lora", "deep_prompt"], "prompt_length": 3}]},
            "'method_lora': lora has no prompt, so prompt_length=3 would change nothing",
        ),
        (
            {"METHOD": "ia3", "PROMPT_LENGTH": 3},
            "ia3 has no prompt, so PROMPT_LENGTH=3 would change nothing",
        ),
        (
            {"METHOD": "lora", "PROMPT_LENGTH": 0, "PROMPT_INIT": "random"},
            "lora has no prompt, so PROMPT_INIT='random' would change nothing",
        ),
        ({"PROMPT_LENGTH": 0}, "PROMPT_LENGTH=0 must be 1 or more"),
    ],
)
def test_a_mistake_in_the_list_is_one_line(change, says, arguments, capsys):
    assert cli.main(arguments("run", **change)) == 2
    (line,) = (
        x for x in capsys.readouterr().err.splitlines() if x.startswith("prompt-tuning")
    )
    assert says in line
