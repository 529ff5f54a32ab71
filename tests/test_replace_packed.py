"""Packed copies of weights: made once, always those of the parameters as they are, accounted for;
and what quantizing them, or keeping nothing else, does to a model."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import cgpt_kernels as ck
from cgpt_kernels.assets import TINY
from cgpt_kernels.ops.gemm import pack_weight
from cgpt_kernels.replace import packing
from tests import small_gpt2

QUANTIZED = ("int8", "int4")


def linear(K=48, N=40, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N))
    return model, ck.replace(model, **options), torch.randn(3, K)


@torch.no_grad()
def run(model, x):
    return model(x)


def reference():
    torch.manual_seed(0)
    config = ck.GPTConfig(vocab_size=97, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    return ck.GPT(config).eval()


# ---- copies follow their parameters -------------------------------------------------------------


def step_of_sgd(p):
    p.grad = torch.ones_like(p)
    torch.optim.SGD([p], lr=0.1).step()


def in_place(p):
    with torch.no_grad():
        p.mul_(2)


def through_data(p):
    p.data.mul_(2)


def new_data(p):
    p.data = p.data + 1


@pytest.mark.parametrize("change", [step_of_sgd, in_place, through_data, new_data])
def test_a_copy_follows_its_parameter(change):
    model, _, x = linear()
    run(model, x)
    made = model[0].packed_copy.weight
    run(model, x)
    assert model[0].packed_copy.weight is made, "packed again without a change"
    change(model[0].weight)
    wanted = nn.functional.linear(x, model[0].weight, model[0].bias)
    small_gpt2.close(run(model, x), wanted.detach())


def test_a_copy_follows_load_state_dict_and_a_cast():
    model, _, x = linear()
    run(model, x)
    model.load_state_dict({"0.weight": torch.ones(40, 48), "0.bias": torch.zeros(40)})
    small_gpt2.close(run(model, x), x.sum(-1, keepdim=True).expand(3, 40))
    model.bfloat16()
    assert run(model, x.bfloat16()).dtype == torch.bfloat16
    assert model[0].packed_copy.weight.format == "bf16"


def test_nothing_is_packed_for_training():
    model, replacement, x = linear()
    model(x).sum().backward()
    assert replacement.table.packed == 0 and model[0].weight.grad is not None


def test_short_memory_leaves_the_weight_alone(monkeypatch):
    monkeypatch.setattr(packing, "_room_for", lambda weight: False)
    model, replacement, x = linear()
    wanted = nn.functional.linear(x, model[0].weight, model[0].bias).detach()
    small_gpt2.close(run(model, x), wanted)
    assert replacement.table.packed == 0


def test_the_table_accounts_for_every_byte():
    model, replacement, x = linear(K=64, N=96)
    assert replacement.table.packed == 0
    run(model, x)
    assert replacement.table.packed == 64 * 96 * 4
    assert "0.0 MB" in str(replacement.table)
    replacement.restore()
    assert replacement.table.packed == 0 and "packed_copy" not in model[0].__dict__


def test_copies_are_left_out_of_pickles_and_deep_copies():
    model, _, x = linear(K=256, N=256)
    size = len(pickle.dumps(model))
    y = run(model, x)
    assert len(pickle.dumps(model)) < size + 1000
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[0].packed_copy is None
        assert torch.equal(run(other, x), y)


# ---- the packed copy as the only weight ---------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", [reference, small_gpt2.make], ids=["reference", "hf"])
def test_given_up_weights_unpack_bit_for_bit(family, dtype):
    model = family().to(dtype)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    ids = small_gpt2.tokens()
    wanted = ck.generate(model, ids, 8)
    replacement = ck.replace(model, keep_original=False)
    assert sum(p.is_meta for p in model.parameters()) == 4 * 2  # four projections in two layers
    assert torch.equal(ck.generate(model, ids, 8), wanted)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], t) for name, t in before.items())
    replacement.restore()
    assert not any(p.is_meta for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_without_originals_is_copied_saved_and_loaded(tmp_path):
    model = small_gpt2.make()
    ids = small_gpt2.tokens()
    wanted = ck.generate(model, ids, 8)
    ck.replace(model, keep_original=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(ck.generate(other, ids, 8), wanted)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(ck.generate(loaded, ids, 8), wanted)

    other = small_gpt2.make(initializer_range=0.1)
    model.load_state_dict(other.state_dict())
    assert packing.given_up(model.transformer.h[0].attn.c_attn)
    assert torch.equal(ck.generate(model, ids, 8), ck.generate(other, ids, 8))


def test_hugging_face_generate_runs_without_originals():
    model = small_gpt2.make()
    ids = small_gpt2.tokens()
    options = {"max_new_tokens": 8, "do_sample": False}
    wanted = model.generate(ids, **options)
    ck.replace(model, keep_original=False)
    assert torch.equal(model.generate(ids, **options), wanted)


def test_a_model_without_originals_does_not_train():
    model = reference()
    ck.replace(model, keep_original=False)
    with pytest.raises(RuntimeError, match=r"a packed weight is for inference"):
        model(small_gpt2.tokens())


# ---- quantized ----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_original", [True, False])
@pytest.mark.parametrize("quantize", QUANTIZED)
@pytest.mark.parametrize("family", [reference, small_gpt2.make], ids=["reference", "hf"])
def test_modules_and_decoder_compute_by_the_dequantized_weights(family, quantize, keep_original):
    model = family()
    twin = copy.deepcopy(model)
    for name, module in twin.named_modules():
        if hasattr(module, "weight") and type(module).__name__ in ("Linear", "Conv1D"):
            layout = "kn" if type(module).__name__ == "Conv1D" else "nk"
            format = "int8" if name == "lm_head" else quantize
            made = pack_weight(module.weight, format, weight_layout=layout)
            module.weight = nn.Parameter(made.unpack(weight_layout=layout))
    ck.replace(model, quantize=quantize, keep_original=keep_original)
    ids = small_gpt2.tokens(1, 9)  # few enough rows for activations of 15 bits
    with torch.no_grad():
        found, wanted = (getattr(m(ids), "logits", m(ids)) for m in (model, twin))
    assert (found - wanted).abs().max() <= 2e-3 * wanted.abs().max()
    ck.generate(model, ids, 8)


@pytest.mark.parametrize("quantize", QUANTIZED)
def test_restoring_gives_the_weights_back(quantize):
    model = reference()
    before = copy.deepcopy(model.state_dict())
    with ck.replace(model, quantize=quantize) as replacement:
        assert 0 < replacement.table.packed < sum(p.nbytes for p in model.parameters()) / 2
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(hasattr(m, "packed_copy") for m in model.modules())


def test_quantize_can_be_changed_and_taken_back():
    model, _, x = linear(K=64, N=64)
    plain = run(model, x)
    outputs = []
    for quantize in (*QUANTIZED, None):
        ck.replace(model, quantize=quantize)
        outputs.append(run(model, x))
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[2], plain)


def test_quantized_copies_follow_their_parameters():
    model, _, x = linear(K=64, N=64, quantize="int8")
    first = run(model, x)
    in_place(model[0].weight)
    bias = model[0].bias.detach()
    small_gpt2.close(run(model, x) - bias, 2 * (first - bias), tol=1e-5)


@pytest.mark.parametrize("quantize", QUANTIZED)
def test_a_quantized_model_is_saved_whole_and_read_back(quantize):
    model, _, x = linear(K=64, N=64, quantize=quantize, keep_original=False)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(run(torch.load(file, weights_only=False), x), run(model, x))


def test_errors_change_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    cases = [
        ({"quantize": "int2"}, r"quantize must be None, 'int8' or 'int4', got 'int2'"),
        ({"quantize": "int8", "backend": "eager"}, r"'auto', 'cpu' or 'cuda', got 'eager'"),
        (
            {"keep_original": False, "backend": "eager"},
            r"needs backend 'auto' or 'cpu', got 'eager'",
        ),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            ck.replace(model, **options)
        assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match=r"takes nn.Linear or Conv1D weights, LayerNorm has none"):
        ck.replace(nn.LayerNorm(4), quantize="int8")
    with pytest.raises(ValueError, match=r"needs weights in fp32, bf16 or fp16 on cpu"):
        ck.replace(model.double(), quantize="int8")
    model.float()
    ck.replace(model, keep_original=False)
    with pytest.raises(ValueError, match=r"restore the model first"):
        ck.replace(model, quantize="int8")


# ---- what it does to language -------------------------------------------------------------------


@pytest.mark.parametrize("quantize, allowed", [("int8", 0.01), ("int4", 0.05)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_perplexity_changes_little(quantize, allowed, dtype):
    """On text that every Python has and the model was not trained on."""
    from tokenizers import Tokenizer

    from cgpt_kernels.quantize import encode, held_out_text, measure

    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    tokens = encode(TINY, tokenizer, held_out_text())
    model = ck.GPT.from_pretrained(TINY, dtype=dtype)
    report = measure(model, quantize, tokens)
    assert report.tokens > 10_000
    assert report.perplexity_change < allowed
