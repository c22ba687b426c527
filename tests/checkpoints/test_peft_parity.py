# SPDX-License-Identifier: Apache-2.0
"""Parity with PEFT on a tiny T5 1.1: logits, gradients and steps of the same prompt.

PEFT's model and ours read one folder that transformers wrote. Both compute in float32;
what they have in common is compared to 1e-4 of its largest value.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from prompt_tuning import trees
from prompt_tuning.checkpoints import adapter_file, huggingface, layout, prompt_formats
from prompt_tuning.errors import UserError
from prompt_tuning.methods import registry
from prompt_tuning.methods.decoder_prefix import DecoderPrefix
from prompt_tuning.methods.ia3 import IA3
from prompt_tuning.methods.lora import LoRA
from prompt_tuning.methods.method import Start, assemble
from prompt_tuning.methods.multitask_prompt import MultitaskPrompt
from prompt_tuning.methods.p_tuning import PTuning
from prompt_tuning.network import adapters
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt, virtual_ids
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.training import optimizers
from prompt_tuning.training.step import TrainState, make_train_step

LENGTH, WIDTH, VOCABULARY = 5, 32, 256
# The original project's recipe, but for the weight decay: its 1e-5 would not show.
RATE, WEIGHT_DECAY, STEPS = 0.3, 1e-2, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights, with an output layer of its own as every T5 1.1 has."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, WIDTH) * 0.3)
    path = tmp_path_factory.mktemp("t5") / "tiny_t5_1_1"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ours(folder):
    """Our model, with the loss that transformers computes, and its frozen weights."""
    source = huggingface.open_checkpoint(folder)
    flat = layout.stack({name: source.read(name) for name in source.specs})
    network = Transformer(T5Config(**source.sizes), (Prompt("task", LENGTH),))
    # transformers takes the mean over all tokens of the batch and knows no z-loss.
    model = Model(network, z_loss=0.0, loss_normalizing_factor="NUM_REAL_TARGET_TOKENS")
    return model, jax.tree.map(jnp.asarray, trees.unflatten(flat))


@pytest.fixture(scope="module")
def batch():
    """Three padded rows; virtual tokens stand in front of the inputs."""
    rng = np.random.default_rng(0)
    inputs = rng.integers(2, VOCABULARY, (3, 10)).astype(np.int32)
    targets = rng.integers(2, VOCABULARY, (3, 6)).astype(np.int32)
    inputs[1, 7:] = inputs[2, 4:] = targets[1, 3:] = 0
    (ids,) = virtual_ids([Prompt("task", LENGTH)], VOCABULARY).values()
    shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    return {
        "encoder_input_tokens": np.concatenate([np.tile(ids, (3, 1)), inputs], axis=1),
        "decoder_input_tokens": np.where(targets > 0, shifted, 0),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.float32),
    }


@pytest.fixture(scope="module")
def prompt():
    rng = np.random.default_rng(1)
    return rng.normal(scale=3.0, size=(LENGTH, WIDTH)).astype(np.float32)


def with_prompt(params, prompt):
    return trees.merge(params, {"prompts": {"task": jnp.asarray(prompt)}})


def base(folder):
    """A model of transformers that PEFT may change."""
    return transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()


def fresh_adapter(folder, prompt=None, **options):
    """What a user of PEFT starts from; the first rows are set to ``prompt``."""
    config = peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=LENGTH, **options
    )
    model = peft.get_peft_model(base(folder), config).eval()
    if prompt is not None:
        with torch.no_grad():
            weight_of(model)[:LENGTH] = torch.from_numpy(prompt)
    return model


def weight_of(model):
    return model.prompt_encoder["default"].embedding.weight


def run_peft(model, batch, **more):
    """PEFT is given text alone and puts the prompt there itself."""
    text = torch.from_numpy(batch["encoder_input_tokens"][:, LENGTH:]).long()
    targets = torch.from_numpy(batch["decoder_target_tokens"]).long()
    return model(
        input_ids=text,
        attention_mask=(text > 0).long(),
        labels=targets.masked_fill(targets == 0, -100),
        **more,
    )


def assert_close(got, want):
    got, want = np.asarray(got), np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


def assert_same_answers(model, ours, prompt, batch):
    """Logits and loss of PEFT's model and of ours with ``prompt``."""
    with torch.no_grad():
        theirs = run_peft(model, batch)
    network, params = ours
    params = with_prompt(params, prompt)
    # What follows a row's last target is for nobody to read.
    real = batch["decoder_target_tokens"] > 0
    assert 0 < real.sum() < real.size
    logits = np.asarray(jax.jit(network.logits)(params, batch))
    assert_close(theirs.logits.numpy()[real], logits[real])
    assert_close(theirs.loss.numpy(), jax.jit(network.loss)(params, batch)[0])


