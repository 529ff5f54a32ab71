"""A replaced model's decoder, one call of C++ a step, computes what its modules compute."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import cgpt_kernels as ck
from cgpt_kernels.assets import TINY
from cgpt_kernels.decoder import Decoder
from cgpt_kernels.replace import decoder_parts
from cgpt_kernels.testing import FORWARD_FACTOR, SLACK
from tests import small_gpt2
from tests.small_gpt2 import REFERENCE as CONFIG
from tests.small_gpt2 import reference

MUP = dataclasses.replace(
    CONFIG,
    mup_embeddings_scale=10.0,
    mup_width_scale=0.5,
    mup_output_alpha=2.5,
    mup_scale_qk_dot_by_d=True,
)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def hold_logits(found, model, ids, *, truth=None, **inputs):
    """The numerics rule: at most twice eager's error in the same dtype, both against fp64, of the
    model itself or of another one, `truth`."""

    def last(m):
        out = m(ids, **inputs)
        return getattr(out, "logits", out)[:, -1].double()

    truth = last(truth or copy.deepcopy(model).double())
    allowed = FORWARD_FACTOR * (last(model) - truth).abs().max() + SLACK * truth.abs().max()
    assert (found.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG, activation_function="gelu_new"),
        dataclasses.replace(CONFIG, activation_function="relu", n_inner=40),
        MUP,
    ],
    ids=["gelu", "gelu_new", "relu", "mup"],
)
def test_logits_hold_the_numerics_rule(config, dtype):
    eager = reference(config, dtype)
    model = copy.deepcopy(eager)
    ck.replace(model)
    ids = small_gpt2.tokens(3, 20)
    decoder = Decoder(decoder_parts(model), 3, 64)
    hold_logits(decoder.step(ids[:, :11]), eager, ids[:, :11])
    for at in range(11, 20):
        hold_logits(decoder.step(ids[:, at : at + 1]), eager, ids[:, : at + 1])


@pytest.mark.parametrize("chunks", [(1, 19), (7, 6, 7), (19, 1)])
def test_a_prompt_may_come_in_pieces(chunks):
    model = reference()
    ck.replace(model)
    ids = small_gpt2.tokens(2, 20)
    whole = Decoder(decoder_parts(model), 2, 20).step(ids)
    decoder = Decoder(decoder_parts(model), 2, 20)
    for part in ids.split(chunks, dim=1):
        logits = decoder.step(part)
    small_gpt2.close(logits, whole)


def families():
    yield "reference", reference()
    yield "hugging face", small_gpt2.make()


@pytest.mark.parametrize("family, model", families(), ids=lambda v: v if isinstance(v, str) else "")
def test_every_tier_writes_eagers_tokens(family, model, tier):
    ids, mask = small_gpt2.left_padded(3, 12)
    wanted = [ck.generate(model, ids, 20), ck.generate(model, ids, 20, attention_mask=mask)]
    with ck.replace(model):
        assert decoder_parts(model) is not None
        found = [ck.generate(model, ids, 20), ck.generate(model, ids, 20, attention_mask=mask)]
    assert all(map(torch.equal, found, wanted))


def test_rows_do_not_depend_on_their_neighbours():
    model = reference(dtype=torch.bfloat16)
    ck.replace(model)
    ids = small_gpt2.tokens(4, 9)
    together = Decoder(decoder_parts(model), 4, 9).step(ids).clone()
    for row in range(4):
        alone = Decoder(decoder_parts(model), 1, 9).step(ids[row : row + 1])
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_the_number_of_threads_changes_no_bit(quantize):
    """Few rows run as one team of threads, whose last members may find no head or panel to do."""
    model = reference(dtype=torch.bfloat16)
    ck.replace(model, quantize=quantize)
    ids, before, found = small_gpt2.tokens(2, 9), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            decoder = Decoder(decoder_parts(model), 2, 9)
            found.append(decoder.step(ids[:, :8]).clone())
            found.append(decoder.step(ids[:, 8:]).clone())
    finally:
        torch.set_num_threads(before)
    for first, second in zip(found[2::2], found[3::2], strict=True):
        assert torch.equal(first, found[0]) and torch.equal(second, found[1])


def test_left_padding_changes_nothing_of_a_sequence():
    model = reference()
    ck.replace(model)
    ids, mask = small_gpt2.left_padded(1, 12, padding=4)
    padded = ck.generate(model, ids, 10, attention_mask=mask)
    assert torch.equal(padded[0, 12:], ck.generate(model, ids[:, 4:], 10)[0, 8:])


def sampled(model, **options):
    return ck.generate(model, small_gpt2.tokens(2, 6), 12, temperature=0.8, seed=3, **options)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.9}])
def test_sampling_draws_eagers_tokens(options):
    model = reference()
    wanted = sampled(model, **options)
    with ck.replace(model):
        assert torch.equal(sampled(model, **options), wanted)


# ---- where the modules must run -----------------------------------------------------------------


def hook(model):
    model.transformer.h[1].mlp.register_forward_hook(lambda *_: None)


def patch(model):
    block = model.transformer.h[0]
    block.forward = type(block).forward.__get__(block)


def own_norm(model):
    class MyNorm(nn.LayerNorm):
        pass

    model.transformer.ln_f.__class__ = MyNorm


@pytest.mark.parametrize("disturb", [hook, patch, own_norm])
@pytest.mark.parametrize("family", [reference, small_gpt2.make], ids=["reference", "hf"])
def test_modules_run_where_somebody_changed_them(family, disturb):
    model = family()
    ck.replace(model)
    assert decoder_parts(model) is not None
    disturb(model)
    assert decoder_parts(model) is None
    ck.generate(model, small_gpt2.tokens(), 3)


def test_modules_run_for_dropout_in_training_and_a_named_eager_backend():
    model = small_gpt2.make(resid_pdrop=0.5)
    ck.replace(model)
    assert decoder_parts(model) is not None
    assert decoder_parts(model.train()) is None
    ck.replace(model.eval(), backend="eager")
    assert decoder_parts(model) is None


def test_unreplaced_models_have_no_decoder():
    assert decoder_parts(reference()) is None
    assert decoder_parts(small_gpt2.make()) is None
    assert decoder_parts(nn.Linear(2, 2)) is None


def test_scale_by_layer_is_followed():
    model = small_gpt2.make(scale_attn_by_inverse_layer_idx=True)
    ids = small_gpt2.tokens()
    wanted = ck.generate(model, ids, 12)
    with ck.replace(model):
        assert decoder_parts(model) is not None
        assert torch.equal(ck.generate(model, ids, 12), wanted)


# ---- errors -------------------------------------------------------------------------------------


def test_errors_come_before_the_cache_is_touched():
    model = reference()
    ck.replace(model)
    decoder = Decoder(decoder_parts(model), 2, 8)
    decoder.keys.zero_()
    cases = [
        (torch.full((2, 3), 97), r"ids must lie in \[0, 97\), got 97"),
        (torch.full((2, 3), -1), r"ids must lie in \[0, 97\), got -1"),
        (torch.zeros(2, 9, dtype=torch.long), r"the cache holds 8 tokens, got 0 and 9 new ones"),
        (torch.zeros(3, 2, dtype=torch.long), r"keys must have shape \(3, 3, 3, 8, 16\)"),
        (torch.zeros(2, 2), r"ids must be int64, got float32"),
        (torch.zeros(2, 0, dtype=torch.long), r"ids must not be empty"),
    ]
    for ids, message in cases:
        with pytest.raises(ValueError, match=message):
            decoder.step(ids)
        assert decoder.length == 0 and not decoder.keys.any()
    with pytest.raises(ValueError, match=r"padding must have shape \(2, 3\)"):
        decoder.step(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 4, dtype=torch.bool))


def test_parts_that_do_not_fit_are_named():
    model = reference()
    ck.replace(model)
    parts = decoder_parts(model)
    short = dataclasses.replace(parts, wpe=parts.wpe[:, :40])
    with pytest.raises(ValueError, match=r"wpe must have shape \(64, 48\)"):
        Decoder(short, 1, 8)
    layer = dataclasses.replace(parts.layers[0], proj=parts.layers[0].fc)
    with pytest.raises(ValueError, match=r"proj must map 48 to 48 features, got 48 to 192"):
        Decoder(dataclasses.replace(parts, layers=[layer]), 1, 8)


def test_the_tiny_model_writes_the_same_text():
    model = ck.GPT.from_pretrained(TINY, dtype=torch.float32)
    ids = torch.arange(1, 40)[None]
    wanted = ck.generate(model, ids, 100)
    with ck.replace(model):
        assert torch.equal(ck.generate(model, ids, 100), wanted)
