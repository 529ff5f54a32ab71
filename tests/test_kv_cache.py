"""The KV cache in 8 bits: how far off its rows are, what that does to logits, tokens and loss."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import cgpt_kernels as ck
from cgpt_kernels import quantize
from cgpt_kernels.assets import TINY
from cgpt_kernels.decoder import Decoder
from cgpt_kernels.replace import decoder_parts
from cgpt_kernels.train.data import read_tokenizer
from tests import small_gpt2

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def replaced(dtype=torch.float32, n_embd=48):
    """A model whose heads are no whole number of vectors long unless asked for otherwise."""
    shape = {"n_embd": n_embd, "n_layer": 2, "n_head": 2, "n_inner": 4 * n_embd}
    model = small_gpt2.reference(dataclasses.replace(small_gpt2.REFERENCE, **shape), dtype)
    ck.replace(model)
    return decoder_parts(model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_off_by_half_a_step_at_most(dtype, tier):
    parts, ids = replaced(dtype), small_gpt2.tokens(3, 20)
    plain, small = Decoder(parts, 3, 20), Decoder(parts, 3, 20, "int8")
    for part in ids.split((17, 1, 2), dim=1):
        plain.step(part), small.step(part)
    pairs = ("keys", "key_scales"), ("values", "value_scales")
    for name, scales in pairs:  # the first layer's come from the same numbers
        exact, rows = getattr(plain, name)[0].float(), getattr(small, name)[0].float()
        found = rows * getattr(small, scales)[0, ..., None]
        assert rows.abs().amax(-1).min() == 127
        assert ((found - exact).abs() <= exact.abs().amax(-1, keepdim=True) / 253.9).all()


@pytest.mark.parametrize("n_embd", [48, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_are_those_of_the_rows_as_they_are_stored(dtype, n_embd, tier):
    """A decoder that is given the int8 rows' values in its own dtype says the same."""
    parts, ids = replaced(dtype, n_embd), small_gpt2.tokens(3, 30)
    parts = dataclasses.replace(parts, layers=parts.layers[:1])
    small, plain = Decoder(parts, 3, 40, "int8"), Decoder(parts, 3, 40)
    small.step(ids[:, :29]), plain.step(ids[:, :29])
    found = small.step(ids[:, 29:]).float()
    plain.keys[:] = (small.keys * small.key_scales[..., None]).to(dtype)
    plain.values[:] = (small.values * small.value_scales[..., None]).to(dtype)
    wanted = plain.step(ids[:, 29:]).float()
    # the new token's own row is exact in `plain`, and values are rounded to its dtype
    assert (found - wanted).abs().max() <= 0.01 * wanted.abs().max()


def test_pieces_of_a_prompt_and_single_tokens_agree(tier):
    parts, ids = replaced(torch.bfloat16), small_gpt2.tokens(2, 20)
    whole = Decoder(parts, 2, 20, "int8").step(ids).float()
    for pieces in ((1, 19), (7, 6, 7), (1,) * 20):
        decoder = Decoder(parts, 2, 20, "int8")
        for part in ids.split(pieces, dim=1):
            logits = decoder.step(part).float()
        assert (logits - whole).abs().max() <= 0.03 * whole.abs().max()


def test_rows_depend_neither_on_neighbours_nor_on_threads():
    parts, ids = replaced(torch.bfloat16, 128), small_gpt2.tokens(4, 9)

    def steps(rows):
        decoder = Decoder(parts, len(rows), 9, "int8")
        return decoder.step(rows[:, :7]).clone(), decoder.step(rows[:, 7:8]).clone()

    together, before = steps(ids), torch.get_num_threads()
    for row in range(4):
        assert all(
            torch.equal(a[0], b[row]) for a, b in zip(steps(ids[row:][:1]), together, strict=True)
        )
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, steps(ids), together))
    finally:
        torch.set_num_threads(before)


def test_padding_changes_nothing_of_a_sequence(tier):
    model = small_gpt2.make()
    ck.replace(model)
    ids, mask = small_gpt2.left_padded(1, 12, padding=4)
    padded = ck.generate(model, ids, 10, attention_mask=mask, kv_cache="int8")
    assert torch.equal(padded[0, 12:], ck.generate(model, ids[:, 4:], 10, kv_cache="int8")[0, 8:])


def test_a_row_that_is_not_finite_hides_behind_its_mask():
    parts, ids = replaced(), small_gpt2.tokens(1, 12)
    padding = torch.zeros(1, 12, dtype=torch.bool)
    padding[0, 2] = True
    found = []
    for scale in (1.0, float("nan")):
        decoder = Decoder(parts, 1, 12, "int8")
        decoder.step(ids[:, :11], padding[:, :11])
        for scales in (decoder.key_scales, decoder.value_scales):
            scales[:, :, :, 2] = scale
        found.append(decoder.step(ids[:, 11:], padding).clone())
    assert torch.equal(*found) and found[0].isfinite().all()


def test_memory_is_half_of_bf16s():
    parts = decoder_parts(_tiny(torch.bfloat16))
    plain, small = Decoder(parts, 1, 256), Decoder(parts, 1, 256, "int8")
    tensors = small.keys, small.values, small.key_scales, small.value_scales
    nbytes, before = sum(t.nbytes for t in tensors), plain.keys.nbytes + plain.values.nbytes
    D = plain.keys.shape[-1]
    assert nbytes / before == (D + 4) / (2 * D) < 0.57


def test_the_tiny_models_loss_barely_moves():
    parts = decoder_parts(_tiny(torch.float32))
    ids = quantize.encode(TINY, read_tokenizer(TINY, "test"), quantize.held_out_text())
    windows = torch.as_tensor(ids[: 16 * 128].astype("int64")).view(16, 128)

    def loss(kv_cache):
        decoder, losses = Decoder(parts, 16, 128, kv_cache), []
        for at in range(127):
            logits = decoder.step(windows[:, at : at + 1])
            losses.append(F.cross_entropy(logits, windows[:, at + 1]))
        return torch.stack(losses).mean()

    plain, small = loss(None), loss("int8")
    assert plain < 6 and (small - plain).abs().expm1() < 2e-3  # of the perplexity


def _tiny(dtype):
    model = ck.GPT.from_pretrained(TINY, dtype=dtype)
    ck.replace(model)
    return model


def test_the_tiny_models_text_stays():
    model, ids = _tiny(torch.float32), torch.arange(1, 40)[None]
    assert torch.equal(ck.generate(model, ids, 60, kv_cache="int8"), ck.generate(model, ids, 60))


def test_errors_say_what_is_needed():
    model = ck.GPT.from_pretrained(TINY)
    with pytest.raises(ValueError, match=r"kv_cache must be None or 'int8', got 'int4'"):
        ck.generate(model, torch.ones(1, 1).long(), 2, kv_cache="int4")
    with pytest.raises(ValueError, match=r"needs use_cache and a wholly replaced model: call"):
        ck.generate(model, torch.ones(1, 1).long(), 2, kv_cache="int8")
    ck.replace(model)
    with pytest.raises(ValueError, match=r"needs use_cache"):
        ck.generate(model, torch.ones(1, 1).long(), 2, kv_cache="int8", use_cache=False)