def our_steps(ours, prompt, batch, tx):
    """The prompt after some steps of our training."""
    model, params = ours
    tuned, frozen = registry.split(
        with_prompt(params, prompt), registry.rules_of("prompt_tuning")
    )
    step = jax.jit(make_train_step(model, tx))
    state = TrainState.create({"task": tuned}, tx, jax.random.key(0))
    for _ in range(STEPS):
        state, _ = step(state, frozen, batch)
    return np.asarray(state.tuned["task"]["prompts"]["task"])


def our_recipe(**options):
    """As configs/methods/prompt_tuning.gin has it."""
    return optimizers.adafactor(
        RATE,
        multiply_by_parameter_scale=False,
        weight_decay_rate=WEIGHT_DECAY,
        **options,
    )


# Out and in.


def test_the_prompt_matters(ours, prompt, batch):
    model, params = ours
    logits = jax.jit(model.logits)
    changed = logits(with_prompt(params, -prompt), batch)
    difference = changed - logits(with_prompt(params, prompt), batch)
    assert np.abs(difference).max() > 0.1


@pytest.mark.parametrize("format", ["peft", "peft-doubled"])
def test_a_prompt_tuned_here_answers_the_same_in_peft(
    tmp_path, folder, ours, prompt, batch, format
):
    tuned = our_steps(ours, prompt, batch, our_recipe())
    assert np.abs(tuned - prompt).max() > 0.5
    card = {"length": LENGTH, "width": WIDTH, "base_model": {"name": "tiny_t5_1_1"}}
    prompt_formats.save(tmp_path / "adapter", tuned, card, format)
    model = peft.PeftModel.from_pretrained(base(folder), tmp_path / "adapter").eval()
    assert isinstance(model, peft.PeftModelForSeq2SeqLM)
    np.testing.assert_array_equal(weight_of(model).detach()[:LENGTH], tuned)
    assert_same_answers(model, ours, tuned, batch)


def test_the_doubled_format_is_what_a_model_of_defaults_takes(
    tmp_path, folder, ours, prompt, batch
):
    # PEFT loads no prompt as trainable. Whoever goes on tuning builds a model anew and
    # sets its state; with PEFT's default configuration that is twice the rows.
    card = {"length": LENGTH, "width": WIDTH}
    for format in ("peft", "peft-doubled"):
        prompt_formats.save(tmp_path / format, prompt, card, format)
    read = lambda format: peft.load_peft_weights(tmp_path / format, device="cpu")
    model = fresh_adapter(folder)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.set_peft_model_state_dict(model, read("peft"))
    peft.set_peft_model_state_dict(model, read("peft-doubled"))
    assert weight_of(model).requires_grad
    assert_same_answers(model, ours, prompt, batch)


def test_we_write_the_fields_that_peft_writes(tmp_path, prompt, folder):
    prompt_formats.save(tmp_path / "ours", prompt, {}, "peft")
    fresh_adapter(folder).save_pretrained(tmp_path / "theirs")
    read = lambda name: peft.PeftConfig.from_json_file(
        tmp_path / name / "adapter_config.json"
    )
    mine, theirs = read("ours"), read("theirs")
    # What PEFT adds to these has a default in every version that knows it.
    assert mine.keys() <= theirs.keys()
    assert theirs.keys() - mine.keys() <= {
        "peft_version",
        "tokenizer_kwargs",
        "modules_to_save",
    }
    for name in ("peft_type", "task_type", "inference_mode", "prompt_tuning_init"):
        assert mine[name] == theirs[name]


