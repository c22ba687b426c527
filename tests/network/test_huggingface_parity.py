# SPDX-License-Identifier: Apache-2.0
"""Weights that transformers saved compute here what they compute there, and back."""

import dataclasses

import jax
import numpy as np
import pytest

from prompt_tuning.checkpoints import huggingface, loading
from prompt_tuning.checkpoints.source import from_params
from prompt_tuning.decoding import Beam, Greedy
from prompt_tuning.network.model import Model
from prompt_tuning.network.transformer import T5Config, Transformer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
# Class, fields of its configuration, whether the output layer is its own, and a seed,
# which is chosen (see `test_beam_search`). Heads of width 6 do not add up to d_model.
FAMILY = {
    "t5_1_0": ("T5", {"relative_attention_num_buckets": 32}, False, 2),
    "t5_1_1": ("T5", GATED, True, 4),
    "mt5": ("MT5", {"vocab_size": 130, "num_layers": 3}, True, 6),
    "byt5": (
        "T5",
        {**GATED, "num_heads": 5, "num_layers": 3, "num_decoder_layers": 1},
        True,
        4,
    ),
    # What version 5 of transformers makes of these two by itself: the output layer is
    # the table, used without T5 1.0's rescaling. None is published.
    "t5_1_1_tied": ("T5", GATED, False, 0),
    "mt5_tied": ("MT5", {}, False, 0),
}
INPUTS, TARGETS, DECODED = 150, 12, 12
END, NO_END = 1, 9999  # No vocabulary here has the second.


def random_model(kind, fields, own_head, seed):
    """A model of transformers with weights that make its choices clear."""
    fields = {
        "vocab_size": 96,
        "d_model": 32,
        "d_kv": 6,
        "num_heads": 4,
        "d_ff": 48,
        "num_layers": 2,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 128 if kind == "T5" else 20,
        "decoder_start_token_id": 0,
        **fields,
    }
    config = getattr(transformers, f"{kind}Config")(**fields)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    if own_head:
        # Version 5 ties what it makes itself; published models are not tied.
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = rng.normal(size=parameter.shape)
            if "layer_norm" in name:
                values = 1 + 0.2 * values
            elif "SelfAttention" in name or "EncDec" in name or "Dense" in name:
                values /= np.sqrt(parameter.shape[-1])
            parameter.copy_(torch.from_numpy(values))
        # Decodes of a random model end rarely.
        model.lm_head.weight[END] *= 2.0 if own_head else 2.5
    return model


def padded(ids, lengths):
    return np.where(np.arange(ids.shape[1]) < np.array(lengths)[:, None], ids, 0)


def make_batch(vocab_size):
    """Six rows of all lengths; the longest reaches every bucket of positions."""
    rng = np.random.default_rng(1)
    ids = rng.integers(2, vocab_size, (6, INPUTS))
    inputs = padded(ids, (INPUTS, 90, 31, 8, 2, 1))
    ids = rng.integers(2, vocab_size, (6, TARGETS))
    targets = padded(ids, (TARGETS, 5, 1, 9, TARGETS, 2))
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0))),
        "decoder_target_tokens": targets,
    }


def their_logits(model, batch):
    """At the positions that hold a target, as `our_logits`."""
    inputs = batch["encoder_input_tokens"]
    with torch.no_grad():
        logits = model(
            input_ids=torch.from_numpy(inputs),
            attention_mask=torch.from_numpy(inputs > 0).long(),
            decoder_input_ids=torch.from_numpy(batch["decoder_input_tokens"]),
        ).logits
    return logits.numpy()[batch["decoder_target_tokens"] > 0]


def our_logits(model, params, batch):
    logits = np.asarray(jax.jit(model.logits)(params, batch))
    return logits[batch["decoder_target_tokens"] > 0]


class Case:
    """A model of transformers, the folder it was saved to, and what we make of it."""

    def __init__(self, name, folder, seed=None):
        *described, chosen = FAMILY[name]
        self.theirs = random_model(*described, chosen if seed is None else seed)
        self.theirs.save_pretrained(folder)
        self.source = huggingface.open_checkpoint(folder)
        self.model = Model(Transformer(T5Config(**self.source.sizes)))
        self.params = loading.load_params(
            self.source, self.model.abstract_params(), "float32"
        )
        self.batch = make_batch(self.theirs.config.vocab_size)

    def generate(self, end, **options):
        """Their best decode of every row, 0 after the end token, and its score."""
        inputs = torch.from_numpy(self.batch["encoder_input_tokens"])
        with torch.no_grad():
            found = self.theirs.generate(
                inputs,
                attention_mask=(inputs > 0).long(),
                max_new_tokens=DECODED,
                eos_token_id=end,
                do_sample=False,
                return_dict_in_generate=True,
                output_scores=True,
                **options,
            )
        tokens = found.sequences.numpy()[:, 1:]
        tokens = np.pad(tokens, ((0, 0), (0, DECODED - tokens.shape[1])))
        # Their beam search fills the rest of a row with end tokens.
        ends = tokens == end
        tokens = np.where(np.cumsum(ends, axis=1) > ends, 0, tokens)
        return tokens, found.get("sequences_scores")

    def predict(self, strategy):
        """Our best decode of every row and its score."""
        predict = jax.jit(self.model.predict, static_argnames="strategy")
        inputs = self.batch["encoder_input_tokens"]
        tokens, scores = predict(self.params, inputs, strategy)
        return np.asarray(tokens)[:, -1], np.asarray(scores)[:, -1]


