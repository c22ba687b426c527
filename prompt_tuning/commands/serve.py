# SPDX-License-Identifier: Apache-2.0
"""``serve``: answers rows over HTTP with many prompts on one frozen model."""

import dataclasses
import importlib.util
import os
import pathlib
from typing import Annotated

from annotated_types import Ge, Le

from prompt_tuning import decoding, report
from prompt_tuning.checkpoints import base_models, formats
from prompt_tuning.errors import UserError
from prompt_tuning.inference.answering import Answering
from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.store import PromptStore
from prompt_tuning.types import PositiveInt, TokenLength, WeightDtype

TOKEN = "PROMPT_TUNING_TOKEN"
PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    *,
    model: str,
    prompts: str | None = None,
    host: str = "127.0.0.1",
    port: Annotated[int, Ge(0), Le(65_535)] = 8000,
    token_file: str | None = None,
    max_batch: Annotated[int, Ge(1), Le(4096)] = 32,
    max_queue: PositiveInt = 1024,
    max_input_length: TokenLength = 512,
    max_decode_length: TokenLength = 32,
    prompt_rows: PositiveInt = 65_536,
    timeout: Annotated[float, Ge(0.001), Le(86_400)] = 30.0,
    dtype: WeightDtype = "auto",
    int8_products: bool = False,
    warm_up: Annotated[int, Ge(0), Le(65_536)] = 128,
    force: bool = False,
) -> None:
    """Serves until it is interrupted.

    Args:
      model: the base model, of any format (see `formats.open_model`), or
        ``embedded:NAME``.
      prompts: a folder of prompts to begin with.
      host: the address to listen on; others than loopback need a token.
      port: where to listen; 0 takes any free one.
      token_file: holds the token that requests must bear; by default the environment
        variable ``PROMPT_TUNING_TOKEN`` does.
      max_batch: rows of a batch.
      max_queue: rows that may wait.
      max_input_length: longest input in tokens, its prompt included.
      max_decode_length: longest answer where a prompt has no label set.
      prompt_rows: prompt positions that the device has room for.
      timeout: seconds from a request to its answer.
      dtype: of the frozen weights: 'auto', 'float32', 'bfloat16', 'int8'.
      int8_products: with int8 weights, round what they are multiplied with to int8, too.
      warm_up: compile at the start for inputs of so many text tokens; 0 compiles when
        the first of their length arrive.
      force: take prompts that were tuned on another model or vocabulary.

    Raises:
      UserError: something is missing, does not fit, or would be open to everyone.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serving needs more packages: pip install {' '.join(missing)}")
    # They need these packages.
    from prompt_tuning.serving import app, server
    from prompt_tuning.serving.batcher import Batcher
    from prompt_tuning.serving.limits import Limits
    from prompt_tuning.serving.metrics import Metrics

    token = read_token(token_file)
    if token is None and not server.is_loopback(host):
        raise UserError(
            f"everyone who reaches {host} could use the server: give --token_file or "
            f"{TOKEN} a token that requests must bear"
        )
    listener = server.listen(host, port)
    checkpoint = base_models.open_checkpoint(model)
    config = dataclasses.replace(
        formats.architecture(checkpoint), int8_products=int8_products
    )
    source = base_models.load(config, checkpoint, frozen_dtype=dtype)
    store = PromptStore(source, prompt_rows, force=force)
    if prompts is not None:
        for reason in store.load_folder(prompts).values():
            report.say(f"left out {reason}")
    engine = Engine(
        source,
        store,
        batch_sizes=_sizes(max_batch),
        longest=max_input_length,
        strategy=decoding.Greedy(max_decode_length),
    )
    if warm_up and len(store):
        longest = max(len(prompt.array) for prompt in store.prompts())
        report.say("compiling for the first requests")
        engine.warm_up(longest + warm_up)
    metrics = Metrics()
    batcher = Batcher(
        Answering(engine),
        max_batch=max_batch,
        max_queue=max_queue,
        on_batch=metrics.batch,
    )
    metrics.watch(engine, batcher)
    limits = Limits(seconds=timeout)
    application = app.create(engine, batcher, metrics, limits, token)
    where = listener.getsockname()
    served = "1 prompt" if len(store) == 1 else f"{len(store)} prompts"
    report.say(f"serving {served} on http://{host}:{where[1]}")
    server.run(application, listener, drain_seconds=timeout)
    report.say("all requests answered; ended")


def read_token(path: str | None) -> str | None:
    """The token of a file, else of the environment, or None.

    Raises:
      UserError: the file cannot be read or is empty.
    """
    if path is None:
        return os.environ.get(TOKEN) or None
    try:
        token = pathlib.Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the token in {path}: {error}") from error
    if not token:
        raise UserError(f"{path} holds no token: write one into it")
    return token


def _sizes(max_batch: int) -> list[int]:
    """Batch sizes to compile for: each four times the one before."""
    sizes = [max_batch]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 4 or 1)
    return sizes