@pytest.mark.parametrize("submodules", [None, 1])
def test_a_prompt_made_by_peft_answers_the_same_here(
    tmp_path, folder, ours, batch, submodules
):
    model = fresh_adapter(folder, num_transformer_submodules=submodules)
    model.save_pretrained(tmp_path / "adapter")
    rows = weight_of(model).detach().numpy()
    assert len(rows) == LENGTH * (submodules or 2)
    array, card = prompt_formats.load(tmp_path / "adapter")
    np.testing.assert_array_equal(array, rows[:LENGTH])
    assert card["base_model"] == {"name": str(folder)}
    assert card["peft"]["unused_rows"] == len(rows) - LENGTH
    assert ("rows" in " ".join(card.get("notes", []))) == (submodules is None)
    assert_same_answers(model, ours, array, batch)


# Tuning.


def test_the_gradient_of_the_prompt(folder, ours, prompt, batch):
    model = fresh_adapter(folder, prompt)
    run_peft(model, batch).loss.backward()
    gradient = weight_of(model).grad.numpy()
    assert gradient.shape == (2 * LENGTH, WIDTH)
    assert not gradient[LENGTH:].any()
    network, params = ours
    loss = lambda prompt: network.loss(with_prompt(params, prompt), batch)[0]
    want = jax.jit(jax.grad(loss))(jnp.asarray(prompt))
    assert np.abs(want).max() > 1e-3
    assert_close(gradient[:LENGTH], want)


def peft_steps(model, batch, flat, clip=1.0):
    """PEFT's rows after some steps of transformers' Adafactor.

    The recipe is ours as far as the two are the same function:

    - transformers' decay of the second moments is ``1 - step ** -0.8``, and ours;
    - both add 1e-30 to the squared gradient and clip the update's root mean square;
    - its weight decay is multiplied by the learning rate, ours (T5X's) is not;
    - it factors the second moments of every matrix, whereas those of a prompt are never
      factored here. A vector it does not factor either, so ``flat`` gives it the prompt
      as one, which shares its memory with the model's;
    - rows that PEFT does not use have no gradient but count in that root mean square,
      so that a doubled array is clipped less: steps are compared without it.
    """
    weight = weight_of(model)
    parameter = torch.nn.Parameter(weight.detach().view(-1)) if flat else weight
    optimizer = transformers.Adafactor(
        [parameter],
        lr=RATE,
        eps=(1e-30, 1e-3),
        clip_threshold=clip,
        decay_rate=-0.8,
        weight_decay=WEIGHT_DECAY / RATE,
        scale_parameter=False,
        relative_step=False,
    )
    for _ in range(STEPS):
        weight.grad = None
        run_peft(model, batch).loss.backward()
        parameter.grad = weight.grad.view_as(parameter)
        optimizer.step()
    return weight.detach().numpy()


# The first update's root mean square is 1, so that only the lower threshold cuts it.
@pytest.mark.parametrize("clip", [1.0, 0.5])
def test_three_steps_of_adafactor(folder, ours, prompt, batch, clip):
    model = fresh_adapter(folder, prompt, num_transformer_submodules=1)
    theirs = peft_steps(model, batch, flat=True, clip=clip)
    assert np.abs(theirs - prompt).max() > 0.3
    tx = our_recipe(clipping_threshold=clip)
    assert_close(theirs, our_steps(ours, prompt, batch, tx))


def test_three_steps_of_factored_adafactor(folder, ours, prompt, batch):
    model = fresh_adapter(folder, prompt, num_transformer_submodules=1)
    theirs = peft_steps(model, batch, flat=False)
    # Under another name the array is no prompt to our optimizer but a matrix; those of
    # fewer than 128 rows it factors only if told to.
    tx = our_recipe(min_dim_size_to_factor=1)
    network, params = ours
    loss = lambda tree: network.loss(with_prompt(params, tree["matrix"]), batch)[0]
    gradient = jax.jit(jax.grad(loss))
    tree = {"matrix": jnp.asarray(prompt)}
    state = tx.init(tree)
    for _ in range(STEPS):
        updates, state = tx.update(gradient(tree), state, tree)
        tree = optax.apply_updates(tree, updates)
    assert_close(theirs, tree["matrix"])
    # Factoring is another optimizer: without it the prompt ends elsewhere.
    unfactored = our_steps(ours, prompt, batch, our_recipe())
    assert np.abs(theirs - unfactored).max() > 0.1


