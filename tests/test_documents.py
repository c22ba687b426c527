# SPDX-License-Identifier: Apache-2.0
"""Every block of every document is run, or read as a command, or says why it is not.

The tutorial's and the README's first program are run whole by tests of their own, as is
the program of docs/export.md.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import prompt_tuning as pt
from prompt_tuning import config
from prompt_tuning.checkpoints import prompt_file
from prompt_tuning.command_line import arguments
from prompt_tuning.command_line.table import COMMANDS
from prompt_tuning.methods.method import METHODS
from prompt_tuning.runs import settings
from prompt_tuning.training import optimizers

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A block without a language is a picture or a listing.
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What a block begins with -> the test that runs it, or why none does.
ELSEWHERE = {
    "import seqio": "tests/test_tutorial.py",
    "sentence\t": "tests/test_tutorial.py",
    "import prompt_tuning as pt\n\nbase = pt.load": "tests/library/test_tuning.py",
    "import jax\nfrom prompt_tuning import": "test_the_counts_of_the_readme",
    "from prompt_tuning.training.trackers": "tests/training/test_tracked_records.py",
    "import json\nimport pathlib\nimport sys": "tests/inference/test_export.py",
    "# Common shift": "test_a_method_is_two_files",
    "FROM python": "needs Docker",
    "docker build": "needs Docker and a cluster",
    "curl http": "tests/serving/test_app.py asks with the same rows",
}
# Programs of others, which are not ours to try.
OTHERS = {
    *("pip", "make", "docker", "xpk", "srun", "curl", "jq", "./run_tpu.sh"),
    *("export", ".", "eval", "python3", "t5x.train", "t5x.eval", "pytest"),
}
# Pages whose programs are run here, one after the other.
PAGES_RUN = ("adding_a_method", "decoding", "inference", "library")
PROGRAMS = {("python", page) for page in PAGES_RUN}
# What a run is made small by.
SMALLER = {
    "max_decode_len=32": "max_decode_len=2",
    "max_decode_len=8": "max_decode_len=4",
    "Beam(8,": "Beam(4,",
    "length=20": "length=3, steps=1, learning_rate=0.3, quiet=True",
    '"maybe", "no"]': '"maybe", "no"], length=3, steps=1, learning_rate=0.3, quiet=True',
    '[{"seed": [0, 1, 2]}]': '[{"seed": [0, 1]}], length=3, steps=1, learning_rate=0.3',
    'rows, labels=labels, init=f"': (
        'train, labels=labels, length=3, steps=1, learning_rate=0.3, init=f"'
    ),
    "LoRA(rank=4)": "LoRA(rank=4), steps=1, learning_rate=0.01",
    '"lora"]}]': '"lora"]}], length=3, steps=1, learning_rate=0.01',
}


def blocks(*languages):
    """(page, number, text) of the blocks in these languages."""
    for page in PAGES:
        for number, (language, text) in enumerate(BLOCK.findall(page.read_text())):
            if language in languages:
                yield pytest.param(text, id=f"{page.stem}-{number}")


def elsewhere(text):
    return next((why for begin, why in ELSEWHERE.items() if text.startswith(begin)), "")


def test_every_block_is_of_a_kind_that_is_looked_at():
    """One in another language, or of another program, wants a line above."""
    for page in PAGES:
        for language, text in BLOCK.findall(page.read_text()):
            if not language:
                assert not text.startswith(("prompt-tuning", "python", "pip")), text
                continue
            run = language == "bash" or (language, page.stem) in PROGRAMS
            assert run or elsewhere(text), text


def commands(text):
    """The words of every command of a block, comments left out."""
    held = ""
    for line in text.replace("\\\n", " ").splitlines():
        held += line + "\n"
        try:
            words = shlex.split(held, comments=True)
        except ValueError:
            continue  # A quotation that goes on in the next line.
        held = ""
        if words:
            yield words
    assert not held, "a quotation without its end"


@pytest.mark.parametrize("text", blocks("bash"))
def test_commands_are_what_the_command_line_takes(text):
    if why := elsewhere(text):
        pytest.skip(why)
    for program, *words in commands(text):
        if program == "python" and words[0] == "-m":
            _, program, *words = words
        elif program == "python":
            assert (ROOT / words[0]).is_file()
            continue
        if program in OTHERS:
            if program == "make" and words:
                assert f"\n{words[0]}:" in (ROOT / "Makefile").read_text()
            continue
        assert program in ("prompt-tuning", ".venv/bin/prompt-tuning", "prompt_tuning")
        assert words[0] in (*COMMANDS, "--completion", "--help", "--version")
        if words[0] not in COMMANDS or "..." in " ".join(words) or "--help" in words:
            continue  # A question, or a sketch.
        said = arguments.parse(words)
        assert said.command == words[0]
        if said.configuration is not None:
            config.parse(said.configuration)


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    return pt.load(tiny_checkpoint)


@pytest.fixture
def names(base, tiny_checkpoint, tiny_model, tiny_params, tiny_batch, tmp_path):
    """What the documents' programs are given beside what they import."""
    yes_no = np.array([[5, 1, 0], [6, 7, 1]], np.int32)
    pairs = [("a fine film", "positive"), ("a dull film", "negative")]
    for name, labels, template in [
        ("mood", ["good", "bad"], None),
        *((f"mood_{i}", ["good", "bad"], None) for i in range(3)),
        ("entails", ["yes", "no"], "{premise} {hypothesis}"),
    ]:
        prompt_file.save_prompt(
            tmp_path / "prompts" / f"{name}.safetensors",
            np.ones((2, 16), np.float32),
            {
                "base_model": base.identity,
                "vocabulary": "mini",
                "labels": labels,
                "template": template,
            },
        )
    saved = prompt_file.save_prompt  # Two that were tuned, and what they started from.
    card = {"base_model": base.identity, "vocabulary": "mini", "labels": ["yes", "no"]}
    rng = np.random.default_rng(0)
    for name in ("new", "sentiment", "questions", "start"):
        saved(
            tmp_path / f"{name}.safetensors",
            rng.normal(size=(2, 16)).astype(np.float32),
            card,
        )
    prompts = {
        name: pt.load_prompt(tmp_path / f"{name}.safetensors")
        for name in ("sentiment", "questions", "start")
    }
    rows = [
        {"premise": "a", "hypothesis": h, "label": label}
        for h, label in (("b", "yes"), ("c", "maybe"), ("d", "no"))
    ]
    return {
        "jax": jax,
        "pt": pt,
        "base": base,
        "model": tiny_model,
        "params": tiny_params,
        "inputs": np.tile(tiny_batch["encoder_input_tokens"], (2, 1))[:4],
        "yes_no": yes_no,
        "topics": yes_no + 3 * (yes_no > 1),
        "settings": settings,
        "adafactor": lambda rate: optimizers.adafactor(
            optimizers.learning_rate_schedule("constant", rate)
        ),
        "train": pairs,
        "dev": pairs,
        "labels": ["negative", "positive"],
        "rows": rows,
        **prompts,
        "its_start": prompts["start"],
        "their_start": prompts["start"],
        "path_of_the_best": tmp_path / "sentiment.safetensors",
    }


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES_RUN)
def test_programs_run(page, names, tiny_checkpoint, tmp_path, monkeypatch):
    """The programs of a page one after the other, with a small model and few steps."""
    monkeypatch.chdir(tmp_path)
    kinds = dict(METHODS)
    text = (ROOT / "docs" / f"{page}.md").read_text()
    for language, program in BLOCK.findall(text):
        if language != "python":
            continue
        for usual, small in SMALLER.items():
            program = program.replace(usual, small)
        for model in ("embedded:t5_1_1_mini", "another/model"):
            program = program.replace(model, str(tiny_checkpoint))
        if "push_to_hub" in program:
            continue  # tests/library/test_hub.py
        exec(compile(program, f"{page}.md", "exec"), names)  # noqa: S102
    for kind in METHODS.keys() - kinds:
        del METHODS[kind]


