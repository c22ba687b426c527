# SPDX-License-Identifier: Apache-2.0
"""Fixtures: the tiny model, its batch, and the reference numbers of T5X."""

import contextlib
import os
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

# Before JAX starts: sharding is tested on eight simulated devices.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )

# Most of the suite's time is compilation, much of it of the same programs again. Programs
# that tests start take them from there, too, and leave the user's own folder alone.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    os.path.join(tempfile.gettempdir(), f"prompt_tuning_tests_{os.getuid()}"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax
import jax.numpy as jnp
import pytest
import shapes

from prompt_tuning.network.model import Model
from prompt_tuning.network.transformer import T5Config, Transformer

ROOT = pathlib.Path(__file__).parents[1]
shapes.install()
# The layers whose tests let no dtypes meet silently. In others AdamW may take steps, and
# optax multiplies a float by its integer count.
STRICT = ("decoding", "network")


@pytest.fixture(scope="module", autouse=True)
def strict(request) -> Iterator[None]:
    """No arrays of different numbers of axes meet silently; see also `STRICT`."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.numpy_rank_promotion("raise"))
        if request.path.parent.name in STRICT:
            stack.enter_context(shapes.checking())
            stack.enter_context(jax.numpy_dtype_promotion("strict"))
        yield


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """What may not be copied: beside the checkout, or in PROMPT_TUNING_REFERENCE."""
    folder = pathlib.Path(
        os.environ.get("PROMPT_TUNING_REFERENCE", ROOT.parent / "shared")
    )
    if not folder.is_dir():
        pytest.skip("the released prompts and data sets are not on this machine")
    return folder


@pytest.fixture
def browser(tmp_path) -> Iterator[Any]:
    """Chromium without a window, driven by Selenium; skips where one of them is missing."""
    webdriver = pytest.importorskip("selenium.webdriver")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs Chromium and its driver (Debian: chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(flag)
    options.binary_location = program
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
    """Inputs and outputs that T5X produced on tiny models."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def t5x_checkpoints(golden, tmp_path_factory) -> pathlib.Path:
    """The checkpoints that T5X saved of these models, in its three formats."""
    folder = tmp_path_factory.mktemp("t5x_checkpoints")
    with zipfile.ZipFile(golden / "checkpoints.zip") as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_config() -> T5Config:
    return T5Config(
        vocab_size=256,
        emb_dim=32,
        num_heads=4,
        num_encoder_layers=2,
        num_decoder_layers=2,
        head_dim=8,
        mlp_dim=64,
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_config) -> Model:
    return Model(Transformer(tiny_config))


@pytest.fixture(scope="session")
def tiny_params(tiny_model):
    return jax.jit(tiny_model.init)(jax.random.key(0))


@pytest.fixture(scope="session")
def tiny_batch() -> dict:
    """Three rows of 10 inputs and 6 targets, with padding."""
    inputs = jax.random.randint(jax.random.key(1), (3, 10), 2, 256)
    targets = jax.random.randint(jax.random.key(2), (3, 6), 2, 256)
    inputs = inputs.at[1, 7:].set(0).at[2, 4:].set(0)
    targets = targets.at[1, 3:].set(0)
    shifted = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)))
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": jnp.where(targets > 0, shifted, 0),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(jnp.float32),
    }


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> pathlib.Path:
    """Random weights of the sizes in models/tiny.gin, with the embedded vocabulary."""
    from prompt_tuning.checkpoints import model_file
    from prompt_tuning.data import vocabularies

    config = T5Config(
        vocab_size=8192,
        emb_dim=16,
        num_heads=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        head_dim=8,
        mlp_dim=32,
    )
    folder = tmp_path_factory.mktemp("tiny_model")
    model = Model(Transformer(config))
    model_file.save_model(folder, jax.jit(model.init)(jax.random.key(0)), {})
    pieces = vocabularies.path_of(vocabularies.EMBEDDED)
    shutil.copyfile(pieces, folder / model_file.VOCABULARY)
    return folder


@pytest.fixture(scope="session")
def reviews(tmp_path_factory) -> dict[str, str]:
    """A local task: paths of eight training and four validation sentences."""
    folder = tmp_path_factory.mktemp("reviews")
    rows = [("a fine film", "good"), ("a dull film", "bad")]
    rows += [("what a fine story", "good"), ("what a dull story", "bad")]
    paths = {}
    for split, times in (("train", 2), ("validation", 1), ("test", 1)):
        lines = ["sentence\tlabel", *("\t".join(row) for row in rows * times)]
        path = folder / f"{split}.tsv"
        path.write_text("\n".join(lines) + "\n")
        paths[split] = str(path)
    return paths


@pytest.fixture(scope="session")
def train_words(reviews, tiny_checkpoint) -> Callable[..., list[str]]:
    """Makes the words of a small run of ``train`` out of the values it differs in."""

    def words(**values) -> list[str]:
        values = {
            "TASK_FILES": reviews,
            "TEMPLATE": "{sentence}",
            "LABEL_NAMES": ["good", "bad"],
            "TASK_FEATURE_LENGTHS": {"inputs": 8, "targets": 4},
            "TRAIN_STEPS": 4,
            "BATCH_SIZE": 8,
            "EVAL_BATCH_SIZE": 8,
            "PROMPT_LENGTH": 3,
            "INITIAL_CHECKPOINT_PATH": tiny_checkpoint,
            **values,
        }
        files = ("models/tiny.gin", "methods/prompt_tuning.gin", "tasks/local_file.gin")
        return [
            "train",
            *(f"--gin_file={name}" for name in files),
            *(f"--gin.{name}={value}" for name, value in values.items()),
        ]

    return words