# Methods inside the layers, and P-tuning's encoder.

# Our names of the modules that PEFT names by their place in transformers' blocks.
MODULES = {
    "encoder/layers/attention": "encoder.block.{}.layer.0.SelfAttention",
    "decoder/layers/self_attention": "decoder.block.{}.layer.0.SelfAttention",
    "decoder/layers/encoder_decoder_attention": (
        "decoder.block.{}.layer.1.EncDecAttention"
    ),
    "encoder/layers/mlp": "encoder.block.{}.layer.1.DenseReluDense",
    "decoder/layers/mlp": "decoder.block.{}.layer.2.DenseReluDense",
}
KERNELS = {"query": "q", "key": "k", "value": "v", "wo": "wo"}
ADAPTERS = {
    "lora": (
        LoRA(rank=3, alpha=6.0),
        peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q", "v"]),
        {"a": "lora_A.default.weight", "b": "lora_B.default.weight"},
    ),
    "ia3": (
        IA3(),
        peft.IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"]),
        {"input": "ia3_l.default", "output": "ia3_l.default"},
    ),
}


def at_peft(model, name, leaf):
    """PEFT's parameter of every layer for one of our leaves."""
    path, kernel, field = name.rsplit("/", 2)
    place = f"{MODULES[path]}.{KERNELS[kernel]}"
    get = model.base_model.model.get_parameter
    return [get(f"{place.format(i)}.{leaf[field]}") for i in range(2)]


def as_ours(arrays, shape):
    """Stacked over layers; PyTorch's matrices are transposed."""
    return np.stack([np.asarray(x).T.reshape(shape[1:]) for x in arrays])


def without_prompt(ours, batch):
    """Our model and its batch where no prompt stands in front of the text."""
    model, params = ours
    network = dataclasses.replace(
        model, network=dataclasses.replace(model.network, prompts=())
    )
    text = batch["encoder_input_tokens"][:, LENGTH:]
    return network, params, {**batch, "encoder_input_tokens": text}


def our_values(method, leaves, ours, batch):
    """Loss and logits, and the gradient of the leaves."""
    network, params, text = without_prompt(ours, batch)

    def loss(leaves):
        part = method.materialize(method.place("x", leaves), params)
        tree = trees.merge(assemble({"x": part}, ["x"]), params)
        return network.loss(tree, text)[0], network.logits(tree, text)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(leaves)


def assert_same_values(model, batch, found, logits):
    """Compares with PEFT's loss and logits, and leaves it with gradients."""
    theirs = run_peft(model, batch)
    theirs.loss.backward()
    real = batch["decoder_target_tokens"] > 0
    assert_close(logits[real], theirs.logits.detach().numpy()[real])
    assert_close(found, theirs.loss.detach())


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_compute_what_pefts_do(kind, folder, ours, batch):
    method, config, names = ADAPTERS[kind]
    config.task_type = "SEQ_2_SEQ_LM"
    model = peft.get_peft_model(base(folder), config).eval()
    _, params = ours
    start = Start(np.zeros((0, WIDTH)), params["token_embedder"]["embedding"], params)
    shapes = trees.flatten(jax.eval_shape(method.init, jax.random.key(0), start))
    torch.manual_seed(1)
    leaves = {}
    for name, leaf in shapes.items():
        theirs = at_peft(model, name, names)
        with torch.no_grad():
            for parameter in theirs:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        leaves[name] = as_ours([p.detach() for p in theirs], leaf.shape)
    (found, logits), gradient = our_values(method, trees.unflatten(leaves), ours, batch)
    assert_same_values(model, batch, found, logits)
    for name, grad in trees.flatten(gradient).items():
        wanted = [p.grad for p in at_peft(model, name, names)]
        assert_close(grad, as_ours(wanted, grad.shape))


