"""The reference GPT: presets, init, muP, caching, padding, checkpoints."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import cgpt_kernels as ck
from cgpt_kernels.gpt import ACTIVATIONS

SMALL = ck.GPTConfig(vocab_size=101, n_positions=64, n_embd=48, n_layer=3, n_head=3)
SMALL_MUP = dataclasses.replace(
    SMALL,
    initializer_range=0.08,
    mup_embeddings_scale=10.0,
    mup_width_scale=256 / 48,
    mup_scale_qk_dot_by_d=True,
)


def random_model(config=SMALL, seed=0):
    """A model whose biases and layer norms are random too, so that no term can be forgotten."""
    torch.manual_seed(seed)
    model = ck.GPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return model


def random_ids(batch=3, length=20, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SMALL.vocab_size, (batch, length), generator=generator)


def left_padded(batch=3, length=20, padding=(7, 0, 3)):
    mask = torch.ones(batch, length, dtype=torch.long)
    for row, n in enumerate(padding):
        mask[row, :n] = 0
    return mask, (mask.cumsum(1) - 1).clamp(min=0)


@pytest.fixture(scope="module")
def hf_gpt2():
    """Builds a random GPT2LMHeadModel with the given activation, and its folder."""
    transformers = pytest.importorskip("transformers")

    def build(folder, activation, **save):
        config = transformers.GPT2Config(
            vocab_size=101,
            n_positions=64,
            n_embd=48,
            n_layer=3,
            n_head=3,
            activation_function=activation,
            bos_token_id=0,
            eos_token_id=0,
        )
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.05)
        model.save_pretrained(folder, **save)
        return model

    return build


# Parameters of the published checkpoints, head tied. Cerebras-GPT: arXiv 2304.03208, table 1;
# GPT-2: the sizes of its four released checkpoints.
PUBLISHED = {
    "cerebras-gpt-111m": 111e6,
    "cerebras-gpt-256m": 256e6,
    "cerebras-gpt-590m": 590e6,
    "cerebras-gpt-1.3b": 1.316e9,
    "cerebras-gpt-2.7b": 2.652e9,
    "cerebras-gpt-6.7b": 6.658e9,
    "cerebras-gpt-13b": 12.853e9,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


@pytest.mark.parametrize("name", ck.GPTConfig.names())
def test_preset_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = ck.GPT(ck.GPTConfig.from_name(name))
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(PUBLISHED[name.removesuffix("-mup")], rel=1e-3)


def test_mup_presets_exist_up_to_2_7b_and_carry_the_published_scalings():
    mup = [n for n in ck.GPTConfig.names() if n.endswith("-mup")]
    assert mup == [f"cerebras-gpt-{s}-mup" for s in ("111m", "256m", "590m", "1.3b", "2.7b")]
    config = ck.GPTConfig.from_name("cerebras-gpt-1.3b-mup")
    assert config.is_mup and not ck.GPTConfig.from_name("cerebras-gpt-1.3b").is_mup
    assert config.mup_embeddings_scale == 10
    assert config.logits_scale == 256 / 2048
    assert config.attention_scale == 1 / 128


@pytest.mark.parametrize("mup", [False, True])
def test_init_has_the_published_standard_deviations(mup):
    torch.manual_seed(0)
    name = "cerebras-gpt-111m-mup" if mup else "cerebras-gpt-111m"
    config = dataclasses.replace(ck.GPTConfig.from_name(name), n_layer=2, vocab_size=4001)
    model = ck.GPT(config)
    embedding, hidden = (0.08, 0.08 * (768 / 256) ** -0.5) if mup else (0.02, 0.02)
    expected = {
        "transformer.wte.weight": embedding,
        "transformer.wpe.weight": embedding,
        "transformer.h.1.attn.c_attn.weight": hidden,
        "transformer.h.1.mlp.c_fc.weight": hidden,
        "transformer.h.1.attn.c_proj.weight": hidden / math.sqrt(2 * 2),
        "transformer.h.1.mlp.c_proj.weight": hidden / math.sqrt(2 * 2),
    }
    parameters = dict(model.named_parameters())
    for key, std in expected.items():
        # The sample deviation of n normal values is within 5 / sqrt(2 n) of the true one.
        tolerance = 5 / math.sqrt(2 * parameters[key].numel())
        assert parameters[key].std().item() == pytest.approx(std, rel=tolerance), key
    assert all(not p.any() for n, p in parameters.items() if n.endswith(".bias"))
    assert all((p == 1).all() for n, p in parameters.items() if ".ln_" in n and "weight" in n)


def test_optimizer_groups_decay_matrices_only_and_scale_mup_hidden_rates():
    for config in (SMALL, SMALL_MUP):
        model = ck.GPT(config)
        rate = {}
        for group in model.optimizer_groups(0.01, weight_decay=0.1):
            for p in group["params"]:
                assert group["weight_decay"] == (0.1 if p.dim() == 2 else 0.0)
                rate[id(p)] = group["lr"]
        parameters = dict(model.named_parameters())
        assert len(rate) == len(parameters)  # each once, the tied head included
        assert rate[id(parameters["transformer.wte.weight"])] == 0.01
        hidden = rate[id(parameters["transformer.h.0.mlp.c_fc.weight"])]
        assert hidden == 0.01 * config.mup_width_scale


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_logits_and_padding_equal_hugging_face(tmp_path, hf_gpt2, activation):
    hf = hf_gpt2(tmp_path, activation)
    model = ck.GPT.from_pretrained(tmp_path)
    ids = random_ids()
    mask, positions = left_padded()
    with torch.no_grad():
        torch.testing.assert_close(model(ids), hf(ids).logits, rtol=0, atol=1e-5)
        ours = model(ids, attention_mask=mask, position_ids=positions)
        theirs = hf(ids, attention_mask=mask, position_ids=positions).logits
    kept = mask.bool()
    torch.testing.assert_close(ours[kept], theirs[kept], rtol=0, atol=1e-5)
    assert ours.isfinite().all()


def test_loss_equals_hugging_face(tmp_path, hf_gpt2):
    hf = hf_gpt2(tmp_path, "gelu")
    model = ck.GPT.from_pretrained(tmp_path)
    ids = random_ids()
    targets = ids.roll(-1, 1)  # Hugging Face shifts its labels itself
    targets[:, -1] = -100
    targets[0, 3] = -100
    labels = ids.clone()
    labels[0, 4] = -100
    with torch.no_grad():
        torch.testing.assert_close(model(ids, targets=targets), hf(ids, labels=labels).loss)


def test_sharded_checkpoint_equals_the_single_file(tmp_path, hf_gpt2):
    hf_gpt2(tmp_path / "one", "gelu")
    hf_gpt2(tmp_path / "many", "gelu", max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 1
    one = ck.GPT.from_pretrained(tmp_path / "one").state_dict()
    many = ck.GPT.from_pretrained(tmp_path / "many").state_dict()
    assert all(torch.equal(one[k], many[k]) for k in one)


def test_files_of_torch_save_load_as_safetensors_do(tmp_path, hf_gpt2):
    hf = hf_gpt2(tmp_path, "gelu_python")  # "gelu" by an older name
    ids, state = random_ids(), hf.state_dict()
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")  # as published, the tied head twice
    with torch.no_grad():
        expected = hf(ids).logits
        torch.testing.assert_close(ck.GPT.from_pretrained(tmp_path)(ids), expected)
        (tmp_path / "pytorch_model.bin").unlink()
        places = {}
        for i, name in enumerate(state):
            places[name] = f"pytorch_model-{i % 2}.bin"
        for file in set(places.values()):
            torch.save({n: state[n] for n in places if places[n] == file}, tmp_path / file)
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": places}))
        torch.testing.assert_close(ck.GPT.from_pretrained(tmp_path)(ids), expected)


def test_unprefixed_names_and_old_mask_buffers_load(tmp_path):
    # Published Cerebras-GPT files are GPT2Model's, without the prefix; older ones carry attn.bias.
    model = random_model()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored = {k.removeprefix("transformer."): v for k, v in stored.items()}
    stored["h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
    stored["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(stored, tmp_path / "model.safetensors")
    ids = random_ids()
    assert torch.equal(ck.GPT.from_pretrained(tmp_path)(ids), model(ids))


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_saved_checkpoint_loads_in_transformers_with_equal_logits(tmp_path, activation):
    transformers = pytest.importorskip("transformers")
    model = random_model(dataclasses.replace(SMALL, activation_function=activation))
    model.save_pretrained(tmp_path)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(hf) is transformers.GPT2LMHeadModel
    ids = random_ids()
    with torch.no_grad():
        torch.testing.assert_close(hf(ids).logits, model(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [SMALL, SMALL_MUP], ids=["plain", "mup"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_save_and_load_is_bit_exact(tmp_path, config, dtype):
    model = random_model(config).to(dtype)
    model.save_pretrained(tmp_path)
    back = ck.GPT.from_pretrained(tmp_path)
    assert back.config == model.config
    assert back.lm_head.weight is back.transformer.wte.weight
    for name, p in model.state_dict().items():
        assert back.state_dict()[name].dtype == dtype
        assert torch.equal(back.state_dict()[name], p), name
    assert ck.GPT.from_pretrained(tmp_path, dtype=torch.float64).lm_head.weight.dtype == (
        torch.float64
    )


@pytest.mark.parametrize(
    "named,kept",
    [("bfloat16", torch.bfloat16), (None, torch.float32), ("int8", torch.float32)],
)
def test_weights_of_several_dtypes_load_in_one(tmp_path, named, kept):
    """Layer norms in fp32 beside 16-bit projections, as mixed precision writes them."""
    model = random_model()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name, t in stored.items():
        t = t if ".ln_" in name else t.to(torch.float16 if "wpe" in name else torch.bfloat16)
        stored[name] = t
    save_file(stored, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    if named is not None:
        config["torch_dtype"] = named
    (tmp_path / "config.json").write_text(json.dumps(config))
    back = ck.GPT.from_pretrained(tmp_path)
    assert {p.dtype for p in back.parameters()} == {kept}
    for name, p in model.named_parameters():
        assert torch.equal(back.state_dict()[name], p.to(stored[name].dtype).to(kept)), name
    assert back(random_ids()).isfinite().all()
    wide = ck.GPT.from_pretrained(tmp_path, dtype=torch.float64)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}


def test_failed_save_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    model = random_model()
    model.save_pretrained(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def fail(weights, file, metadata):
        file.write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr("cgpt_kernels.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        random_model(seed=1).save_pretrained(tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_mup_checkpoint_is_refused_by_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    random_model(SMALL_MUP).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="btlm"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(Exception, match="scale_attn_weights"):
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path)


def test_published_mup_config_is_understood():
    # The fields of Cerebras-GPT 1.3B muP as published.
    published = {
        "model_type": "btlm",
        "n_embd": 2048,
        "n_inner": 8192,
        "n_layer": 24,
        "n_head": 16,
        "n_positions": 2048,
        "vocab_size": 50257,
        "activation_function": "gelu",
        "layer_norm_epsilon": 1e-5,
        "position_embedding_type": "learned",
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "mup_embeddings_scale": 10,
        "mup_output_alpha": 1.0,
        "mup_width_scale": 0.125,
        "mup_scale_qk_dot_by_d": True,
    }
    preset = dataclasses.asdict(ck.GPTConfig.from_name("cerebras-gpt-1.3b-mup"))
    config = dataclasses.asdict(ck.GPTConfig.from_dict(published))
    not_stated = ("initializer_range", "bos_token_id", "eos_token_id")
    assert all(config[k] == preset[k] for k in preset if k not in not_stated)


def test_dropout_in_training_draws_as_transformers_does(hf_gpt2, tmp_path):
    hf, ids = hf_gpt2(tmp_path, "gelu_new"), random_ids()
    model = ck.GPT.from_pretrained(tmp_path)
    assert model.config.resid_pdrop == hf.config.resid_pdrop == 0.1
    outputs = []
    for one in (hf.train(), model.train()):
        torch.manual_seed(3)
        out = one(ids)
        outputs.append(out if isinstance(out, torch.Tensor) else out.logits)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs[1], model(ids)), "the next masks must be other ones"
    torch.testing.assert_close(model.eval()(ids), hf.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_dropout_of_a_config_is_in_range():
    with pytest.raises(ValueError, match=r"GPTConfig: attn_pdrop must be in \[0, 1\), got 1.0"):
        dataclasses.replace(SMALL, attn_pdrop=1.0)


def test_mup_forward_scales_embeddings_attention_and_logits():
    model = random_model(SMALL_MUP)
    plain = ck.GPT(dataclasses.replace(SMALL, mup_scale_qk_dot_by_d=True)).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        plain.transformer.wpe.weight *= 10
        plain.transformer.wte.weight *= 10  # the tied head too, which is divided out below
        expected = plain(random_ids()) / 10 * (256 / 48)
        actual = model(random_ids())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert model.transformer.h[0].attn.scale == 1 / 16


def test_folded_mup_is_a_plain_gpt2_with_equal_logits(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = random_model(SMALL_MUP)
    ids = random_ids()
    with torch.no_grad():
        expected = model(ids)
        folded = model.fold_mup()
        assert not folded.config.is_mup
        tolerance = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(folded(ids), expected, rtol=0, atol=tolerance)
        assert torch.equal(model(ids), expected)  # the original is untouched
        folded.save_pretrained(tmp_path)
        hf = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(hf(ids).logits, expected, rtol=0, atol=tolerance)


def test_cached_steps_equal_one_pass():
    model, ids = random_model(), random_ids()
    with torch.no_grad():
        whole = model(ids)
        cache = model.new_cache(3, 20)
        # one prompt, one decode step, several new tokens at once (causal among themselves)
        parts = [model(ids[:, a:b], cache=cache) for a, b in ((0, 5), (5, 6), (6, 20))]
    assert cache.length == 20
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)


def test_cached_steps_with_left_padding_equal_the_unpadded_prompts():
    model, ids = random_model(), random_ids()
    padding = (7, 0, 3)
    mask, positions = left_padded(padding=padding)
    with torch.no_grad():
        cache = model.new_cache(3, 20)
        first = model(
            ids[:, :12], attention_mask=mask[:, :12], position_ids=positions[:, :12], cache=cache
        )
        rest = model(ids[:, 12:], attention_mask=mask, position_ids=positions[:, 12:], cache=cache)
        for row, n in enumerate(padding):
            alone = model(ids[row : row + 1, n:])[0]
            padded = torch.cat([first[row, n:], rest[row]])
            torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)


def test_future_tokens_do_not_change_earlier_logits():
    model, ids = random_model(), random_ids()
    changed = ids.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % SMALL.vocab_size
    with torch.no_grad():
        assert torch.equal(model(ids)[:, :10], model(changed)[:, :10])


def test_last_only_is_the_last_row():
    model, ids = random_model(), random_ids()
    with torch.no_grad():
        last = model(ids, last_only=True)
        assert last.shape == (3, 1, 101)
        torch.testing.assert_close(last, model(ids)[:, -1:], rtol=0, atol=1e-6)


def test_training_reduces_the_loss_and_keeps_the_head_tied():
    torch.manual_seed(0)
    model, ids = ck.GPT(SMALL), random_ids()
    optimizer = torch.optim.AdamW(model.optimizer_groups(1e-3))
    losses = []
    for _ in range(20):
        loss = model(ids, targets=ids.roll(-1, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(101), abs=0.15)  # uniform guess at init
    assert losses[-1] < losses[0] - 0.3
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiled_whole_graph_equals_eager(activation):
    model = random_model(dataclasses.replace(SMALL, activation_function=activation))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(random_ids()), model(random_ids()))


def test_compiled_once_for_every_length():
    model = random_model()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (20, 7, 33, 1):
            ids = random_ids(length=length)
            torch.testing.assert_close(compiled(ids), model(ids))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_head": 5}, "n_embd must be a multiple of n_head, got n_embd 48 and n_head 5"),
        ({"activation_function": "swiglu"}, "one of gelu, gelu_new, relu, got 'swiglu'"),
        ({"n_layer": 0}, "n_layer must be a positive integer, got 0"),
        ({"vocab_size": 1.5}, "vocab_size must be a positive integer, got 1.5"),
    ],
)
def test_config_errors_name_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match=r"'cerebras-gpt-7b'\. Known: cerebras-gpt-111m"):
        ck.GPTConfig.from_name("cerebras-gpt-7b")


def test_forward_errors_name_what_was_given():
    model, ids = random_model(), random_ids()
    with pytest.raises(ValueError, match="65 tokens exceed n_positions = 64"):
        model(random_ids(length=65))
    with pytest.raises(ValueError, match=r"\[0, 101\) = vocab_size, got 101"):
        model(ids.index_fill(1, torch.tensor([4]), 101))
    with pytest.raises(ValueError, match="got -1"):
        model(ids.index_fill(1, torch.tensor([4]), -1))
    with pytest.raises(ValueError, match=r"\[B, S\] with S >= 1, got \(3, 0\)"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(3, 20\)"):
        model(ids, attention_mask=torch.ones(3, 19))
    with pytest.raises(ValueError, match="cache holds 3 x 16 tokens, got 3 x 20"):
        model(ids, cache=model.new_cache(3, 16))


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "llama"}, "model_type must be 'gpt2' .* got 'llama'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "must be False, got True"),
        ({"add_cross_attention": True}, "add_cross_attention must be False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be True"),
        ({"position_embedding_type": "alibi"}, "must be 'learned', got 'alibi'"),
        ({"activation_function": "silu"}, "activation_function must be one of"),
        ({"n_embd": 96}, r"c_attn\.bias must have shape \(288,\), got \(144,\)"),
        ({"n_layer": 4}, r"12 tensors are missing, the first is transformer\.h\.3\.ln_1\.weight"),
        ({"n_layer": 2}, r"no place for tensor 'transformer\.h\.2\."),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(tmp_path, changes, message):
    random_model().save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        ck.GPT.from_pretrained(tmp_path)


def test_broken_checkpoint_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"is not a folder with a config\.json"):
        ck.GPT.from_pretrained(tmp_path / "nothing")
    random_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    stored = {n: t.to(torch.int8) for n, t in load_file(weights).items()}
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
        ck.GPT.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        ck.GPT.from_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(ValueError, match=r"names model-1\.safetensors, which is missing"):
        ck.GPT.from_pretrained(tmp_path)
    index.write_text('{"weight_map": {"a": "../model-1.safetensors"}}')
    with pytest.raises(ValueError, match=r"names \.\./model-1\.safetensors, which lies outside"):
        ck.GPT.from_pretrained(tmp_path)
    index.write_text('{"weight_map": ["a"]}')
    with pytest.raises(ValueError, match=r"index\.json: weight_map must map names"):
        ck.GPT.from_pretrained(tmp_path)
    index.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: not a readable file of weights"):
        ck.GPT.from_pretrained(tmp_path)
    save_file(stored, weights)
    with pytest.raises(ValueError, match=r"must be in fp32, bf16, fp16 or fp64, got torch\.int8"):
        ck.GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        ck.GPT.from_pretrained(tmp_path)


def test_untied_head_is_refused_and_a_stored_tied_one_loads(tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored["transformer.wte.weight"].clone()
    save_file(stored, tmp_path / "model.safetensors")
    ids = random_ids()
    assert torch.equal(ck.GPT.from_pretrained(tmp_path)(ids), model(ids))
    stored["lm_head.weight"][5] += 1
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from wte\.weight"):
        ck.GPT.from_pretrained(tmp_path)