def assert_close(ours, theirs, tolerance=1e-4):
    print(f"largest logit {np.abs(theirs).max():.3g}, error {abs(ours - theirs).max()}")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


@pytest.fixture(scope="module", params=FAMILY)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("saved") / request.param)


def test_logits(case):
    theirs = their_logits(case.theirs, case.batch)
    assert_close(our_logits(case.model, case.params, case.batch), theirs)
    # They would not agree if anything of weight were left out.
    assert np.abs(theirs).max() > 3


def test_shards_hold_the_same_weights(case, tmp_path):
    case.theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    sharded = huggingface.open_checkpoint(tmp_path)
    assert sharded.specs == case.source.specs
    for name in sharded.specs:
        np.testing.assert_array_equal(sharded.read(name), case.source.read(name))


@pytest.mark.parametrize("end", [END, NO_END])
def test_greedy_decoding(case, end):
    theirs, _ = case.generate(end, num_beams=1)
    ours, _ = case.predict(Greedy(DECODED, eos_id=end))
    np.testing.assert_array_equal(ours, theirs)
    assert len(np.unique(ours)) > 3


def beam_search(case, end):
    """Their best decodes and ours, by settings that mean the same.

    T5X divides a log-probability by ``((5 + n) / 6) ** alpha``, transformers by
    ``n ** length_penalty``: only exponent 0 gives both the same scores.
    ``early_stopping="never"`` is T5X's rule, to go on while a live beam may still win;
    False guesses, True stops at K ended beams.
    """
    theirs, their_scores = case.generate(
        end, num_beams=4, length_penalty=0.0, early_stopping="never"
    )
    ours, scores = case.predict(Beam(DECODED, num_decodes=4, alpha=0.0, eos_id=end))
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(scores, their_scores, rtol=1e-4, atol=1e-4)
    return ours


def test_beam_search_that_nothing_ends(case):
    beam_search(case, NO_END)


def test_beam_search(case):
    """With transformers as it is, on chosen models.

    No setting takes away two differences. transformers lets a decode end only if the
    end token is among the best K continuations of its row, T5X among the best 2K; at
    the last step transformers lets live beams win over ended ones, T5X does not. Over
    14 seeds of T5 1.0, T5 1.1, mT5 and ByT5 275 of 336 rows came out the same. The
    seeds of `FAMILY` are among those where all rows did; the next test needs no choice.
    """
    beam_search(case, END)


def use_t5x_rules(model):
    """Replaces the two rules of transformers' beam search by those of T5X."""
    original = model._update_finished_beams

    def update(**state):
        tokens = state["topk_running_sequences"][:, :, state["cur_len"]]
        ends = tokens == END
        ended = (state["is_sent_finished"].any(-1) | ends.any(-1))[:, None]
        stops = state["next_token_hits_stopping_criteria"]
        state["next_token_hits_stopping_criteria"] = stops & (ends | ~ended)
        state["top_num_beam_mask"] = torch.ones_like(state["top_num_beam_mask"])
        return original(**state)

    model._update_finished_beams = update


@pytest.mark.parametrize(
    ("name", "seed"), [("t5_1_0", 8), ("t5_1_1", 8), ("mt5", 3), ("byt5", 10)]
)
def test_beam_search_by_t5xs_rules(name, seed, tmp_path):
    """The seeds are those of the 14 with most rows that differ otherwise.

    By these rules all 336 rows came out the same; by either of them alone 302 and 293.
    """
    case = Case(name, tmp_path / name, seed)
    use_t5x_rules(case.theirs)
    ended = [END in row for row in beam_search(case, END)]
    assert sum(ended) > 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        {"mlp_activations": ("relu",), "logits_via_embedding": True},
        {},
        {
            "num_encoder_layers": 3,
            "num_decoder_layers": 1,
            "mlp_activations": ("silu",),
        },
    ],
    ids=["t5_1_0", "t5_1_1", "uneven"],
)
def test_what_we_write_computes_the_same_there(changes, dtype, tmp_path):
    config = T5Config(96, 32, 4, 2, 2, 6, 48, relpos_buckets=8, relpos_max_distance=20)
    config = dataclasses.replace(config, **changes)
    model = Model(Transformer(config))
    params = jax.jit(model.init)(jax.random.key(0))
    if dtype == "bfloat16":
        # Rounded once, so that both sides have the same numbers.
        params = jax.tree.map(lambda x: x.astype(dtype).astype("float32"), params)
    for shard_bytes in (5 * 10**9, 20_000):
        folder = tmp_path / str(shard_bytes)
        huggingface.write_checkpoint(
            folder,
            from_params(params),
            sizes=dataclasses.asdict(config),
            dtype=dtype,
            shard_bytes=shard_bytes,
        )
        theirs, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(
            folder, output_loading_info=True
        )
        assert str(theirs.dtype) == f"torch.{dtype}"
        assert not any(report.values()), report
        batch = make_batch(config.vocab_size)
        logits = their_logits(theirs.float().eval(), batch)
        assert_close(our_logits(model, params, batch), logits)