def test_a_decoder_prefix_computes_what_pefts_does(folder, ours, batch):
    """Its keys have the relative positions of what precedes the decoder's tokens.

    PEFT has 2 L entries of P rows. It repeats the list and cuts it into fours, of which
    the decoder's self-attention takes two: layer i gets entries 4 i and 4 i + 1, modulo
    2 L, and every other pair is never read.
    """
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(base(folder), config).eval()
    weight = model.prompt_encoder["default"].embedding.weight
    entries = lambda array: np.asarray(array).reshape(3, 4, WIDTH).transpose(1, 0, 2)
    theirs = entries(weight.detach())
    leaves = {"key_rows": theirs[[0, 0]], "value_rows": theirs[[1, 1]]}
    (found, logits), gradient = our_values(DecoderPrefix(length=3), leaves, ours, batch)
    assert_same_values(model, batch, found, logits)
    wanted = entries(weight.grad)
    assert_close(gradient["key_rows"].sum(axis=0), wanted[0])
    assert_close(gradient["value_rows"].sum(axis=0), wanted[1])
    assert not wanted[2:].any()


def values_of(found, ours, batch):
    """Loss and logits with what a folder holds."""
    network, params, text = without_prompt(ours, batch)
    part = {adapters.COLLECTION: found.slots}
    tree = trees.merge(assemble({"x": part}, ["x"]), params)
    adapter_file.check_fits(found.slots, params)
    return jax.jit(network.loss)(tree, text)[0], jax.jit(network.logits)(tree, text)


FOLDERS = {
    "lora": peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q", "v", "wo"]),
    "rslora": peft.LoraConfig(r=3, use_rslora=True, target_modules=["q", "k", "o"]),
    "ia3": ADAPTERS["ia3"][1],
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=3),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_of_adapters_go_both_ways(kind, folder, ours, batch, tmp_path):
    """What PEFT wrote computes the same here; what we write, the same there."""
    config = FOLDERS[kind]
    config.task_type = "SEQ_2_SEQ_LM"
    model = peft.get_peft_model(base(folder), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path / "theirs")
    found = prompt_formats.load_with_slots(tmp_path / "theirs")
    loss, logits = values_of(found, ours, batch)
    real = batch["decoder_target_tokens"] > 0
    theirs = run_peft(model, batch)
    assert_close(logits[real], theirs.logits.detach().numpy()[real])
    assert_close(loss, theirs.loss.detach())
    if kind == "prefix":
        return  # Layers i and i + L/2 share theirs: ours are not written.
    prompt_formats.save_as(tmp_path / "ours", found, "peft")
    again = peft.PeftModel.from_pretrained(base(folder), tmp_path / "ours").eval()
    assert_close(run_peft(again, batch).logits.detach(), theirs.logits.detach())
    mine, others = (
        peft.PeftConfig.from_json_file(tmp_path / name / "adapter_config.json")
        for name in ("ours", "theirs")
    )
    assert mine.keys() <= others.keys()


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_the_encoder_of_p_tuning_is_pefts(kind):
    hidden = 6
    theirs = peft.PromptEncoder(
        peft.PromptEncoderConfig(
            peft_type="P_TUNING",
            task_type="SEQ_2_SEQ_LM",
            num_virtual_tokens=LENGTH,
            token_dim=WIDTH,
            num_transformer_submodules=1,
            encoder_hidden_size=hidden,
            encoder_num_layers=2,
            encoder_reparameterization_type=kind.upper(),
            encoder_dropout=0.0,
        )
    )
    state = {name: x.detach().numpy() for name, x in theirs.state_dict().items()}
    leaves = {"rows": state["embedding.weight"]}
    heads = [name for name in state if name.startswith("mlp_head") and "weight" in name]
    for index, name in enumerate(sorted(heads)):
        bias = state[name.replace("weight", "bias")]
        leaves[f"mlp_{index}"] = {"kernel": state[name].T, "bias": bias}
    for layer in range(2 if kind == "lstm" else 0):
        for way, end in (("forward", ""), ("backward", "_reverse")):
            get = lambda what, layer=layer, end=end: state[
                f"lstm_head.{what}_l{layer}{end}"
            ]
            leaves[f"lstm_{layer}_{way}"] = {
                "input": get("weight_ih").T,
                "recurrent": get("weight_hh").T,
                "bias": get("bias_ih") + get("bias_hh"),
            }
    method = PTuning(encoder=kind, hidden=hidden)
    start = Start(np.zeros((LENGTH, WIDTH), np.float32), None, {})
    ours = jax.eval_shape(method.init, jax.random.key(0), start)
    assert jax.tree.map(lambda x: x.shape, ours) == jax.tree.map(np.shape, leaves)
    with torch.no_grad():
        wanted = theirs(torch.arange(LENGTH)[None])[0]
    assert_close(method.rows(leaves, {}), wanted)


