# SPDX-License-Identifier: Apache-2.0
"""Answers in turns: ours, another checkout of ours, PEFT on transformers, CTranslate2.

    python benchmarks/inference.py --before ../before/.venv/bin/python \
        --others PYTHON --output benchmarks/results/inference.json

T5 1.1 Small, or a model of the embedded one's sizes, of random weights, a prompt of 20
before 64 tokens of text, 32 rows, 32 new tokens and no end; or ends after 1 to 32 of
them, drawn once for each row and the same for all sides. CTranslate2 has no prompts, so its rows have 84 tokens of text. In int8 we
multiply int8 by int8, as CTranslate2 does. Each
side is a process that compiles first and then takes one turn after the other, so that
what else the machine does meets all alike; a ratio is the median over rounds of the
seconds of PEFT over a side's. PYTHON has torch, transformers, peft and ctranslate2.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

ROWS, PROMPT, TEXT, TOKENS, BEAMS = 32, 20, 64, 32, 4
# Label sets of this size and length are ranked.
LABELS, LABEL_TOKENS = 6, 4
# The last ids are sentinels, and some that no piece has.
NO_TEXT = 128
CASES = ("greedy", "free", "beams", "labels")
INT8 = "int8"
FIRST_TEXT_ID = 3


def vocab_size(folder: str) -> int:
    """That of the model in a folder, in transformers' format."""
    return json.loads(pathlib.Path(folder, "config.json").read_text())["vocab_size"]


def ids(folder: str, seed: int, shape: tuple[int, int]) -> Any:
    """Ids of text that the model knows, without padding."""
    import numpy as np

    last = vocab_size(folder) - NO_TEXT
    drawn = np.random.default_rng(seed).integers(FIRST_TEXT_ID, last, shape)
    return drawn.astype(np.int32)


def rows(folder: str, width: int) -> Any:
    """The texts: [B, width]."""
    return ids(folder, 0, (ROWS, width))


def labels(folder: str) -> Any:
    """Tokens of the labels: [C, S]."""
    return ids(folder, 1, (LABELS, LABEL_TOKENS))


def ends() -> Any:
    """After how many tokens each row ends where it does: [B]."""
    import numpy as np

    return np.random.default_rng(3).integers(1, TOKENS + 1, ROWS)


def ours(folder: str, dtype: str) -> dict[str, Callable[[], Any]]:
    """This package, of whichever checkout runs this."""
    import dataclasses

    import jax
    import load
    import numpy as np

    from prompt_tuning import decoding
    from prompt_tuning.checkpoints import base_models
    from prompt_tuning.network.model import Model
    from prompt_tuning.network.prompts import Prompt
    from prompt_tuning.network.transformer import Transformer

    config, computed = load.t5_config(os.path.basename(folder)), dtype
    if dtype == INT8:
        config = dataclasses.replace(config, int8_products=True)
        computed = "float32"
    base = base_models.load(
        config, folder, frozen_dtype=dtype, activation_dtype=computed
    )

    @dataclasses.dataclass(frozen=True)
    class Ending(decoding.Greedy):
        """Greedy, and a row has ended when its time has come."""

        def extend(self, state, step, *given):
            state, token, parents = super().extend(state, step, *given)
            ended = state.ended | (step + 1 >= np.asarray(ends()))
            return state._replace(ended=ended), token, parents

    model = Model(Transformer(base.config, (Prompt("task", PROMPT),)))
    prompt = np.random.default_rng(2).normal(0, 0.5, (PROMPT, config.emb_dim))
    params = {**base.params, "prompts": {"task": prompt.astype(np.float32)}}
    tokens = rows(folder, PROMPT + TEXT)
    # An id that no token has.
    never = base.config.vocab_size
    tokens[:, :PROMPT] = never + np.arange(PROMPT)
    strategies = {
        "greedy": decoding.Greedy(TOKENS, eos_id=never),
        "free": Ending(TOKENS, eos_id=never),
        "beams": decoding.Beam(TOKENS, num_decodes=BEAMS, eos_id=never),
    }
    functions = {
        name: jax.jit(lambda params, how=how: model.predict(params, tokens, how))
        for name, how in strategies.items()
    }
    functions["labels"] = jax.jit(
        lambda params: model.rank(params, tokens, labels(folder))
    )
    return {
        name: lambda function=function: jax.block_until_ready(function(params))
        for name, function in functions.items()
    }