@pytest.mark.slow
def test_the_counts_of_the_readme(capsys):
    text = (ROOT / "README.md").read_text()
    (program,) = [
        block for language, block in BLOCK.findall(text) if "trees.count" in block
    ]
    exec(program, {})  # noqa: S102
    tuned, frozen = re.search(r"# (\d+) (\d+)", program).groups()
    assert capsys.readouterr().out.split() == [tuned, frozen]


@pytest.mark.slow
def test_a_method_is_two_files(tmp_path, train_words):
    """The two of docs/adding_a_method.md, put into an installed package, are all."""
    package = tmp_path / "installed" / "prompt_tuning"
    shutil.copytree(ROOT / "prompt_tuning", package)
    for folder in ("configs", "tasks"):
        shutil.copytree(ROOT / folder, package / folder, dirs_exist_ok=True)
    page = BLOCK.findall((ROOT / "docs" / "adding_a_method.md").read_text())
    code, gin = page[0][1], page[1][1]
    assert code.count("\n") + gin.count("\n") < 80
    (package / "methods" / "common_shift.py").write_text(code)
    (package / "configs" / "methods" / "common_shift.gin").write_text(gin)
    words = train_words(MODEL_DIR=tmp_path / "run", MIXTURE_OR_TASK_NAME="shifted")
    words = ["--shift_scale=2.0" if "PROMPT_LENGTH" in word else word for word in words]
    words = [word.replace("prompt_tuning.gin", "common_shift.gin") for word in words]
    done = subprocess.run(
        [sys.executable, "-m", "prompt_tuning", *words, "--prompt_length=3"],
        check=False,
        env={**os.environ, "PYTHONPATH": str(package.parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    prompt = pt.load_prompt(tmp_path / "run")
    assert prompt.array.shape == (3, 16)
    assert prompt.card["method"] == "common_shift(scale=2.0)"
