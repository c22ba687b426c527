# SPDX-License-Identifier: Apache-2.0
"""`prompt-tuning inspect` says what prompts, models and runs hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from prompt_tuning import trees
from prompt_tuning.checkpoints import base_models, formats, model_file, prompt_file
from prompt_tuning.commands import convert, inspect
from prompt_tuning.errors import UserError
from prompt_tuning.inference import prompt_view
from prompt_tuning.training import optimizers
from prompt_tuning.training.run_checkpoints import Checkpoints
from prompt_tuning.training.step import TrainState

NORM = {"grad_norm": np.float32(1)}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tiny_params):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model_file.save_model(folder, tiny_params, {"source": {"steps": 7}}, "bfloat16")
    return folder


@pytest.fixture
def prompt_path(tmp_path, tiny_params):
    """Position 0 points along token 17, position 1 against token 99."""
    table = np.asarray(tiny_params["token_embedder"]["embedding"])
    prompt = np.stack([3 * table[17], -2 * table[99]])
    card = {"task": "sentiment[/b]", "base_model": {"name": "tiny"}}
    prompt_file.save_prompt(tmp_path / "p.safetensors", prompt, card)
    return tmp_path / "p.safetensors"


def shown(capsys, *args) -> str:
    inspect.show(*args)
    return capsys.readouterr().out


def test_a_prompt_shows_its_card_norms_and_range(capsys, prompt_path):
    prompt, _ = prompt_file.load_prompt(prompt_path)
    text = shown(capsys, prompt_path)
    assert "sentiment[/b]" in text and "base_model.name" in text
    assert f"{np.linalg.norm(prompt, axis=1).mean():.4g} (" in text
    assert f"{prompt.min():.4g} to {prompt.max():.4g}" in text
    assert "nearest" not in text


def test_a_base_model_names_the_nearest_tokens(
    capsys, prompt_path, model_folder, tiny_params
):
    text = shown(capsys, prompt_path, str(model_folder))
    assert "17 1.00" in text and "99 -1.00" not in text
    table = np.asarray(tiny_params["token_embedder"]["embedding"])
    prompt, _ = prompt_file.load_prompt(prompt_path)
    ids, cosines = prompt_view.nearest_tokens(prompt, table, count=256)
    assert ids[0, 0] == 17 and ids[1, -1] == 99
    np.testing.assert_allclose(cosines[:, [0, -1]][[0, 1], [0, 1]], [1, -1], rtol=1e-5)
    assert np.all(np.diff(cosines, axis=1) <= 0)


def test_a_prompt_of_another_width_has_no_neighbours(tmp_path, model_folder):
    path = tmp_path / "p.safetensors"
    prompt_file.save_prompt(path, np.ones((2, 48), np.float32), {})
    with pytest.raises(UserError, match="width 48, the model .* has width 32"):
        inspect.inspect(path, str(model_folder))


def test_a_model_shows_counts_dtypes_bytes_sizes_and_metadata(
    capsys, model_folder, tiny_params
):
    count = sum(leaf.size for leaf in jax.tree.leaves(tiny_params))
    for path in (model_folder, model_folder / "model.safetensors"):
        text = shown(capsys, path)
        assert f"{count:,} in" in text and f"{2 * count:,}" in text
        assert "bfloat16 (" in text
        assert "num_encoder_layers" in text and "source.steps" in text


def test_a_run_shows_steps_best_and_its_prompt(capsys, tmp_path, prompt_path):
    tuned = {"task": {"prompts": {"task": jnp.ones((2, 32))}}}
    state = TrainState.create(tuned, optimizers.adamw(0.1), jax.random.key(0))
    runs = Checkpoints(tmp_path, 2)
    runs.save(10, state, {"batch": 10}, {"members": {"task": {"best": None}}})
    assert "no evaluation yet" in shown(capsys, tmp_path)
    best = {"accuracy": 0.625, "tuned": list(range(99))}
    runs.save(20, state, {"batch": 20}, {"members": {"task": {"best": best}}})
    text = shown(capsys, tmp_path)
    assert "10, 20" in text
    assert "0.625" in text and "99 values" in text
    assert "base_model.name" in text


@pytest.mark.parametrize(
    ("name", "norm"), [("sst2", "1385"), ("mrpc", "867.7"), ("rte", "903.3")]
)
def test_released_prompts_show_their_norms(name, norm, shared, capsys):
    path = shared / "released_prompts" / f"t5_1_1_lm100k_base_{name}.npy"
    text = shown(capsys, path)
    assert f"{norm} (" in text and "npy" in text and "length" in text


def test_models_of_other_formats_show_their_sizes(capsys, tmp_path, tiny_params):
    model_file.save_model(tmp_path / "own", tiny_params, {})
    for format in ("t5x", "huggingface"):
        convert.convert(str(tmp_path / "own"), str(tmp_path / format), to=format)
        text = shown(capsys, tmp_path / format)
        assert format in text and "num_decoder_layers" in text
        assert f"{trees.count(tiny_params):,} in" in text


def test_a_t5x_checkpoint_shows_its_model_and_its_prompt(t5x_checkpoints, capsys):
    text = shown(capsys, t5x_checkpoints / "t5x_native" / "prompt")
    assert "encoder/prompt/prompt/prompt" in text and "norm of rows" in text
    assert "rows alike" in text and "mlp_dim" in text


def test_a_prompt_is_drawn(capsys, tmp_path, prompt_path):
    picture = tmp_path / "prompt.png"
    assert str(picture) in shown(capsys, prompt_path, None, str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="draws one prompt, .* holds 0"):
        model_file.save_model(tmp_path / "m", {"a": np.ones((2, 2), np.float32)}, {})
        inspect.inspect(tmp_path / "m", None, str(picture))


def test_rows_that_say_the_same_are_counted(prompt_path, model_folder, capsys):
    prompt, _ = prompt_file.load_prompt(prompt_path)
    rows = np.concatenate([prompt, 2 * prompt[:1], prompt[:1]])
    facts = prompt_view.facts(rows)
    assert facts["rows alike"].startswith("3 of 6 pairs")
    prompt_file.save_prompt(prompt_path, rows, {})
    text = shown(capsys, prompt_path, str(model_folder))
    assert "nearest to several positions: 17 3 times" in text


def test_other_paths_are_one_line(tmp_path):
    with pytest.raises(UserError, match="an empty path names nothing"):
        inspect.inspect("")
    (tmp_path / "notes").write_text("hello")
    for path, cure in (
        (tmp_path, "is no prompt, model or MODEL_DIR"),
        (tmp_path / "absent", "there is no folder .*absent; give the folder"),
        (tmp_path / "notes", "is not a prompt file"),
        ("embedded:absent", "is embedded"),
    ):
        with pytest.raises(UserError, match=cure) as caught:
            inspect.inspect(path)
        assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes"]


def test_escape_sequences_are_shown_and_not_obeyed(capsys, tmp_path):
    card = {"task": "x\x1b[2J\x1b]0;title\x07y", "labels": ["a\x9b2Jb", "\u202ec"]}
    path = tmp_path / "p.safetensors"
    prompt_file.save_prompt(path, np.ones((2, 8), np.float32), card)
    text = shown(capsys, path)
    assert r"x\x1b[2J\x1b]0;title\x07y" in text
    assert r"a\x9b2Jb" in text and r"\u202ec" in text
    assert not set(text) & {"\x1b", "\x07", "\x9b", "\u202e"}


def test_the_files_of_a_run_say_what_they_hold(capsys, tmp_path, monkeypatch):
    from prompt_tuning import report

    # Paths of temporary folders are long, and are looked for in a line.
    monkeypatch.setenv("COLUMNS", "300")
    with report.Log(tmp_path, 20, 0, ["mine"], quiet=True) as log:
        for step in (10, 20):
            metrics = {"weight": 2, "token_loss": 8 / step, "correct": 1}
            record = {k: np.float32(v) for k, v in metrics.items()} | NORM
            log.training(step, "mine", [record])
            log.validation(step, "mine", {"accuracy": 50.0 + step})
    (tmp_path / "results.json").write_text('{"task": "mine", "best_step": 20}')
    (tmp_path / "config.gin").write_text("import os\nTRAIN_STEPS = 20\n")
    whole = shown(capsys, tmp_path)
    for name in ("metrics.jsonl", "results.json", "config.gin", "tensorboard"):
        alone = shown(capsys, tmp_path / name)
        lines = [line for line in alone.splitlines() if name in line]
        assert lines and all(line in whole for line in lines)
    assert "best_step" in whole and "TRAIN_STEPS" in whole and "not run" in whole
    assert "2 records, the last: step 20, accuracy 70" in whole
    assert "validation/accuracy" in whole and "70 at step 20" in whole
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"split": "tr')
    assert "1 lines, the first is 5" in shown(capsys, tmp_path / "metrics.jsonl")


def test_data_files_say_what_they_hold(capsys, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2, "b": 3}\n{\n')
    text = shown(capsys, path)
    assert "a (in 2), b (in 1)" in text and "1 rows, the first in line 3" in text


def test_prompts_of_a_sweep_are_found_below_their_run(capsys, tmp_path):
    for name in ("a", "b"):
        path = tmp_path / "prompts" / f"{name}.safetensors"
        prompt_file.save_prompt(path, np.ones((2, 8), np.float32), {"task": name})
    text = shown(capsys, tmp_path)
    text = text.replace("\n", "")
    assert "prompts/a.safetensors" in text and "prompts/b.safetensors" in text


def test_a_picture_is_not_drawn_over_its_prompt(prompt_path):
    before = prompt_path.read_bytes()
    with pytest.raises(UserError, match="which is read"):
        inspect.inspect(prompt_path, plot=str(prompt_path))
    assert prompt_path.read_bytes() == before


def test_what_there_is_nothing_to_draw_of(tmp_path, prompt_path):
    """Neither a picture nor folders for it are made; an empty path is no folder."""
    path, picture = tmp_path / "p.safetensors", tmp_path / "a/b/p.png"
    prompt_file.save_prompt(path, np.zeros((0, 8), np.float32), {})
    with pytest.raises(UserError, match="has no prompt: --plot draws the rows of one"):
        inspect.inspect(path, plot=str(picture))
    with pytest.raises(UserError, match="an empty path names nothing"):
        inspect.inspect("")
    assert not picture.parent.parent.exists()


@pytest.mark.parametrize(
    "name", ["runs/prompt.safetensors", "absent.json", "a/b/c", "/a/b", "./a", "here/b"]
)
def test_a_misspelt_path_asks_nobody(name, tmp_path, monkeypatch):
    import socket

    def refuse(*unused):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(UserError, match="there is no folder"):
        inspect.inspect(name)


def test_a_prompt_of_embeddings_reads_as_their_words():
    base = "embedded:t5_1_1_mini"
    source = base_models.open_checkpoint(base)
    table = prompt_view.embedding_table(source).astype(np.float32)
    path = formats.find_vocabulary(source.path)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    good, bad = pieces.encode("good"), pieces.encode("bad")
    rows = table[[*good, *good, *bad]]
    found = prompt_view.reading(rows, base, ["good", "bad", "catastrophe"])
    assert found["nearest_cosine"] == pytest.approx(100, abs=1e-3)
    assert found["labels_found"] == pytest.approx(200 / 3)
    # Two positions lie next to one word.
    assert found["distinct_nearest"] == pytest.approx(100 * len(bad) / len(rows))
    assert "labels_found" not in prompt_view.reading(rows, base, [])