def peft(folder: str, dtype: str) -> dict[str, Callable[[], Any]]:
    """PEFT's prompt tuning of transformers' T5, by its `generate`."""
    import peft
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.T5ForConditionalGeneration.from_pretrained(
        folder, dtype=getattr(torch, dtype)
    )
    config = peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM",
        num_virtual_tokens=PROMPT,
        num_transformer_submodules=1,
    )
    tuned = peft.get_peft_model(model, config).eval()
    tokens = torch.from_numpy(rows(folder, TEXT)).long()
    seen = torch.ones_like(tokens)
    choices = torch.from_numpy(labels(folder)).long()

    last = torch.from_numpy(ends())

    def generate(beams: int, **more: Any) -> Any:
        return tuned.generate(
            input_ids=tokens,
            attention_mask=seen,
            num_beams=beams,
            do_sample=False,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            **more,
        )

    def ended(ids: Any, scores: Any, **kwargs: Any) -> Any:
        # A start token comes first.
        return ids.shape[1] - 1 >= last

    def rank() -> Any:
        # One pass of the encoder, and one of the decoder over all labels of all rows.
        prompt = tuned.get_prompt(batch_size=ROWS).to(model.dtype)
        embedded = torch.cat([prompt, model.shared(tokens)], dim=1)
        encoded = model.encoder(inputs_embeds=embedded).last_hidden_state
        logits = model(
            encoder_outputs=(encoded.repeat_interleave(LABELS, 0),),
            labels=choices.repeat(ROWS, 1),
        ).logits
        found = logits.float().log_softmax(-1)
        return found.gather(-1, choices.repeat(ROWS, 1)[..., None])

    def without_gradient(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.inference_mode():
                return call()

        return run

    calls = {
        "greedy": lambda: generate(1),
        "free": lambda: generate(
            1, stopping_criteria=transformers.StoppingCriteriaList([ended])
        ),
        "beams": lambda: generate(BEAMS),
        "labels": rank,
    }
    return {name: without_gradient(call) for name, call in calls.items()}


def ctranslate2(folder: str, dtype: str) -> dict[str, Callable[[], Any]]:
    """CTranslate2, of a model that is converted first; 'int8' is a dtype of it."""
    import ctranslate2
    from ctranslate2.converters import transformers

    class Pieces:
        """A tokenizer as far as the converter asks: names of the ids."""

        pad_token, eos_token, unk_token = "<0>", "<1>", "<2>"

        def get_vocab(self) -> dict[str, int]:
            return {f"<{number}>": number for number in range(vocab_size(folder))}

        def convert_ids_to_tokens(self, number: int) -> str:
            return f"<{number}>"

    class Converter(transformers.TransformersConverter):
        def load_tokenizer(self, *args: Any, **kwargs: Any) -> Pieces:
            return Pieces()

    made = f"{folder}_ctranslate2"
    if not os.path.isdir(made):
        Converter(folder).convert(made)
    translator = ctranslate2.Translator(
        made, compute_type=dtype, intra_threads=len(os.sched_getaffinity(0))
    )
    texts = [[f"<{number}>" for number in row] for row in rows(folder, PROMPT + TEXT)]

    def translate(beams: int, **more: Any) -> Any:
        return translator.translate_batch(
            texts,
            max_batch_size=ROWS,
            beam_size=beams,
            max_decoding_length=TOKENS,
            min_decoding_length=TOKENS,
            max_input_length=0,
            **more,
        )

    last = ends()
    targets = [[f"<{number}>" for number in label] for label in labels(folder)]

    def rank() -> Any:
        sources = [text for text in texts for _ in targets]
        return translator.score_batch(sources, targets * ROWS, max_batch_size=ROWS)

    return {
        "greedy": lambda: translate(1),
        # It sorts rows by length, and they are of one: their numbers are as given.
        "free": lambda: translate(
            1, callback=lambda made: made.step + 1 >= last[made.batch_id]
        ),
        "beams": lambda: translate(BEAMS),
        "labels": rank,
    }


SIDES = {"now": ours, "before": ours, "peft": peft, "ctranslate2": ctranslate2}


def serve(side: str, folder: str, dtype: str) -> None:
    """A worker: does what each line of its input names, and says how long it took."""
    calls = SIDES[side](folder, dtype)
    for call in calls.values():
        call()
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        calls[line.strip()]()
        print(time.perf_counter() - start, flush=True)


def started(python: str, side: str, folder: str, dtype: str) -> subprocess.Popen:
    """A worker that is ready."""
    worker = subprocess.Popen(
        [python, os.path.abspath(__file__), "--serve", side, folder, dtype],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    while (line := worker.stdout.readline()) != "ready\n":
        if not line:
            raise SystemExit(f"{side} in {dtype} failed with {python}")
    return worker


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", help="Python of another checkout's environment")
    parser.add_argument("--others", help="Python with PEFT and CTranslate2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", default="small", help="small, or mini: the embedded")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    import environment
    import train_step

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = os.path.join(scratch, options.size)
        train_step.make_weights(options.size, pathlib.Path(folder))
        for dtype in options.dtypes:
            sides = [("now", sys.executable, dtype)]
            if dtype == "float32":
                sides.append(("now", sys.executable, INT8))
            if options.before:
                sides.append(("before", os.path.abspath(options.before), dtype))
            if options.others:
                others = os.path.abspath(options.others)
                sides.append(("peft", others, dtype))
                kinds = ["float32", INT8] if dtype == "float32" else []
                sides += [("ctranslate2", others, kind) for kind in kinds]
            workers = {
                side if kind != INT8 else f"{side}_{kind}": started(
                    python, side, folder, kind
                )
                for side, python, kind in sides
            }
            found[dtype] = compare(workers, options.rounds)
            print(dtype, json.dumps(found[dtype], indent=2), file=sys.stderr)
    environment.publish(
        {"size": options.size, "rounds": options.rounds, **found}, options.output
    )


def compare(workers: dict[str, subprocess.Popen], rounds: int) -> dict[str, Any]:
    """Rows per second, and how many times as many as PEFT's, of each case and side."""
    times: dict[str, dict[str, list[float]]] = {
        case: {name: [] for name in workers} for case in CASES
    }
    for _ in range(rounds):
        for case, sides in times.items():
            for name, seconds in sides.items():
                print(case, file=workers[name].stdin, flush=True)
                seconds.append(float(workers[name].stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return {
        case: {
            name: {
                "rows_per_second": round(ROWS / statistics.median(seconds), 2),
                **{
                    f"times_{other}": round(
                        statistics.median(
                            theirs / own
                            for own, theirs in zip(seconds, sides[other], strict=True)
                        ),
                        3,
                    )
                    for other in ("peft", "before")
                    if other in sides and other != name
                },
            }
            for name, seconds in sides.items()
        }
        for case, sides in times.items()
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    else:
        main()
