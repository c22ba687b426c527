# SPDX-License-Identifier: Apache-2.0
"""The examples run from their first cell to their last, on a tiny model."""

import pathlib
import re
import runpy

import pytest

from prompt_tuning.checkpoints import base_models, formats

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def huggingface_folder(tiny_checkpoint, tmp_path_factory):
    """The tiny model as transformers keeps one, its vocabulary beside it."""
    folder = tmp_path_factory.mktemp("huggingface") / "model"
    source = base_models.open_checkpoint(tiny_checkpoint)
    pieces = formats.find_vocabulary(tiny_checkpoint)
    formats.write_model(folder, source, "huggingface", vocabulary=pieces)
    return folder


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_example(
    name, tiny_checkpoint, huggingface_folder, tmp_path, monkeypatch, capsys
):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert text.count("# %%") >= 4
    for model, folder in (
        ("embedded:t5_1_1_mini", tiny_checkpoint),
        ("google/t5-v1_1-small", huggingface_folder),
    ):
        text = text.replace(model, str(folder))
    text, changed = re.subn(r"length=20,(\s*)steps=200", r"length=3,\1steps=2", text)
    assert changed == 1
    if name == "own_data":
        pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{name}.py").write_text(text)
    runpy.run_path(str(tmp_path / f"{name}.py"))
    assert capsys.readouterr().out