def fresh_multitask(folder, **options):
    """What a user of PEFT tunes, some way from its start, which is nearly zero."""
    config = peft.MultitaskPromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=LENGTH, **options
    )
    model = peft.get_peft_model(base(folder), config).eval()
    torch.manual_seed(1)
    own = model.prompt_encoder["default"]
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model, own


def test_a_multitask_prompt_computes_what_pefts_does(folder, ours, batch):
    """Logits, loss and the gradient of all three leaves."""
    theirs, own = fresh_multitask(folder, num_transformer_submodules=1)
    answers = run_peft(theirs, batch, task_ids=torch.zeros(3, dtype=torch.long))
    answers.loss.backward()
    leaves = {
        "shared": own.embedding.weight.detach().numpy(),
        "left": own.prefix_task_cols.detach().numpy()[0, :, 0],
        "right": own.prefix_task_rows.detach().numpy()[0, 0],
    }
    method, (model, params) = MultitaskPrompt(), ours

    def loss(leaves):
        part = method.materialize(method.place("task", leaves), params)
        bank = model.network.prompts
        tree = trees.merge(assemble({"task": part}, ["task"], bank), params)
        return model.loss(tree, batch)[0], model.logits(tree, batch)

    (found, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(leaves)
    real = batch["decoder_target_tokens"] > 0
    assert_close(logits[real], answers.logits.detach().numpy()[real])
    assert_close(found, answers.loss.detach())
    assert_close(gradient["shared"], own.embedding.weight.grad)
    assert_close(gradient["left"], own.prefix_task_cols.grad[0, :, 0])
    assert_close(gradient["right"], own.prefix_task_rows.grad[0, 0])


@pytest.mark.parametrize("rank", [1, 3])
def test_multitask_prompts_come_in_and_go_out_as_their_product(
    rank, folder, ours, batch, tmp_path
):
    model, _ = fresh_multitask(folder, num_ranks=rank, num_transformer_submodules=1)
    model.save_pretrained(tmp_path / "theirs")
    array, card = prompt_formats.load(tmp_path / "theirs")
    assert array.shape == (LENGTH, WIDTH) and card["method"] == "multitask_prompt"
    with torch.no_grad():
        theirs = run_peft(model, batch, task_ids=torch.zeros(3, dtype=torch.long))
    prompt_formats.save(tmp_path / "ours", array, card, "peft")
    again = peft.PeftModel.from_pretrained(base(folder), tmp_path / "ours").eval()
    assert_same_answers(again, ours, array, batch)
    assert_close(run_peft(again, batch).loss.detach(), theirs.loss)


def test_of_a_doubled_multitask_prompt_the_rows_are_those_of_pefts_generate(
    folder, tmp_path
):
    model, _ = fresh_multitask(folder)
    model.save_pretrained(tmp_path)
    array, card = prompt_formats.load(tmp_path)
    with torch.no_grad():
        rows = model.get_prompt(1, task_ids=torch.zeros(1, dtype=torch.long))
    assert_close(array, rows[0, :LENGTH])
    assert "before the decoder's input while it trains" in card["notes"][1]


def test_a_multitask_prompt_of_several_tasks_is_refused(folder, tmp_path):
    fresh_multitask(folder, num_tasks=2)[0].save_pretrained(tmp_path)
    with pytest.raises(UserError, match="num_tasks 2, and a prompt is that of one"):
        prompt_formats.load(tmp_path)
