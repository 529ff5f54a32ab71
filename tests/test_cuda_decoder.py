"""The decoder's step on CUDA, on the host implementation and where there is a GPU on that."""

import copy
import dataclasses

import pytest
import torch

import cgpt_kernels as ck
from cgpt_kernels import backends
from cgpt_kernels.decoder import CudaDecoder
from cgpt_kernels.ops.gemm import pack_weight
from cgpt_kernels.replace import QUANTIZED, decoder_parts, packing
from tests import small_gpt2
from tests.test_decoder import CONFIG, MUP, hold_logits, reference

BUILD = "CGPT_CUDA=host python setup.py build_ext --inplace"
host = backends._CUDA_HOST or pytest.importorskip(
    "cgpt_kernels._cuda_host", reason=f"not built: {BUILD}"
)
GPU = torch.cuda.is_available() and hasattr(backends._C, "CudaDecoder")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEDS = ("0", "1", "2")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=["host", *(["cuda"] if GPU else [])])
def device(request, monkeypatch):
    """Where the models lie: on the CPU, whose tensors the host implementation takes, or a GPU."""
    if request.param == "cuda":
        yield "cuda"
        return
    monkeypatch.setattr(backends, "_CUDA_HOST", host)
    backends.implementation.cache_clear()
    yield "cpu"
    monkeypatch.undo()
    backends.implementation.cache_clear()


@pytest.fixture(params=SEEDS)
def order_of_threads(request, monkeypatch):
    monkeypatch.setenv("CGPT_CUDA_HOST_SEED", request.param)


in_every_order = pytest.mark.usefixtures("order_of_threads")


@pytest.fixture(params=["by launches", "at once"])
def at_once(request, monkeypatch):
    """Both ways that a step of one token is launched."""
    monkeypatch.setattr(CudaDecoder, "AT_ONCE", request.param == "at once")
    return request.param == "at once"


both_ways = pytest.mark.usefixtures("at_once")


def replaced(model, device, **options):
    model = model.to(device)
    ck.replace(model, backend="cuda", **options)
    assert decoder_parts(model).backend == "cuda"
    return model


def written(model, device, ids, total, padding=None, kv_cache=None):
    """A decoder of the model behind a prompt, and the logits behind that."""
    tokens = torch.full((ids.shape[0], total), -1, device=device)
    tokens[:, : ids.shape[1]] = ids.to(device)
    made = CudaDecoder(decoder_parts(model), tokens, padding, kv_cache)
    return made, made.step(ids.shape[1])


@both_ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", [CONFIG, MUP], ids=["plain", "mup"])
def test_logits_hold_the_numerics_rule(config, dtype, device):
    eager = reference(config, dtype)
    ids = small_gpt2.tokens(3, 14)
    run, logits = written(replaced(reference(config, dtype), device), device, ids[:, :10], 64)
    hold_logits(logits.cpu(), eager, ids[:, :10])
    for at in range(10, 14):
        run.tokens[:, at] = ids[:, at].to(device)  # what the step before wrote is replaced
        hold_logits(run.step().cpu(), eager, ids[:, : at + 1])


FAMILIES = {"reference": reference, "hugging face": small_gpt2.make}


@both_ways
@in_every_order
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_generate_writes_eagers_tokens(family, device):
    model = family().to(device)
    ids, mask = (t.to(device) for t in small_gpt2.left_padded(3, 12))
    ways = [{}, {"attention_mask": mask}]
    wanted = [ck.generate(model, ids, 8, **way) for way in ways]
    replaced(model, device)
    assert all(
        torch.equal(ck.generate(model, ids, 8, **way), tokens)
        for way, tokens in zip(ways, wanted, strict=True)
    )


def dequantized(model, quantize, dtype):
    """The eager model of this dtype whose projections are what `quantize` makes of the model's."""
    plain = copy.deepcopy(model)
    with ck.replace(copy.deepcopy(model), backend="cuda", quantize=quantize) as replacement:
        packed = dict(replacement.model.named_modules())
        for name, module in plain.double().named_modules():
            if getattr(packed[name], "packed_copy", None):
                weight = packed[name].packed_copy.weight.unpack(torch.float64)
                kn = packed[name].weight_layout == "kn"
                # a tied embedding keeps its own
                module.weight = torch.nn.Parameter(weight.t().contiguous() if kn else weight)
    return plain.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("quantize", QUANTIZED)
def test_quantized_logits_hold_the_rule_against_the_weights_they_stand_for(quantize, dtype, device):
    model, ids = reference(MUP, dtype), small_gpt2.tokens(3, 14)  # of 30 rows and of 3
    eager, truth = (dequantized(model, quantize, t) for t in (dtype, torch.float64))
    run, logits = written(replaced(model, device, quantize=quantize), device, ids[:, :10], 64)
    hold_logits(logits.cpu(), eager, ids[:, :10], truth=truth)
    for at in range(10, 14):
        run.tokens[:, at] = ids[:, at].to(device)
        hold_logits(run.step().cpu(), eager, ids[:, : at + 1], truth=truth)


@in_every_order
@pytest.mark.parametrize("quantize", QUANTIZED)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_generate_writes_the_tokens_of_the_dequantized_model(family, quantize, device):
    """With 16 sequences and more a step of one token writes the weights out, too."""
    model = family().half()
    ids, mask = (t.to(device) for t in small_gpt2.left_padded(17, 5))
    wanted = ck.generate(
        dequantized(model, quantize, torch.float64).to(device), ids, 3, attention_mask=mask
    )
    replaced(model, device, quantize=quantize)
    for rows in (17, 3):
        found = ck.generate(model, ids[:rows], 3, attention_mask=mask[:rows])
        assert torch.equal(found, wanted[:rows])


def test_packed_copies_are_made_once_and_follow_their_weights(device, monkeypatch):
    made = []
    pack = packing.pack_weight
    monkeypatch.setattr(packing, "pack_weight", lambda *a, **k: made.append(1) or pack(*a, **k))
    model = replaced(reference(dtype=torch.bfloat16), device, quantize="int8")
    ids = small_gpt2.tokens(2, 5).to(device)
    first = ck.generate(model, ids, 2)
    assert torch.equal(ck.generate(model, ids, 2), first)
    assert len(made) == 4 * CONFIG.n_layer + 1
    model.transformer.h[1].mlp.c_fc.weight.zero_()
    ck.generate(model, ids, 2)
    assert len(made) == 4 * CONFIG.n_layer + 2


def test_quantized_modules_and_what_keeps_no_original_compute_the_same(device):
    """The modules' own gemm, where a hook keeps the decoder away; packed copies alone."""
    model, ids = reference(dtype=torch.float16), small_gpt2.tokens(2, 5).to(device)
    replaced(model, device, quantize="int4")
    logits = model(ids)
    wanted = ck.generate(model, ids, 4)
    handle = model.transformer.h[0].register_forward_hook(lambda *_: None)
    assert decoder_parts(model) is None
    assert torch.equal(ck.generate(model, ids, 4), wanted)
    handle.remove()
    replaced(model, device, quantize="int4", keep_original=False)
    assert model.transformer.h[0].mlp.c_fc.weight.is_meta
    assert torch.equal(model(ids), logits) and torch.equal(ck.generate(model, ids, 4), wanted)
    ck.restore(model)
    assert not model.transformer.h[0].mlp.c_fc.weight.is_meta


def test_what_cannot_be_quantized_on_cuda_is_told(device):
    model = reference().to(device)
    with pytest.raises(ValueError, match=r"'int8' needs weights in bf16 or fp16 on cuda, got fl"):
        ck.replace(model, backend="cuda", quantize="int8")
    with pytest.raises(ValueError, match=r"keep_original=False needs backend 'auto' or 'cpu'"):
        ck.replace(model, backend="cuda", keep_original=False)
    tokens = torch.zeros(1, 4, dtype=torch.long, device=device)
    parts = decoder_parts(replaced(model, device))
    for format, message in (
        ("int8", "packed weights need embeddings in bf16 or fp16, got float32"),
        ("f32", "a packed weight must be int8 or int4"),
    ):
        packed = pack_weight(model.lm_head.weight.cpu(), format)
        packed.data = packed.data.to(device)
        head = dataclasses.replace(parts.head, weight=packed)
        with pytest.raises(ValueError, match=message):
            CudaDecoder(dataclasses.replace(parts, head=head), tokens)
    replaced(model, device, quantize="int8", dtype=torch.bfloat16)
    model.float()
    assert decoder_parts(model) is None
    with pytest.raises(ValueError, match="x is float32, beside a packed weight it takes bfloat16"):
        model(tokens)


@both_ways
def test_sequences_end_and_draws_are_fed_back(device):
    model = reference().to(device)
    ids = small_gpt2.tokens(2, 6).to(device)
    free = ck.generate(model, ids, 10)
    ways = [
        {"eos_token_id": int(free[0, 8])},
        {"temperature": 0.8, "seed": 3},
        {"temperature": 0.9, "seed": 3, "top_k": 5, "top_p": 0.9, "eos_token_id": int(free[1, 9])},
    ]
    wanted = [ck.generate(model, ids, 10, **way) for way in ways]
    replaced(model, device)
    for way, tokens in zip(ways, wanted, strict=True):
        assert torch.equal(ck.generate(model, ids, 10, **way), tokens)


@both_ways
def test_a_prompt_of_one_token_and_the_last_position(device):
    model = reference(dataclasses.replace(CONFIG, n_positions=16)).to(device)
    ids = small_gpt2.tokens(2, 1).to(device)
    wanted = ck.generate(model, ids, 15)
    replaced(model, device)
    assert torch.equal(ck.generate(model, ids, 15), wanted)


@both_ways
def test_rows_do_not_depend_on_their_neighbours_and_runs_repeat(device):
    model = replaced(reference(dtype=torch.bfloat16), device)
    ids = small_gpt2.tokens(3, 9)
    together, first = written(model, device, ids, 20)
    logits = [first.clone(), together.step().clone()]
    again, first = written(model, device, ids, 20)
    assert torch.equal(first, logits[0]) and torch.equal(again.step(), logits[1])
    for row in range(3):
        alone, first = written(model, device, ids[row : row + 1], 20)
        assert torch.equal(first[0], logits[0][row]) and torch.equal(
            alone.step()[0], logits[1][row]
        )
        assert torch.equal(alone.tokens[0], together.tokens[row])


@both_ways
def test_equal_logits_choose_the_first_and_nan_wins(device):
    model = replaced(reference(), device)
    model.lm_head.weight.zero_()
    run, _ = written(model, device, small_gpt2.tokens(2, 4), 10)
    assert (run.tokens[:, 4] == 0).all()
    model.lm_head.weight[41] = float("nan")
    run, _ = written(model, device, small_gpt2.tokens(2, 4), 10)
    assert (run.tokens[:, 4] == 41).all()


def test_widths_and_rows_of_any_alignment(device):
    """Odd head and MLP widths; tables whose rows are not aligned."""
    config = dataclasses.replace(CONFIG, n_embd=33, n_head=3, n_inner=47)
    model, ids = reference(config).to(device), small_gpt2.tokens(2, 11).to(device)
    wanted = ck.generate(model, ids, 6)
    replaced(model, device)
    assert torch.equal(ck.generate(model, ids, 6), wanted)


@both_ways
def test_nothing_of_memory_that_nobody_wrote_is_read(device, nan_filled_memory):
    model = replaced(reference(dtype=torch.bfloat16), device)
    ids, mask = (t.to(device) for t in small_gpt2.left_padded(2, 12))
    run, logits = written(model, device, ids, 16, padding=(mask == 0).sum(1))
    assert logits.isfinite().all()
    for _ in range(3):
        assert run.step().isfinite().all()


@both_ways
def test_a_step_allocates_nothing_and_takes_the_same_arguments(device, at_once, monkeypatch):
    """What a graph needs: its pointers and numbers are those of every later step."""
    model = replaced(reference(), device)
    run, _ = written(model, device, small_gpt2.tokens(2, 5), 16)
    calls = []

    class Spy:
        def step(self, *tensors):
            given = [t for t in tensors if t is not None]
            calls.append([(t.data_ptr(), t.shape, t.stride()) for t in given])
            real.step(*tensors)

    real, run._decoder = run._decoder, Spy()
    monkeypatch.setattr(CudaDecoder, "WORTH_CAPTURING", 1000)
    for _ in range(4):
        run.step()
    assert all(call == calls[0] for call in calls) and len(calls) == 4
    assert (run._state is not None) is at_once


# ---- keys and values in 8 bits -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_rows_are_the_cpus_and_a_prompt_sees_its_own(dtype, device):
    model, ids = replaced(reference(dtype=dtype), device), small_gpt2.tokens(3, 9).to(device)
    plain, wanted = written(model, device, ids, 12)
    small, logits = written(model, device, ids, 12, kv_cache="int8")
    assert torch.equal(logits, wanted) and torch.equal(small.tokens, plain.tokens)
    for name, scales in ("keys", "key_scales"), ("values", "value_scales"):
        exact, rows = (getattr(run, name)[:, :, :, :9].float() for run in (plain, small))
        found = rows * getattr(small, scales)[:, :, :, :9, None]
        assert (rows.abs().amax(-1) == 127).all()
        assert ((found - exact).abs() <= exact.abs().amax(-1, keepdim=True) / 253.9).all()


@in_every_order
@pytest.mark.parametrize("n_embd", [48, 136])  # heads of 16, and of 34 in rows of any alignment
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_are_those_of_the_rows_as_they_are_stored(dtype, n_embd, device):
    """A decoder that is given the int8 rows' values in its own dtype says the same; 130 keys are
    two chunks."""
    heads = 3 if n_embd == 48 else 4
    sizes = dict(n_embd=n_embd, n_head=heads, n_layer=1, n_positions=140)
    model = replaced(reference(dataclasses.replace(CONFIG, **sizes), dtype), device)
    padding = torch.tensor([0, 5], device=device)
    ids = small_gpt2.tokens(2, 129).to(device)
    small, _ = written(model, device, ids, 140, padding, kv_cache="int8")
    plain, _ = written(model, device, ids, 140, padding)
    for scales in small.key_scales, small.value_scales:
        scales[:, 1, :, :5] = float("nan")  # behind padding
    for name, scales in ("keys", small.key_scales), ("values", small.value_scales):
        getattr(plain, name)[:] = (getattr(small, name) * scales[..., None]).to(dtype)
    plain.tokens[:, 129] = small.tokens[:, 129]
    found, wanted = small.step().float(), plain.step().float()
    # the new token's own row is exact in `plain`, and values are rounded to its dtype
    assert (found - wanted).abs().max() <= 0.01 * wanted.abs().max()


def test_a_row_that_is_not_finite_is_nan_whole_and_vanishing_ones_are_zero(device):
    model = replaced(reference(), device)
    bias = model.transformer.h[0].attn.c_attn.bias
    bias[48 + 20] = float("inf")  # of keys, head 1
    model.transformer.h[0].attn.c_attn.weight[96:112] = 0  # of values, head 0
    bias[96:112] = 1e-31
    run, _ = written(model, device, small_gpt2.tokens(2, 5), 8, kv_cache="int8")
    assert run.key_scales[0, :, 1, :5].isnan().all()
    assert run.key_scales[0, :, 0, :5].isfinite().all()
    assert not run.value_scales[0, :, 0, :5].any() and not run.values[0, :, 0, :5].any()


def test_generate_writes_the_cpus_tokens_with_an_int8_cache(device):
    model, ids = reference(), small_gpt2.tokens(2, 6)
    with ck.replace(model, backend="cpu"):
        wanted = ck.generate(model, ids, 6, kv_cache="int8")
    replaced(model, device)
    assert torch.equal(ck.generate(model, ids.to(device), 6, kv_cache="int8").cpu(), wanted)


# ---- adapters -----------------------------------------------------------------------------------


def adapted(dtype=torch.float32, narrow=False, **options):
    """The small GPT-2 under LoRA of rank 4 on every projection of its blocks."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = small_gpt2.make().to(dtype)
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
        init_lora_weights=False,
        **options,
    )
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=not narrow)
    config.r = 9  # no whole number of vectors
    model.add_adapter("wide", config)
    return model.eval()


@in_every_order
def test_generate_writes_eagers_tokens_under_lora(device):
    model = adapted().to(device)
    ids, mask = (t.to(device) for t in small_gpt2.left_padded(3, 12))
    eager = copy.deepcopy(model)
    replaced(model, device)
    for names in (["default"], ["default", "wide"]):
        for m in (eager, model):
            m.base_model.set_adapter(names)
        wanted = ck.generate(eager, ids, 6, attention_mask=mask)
        assert decoder_parts(model).layers[0].fc.lora is not None
        assert torch.equal(ck.generate(model, ids, 6, attention_mask=mask), wanted)
    with model.disable_adapter(), eager.disable_adapter():
        assert torch.equal(ck.generate(model, ids, 6), ck.generate(eager, ids, 6))


@pytest.mark.parametrize("narrow", [False, True], ids=["fp32 adapters", "16-bit adapters"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_lora_logits_hold_the_numerics_rule(dtype, narrow, device):
    eager = adapted(dtype, narrow)
    run, logits = written(
        replaced(copy.deepcopy(eager), device), device, small_gpt2.tokens(2, 18), 20
    )
    ids = small_gpt2.tokens(2, 20)
    hold_logits(logits.cpu(), eager, run.tokens[:, :18].cpu())
    run.tokens[:, 18] = ids[:, 18].to(device)
    hold_logits(run.step().cpu(), eager, run.tokens[:, :19].cpu())


def test_lora_on_quantized_weights_and_what_is_more_than_lora(device):
    eager, model = adapted(torch.float16), adapted(torch.float16)
    ids = small_gpt2.tokens(2, 18).to(device)
    _, logits = written(replaced(model, device, quantize="int8"), device, ids, 20)
    wanted = eager(ids.cpu()).logits[:, -1]
    with eager.disable_adapter():
        base = eager(ids.cpu()).logits[:, -1]
    assert (logits.cpu() - wanted).std() < 0.1 * (wanted - base).std()
    dora = adapted(use_dora=True).to(device)
    wanted = ck.generate(dora, ids, 3)
    ck.replace(dora, backend="cuda")
    assert decoder_parts(dora) is None and torch.equal(ck.generate(dora, ids, 3), wanted)


WIDER = dataclasses.replace(CONFIG, n_embd=320, n_head=4, n_layer=1, n_inner=640, n_positions=80)


def continued(run):
    """A decoder that stands where `run` does."""
    made = CudaDecoder(run.parts, run.tokens.clone(), run._padding)
    for name in ("keys", "values", "_hidden", "_length"):
        getattr(made, name).copy_(getattr(run, name))
    made.length = run.length
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B", [1, 3])
def test_one_launch_computes_what_many_do_on_any_number_of_blocks(B, dtype, device, monkeypatch):
    """Several slices of K, heads that leave lanes idle, chunks of keys that one warp joins; another
    seed is another order of threads and another number of blocks."""
    model = replaced(reference(WIDER, dtype), device)
    padding = torch.tensor([0, 64, 3], device=device)[:B]
    many, _ = written(model, device, small_gpt2.tokens(B, 62), 80, padding)
    monkeypatch.setattr(CudaDecoder, "AT_ONCE", True)
    found = []
    for seed in SEEDS:
        monkeypatch.setenv("CGPT_CUDA_HOST_SEED", seed)
        once = continued(many)
        assert once._state is not None
        found.append(torch.stack([once.step().clone() for _ in range(4)]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    wanted = torch.stack([many.step().clone() for _ in range(4)])
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 0.1, torch.float16: 0.01}[dtype]
    assert (found[0].double() - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert dtype is not torch.float32 or torch.equal(once.tokens, many.tokens)


@pytest.mark.skipif(not GPU, reason="no GPU")
def test_a_graph_writes_what_launches_write(monkeypatch):
    model = replaced(reference(dtype=torch.bfloat16), "cuda")
    ids = small_gpt2.tokens(2, 6).cuda()
    graph = ck.generate(model, ids, 40)
    monkeypatch.setattr(CudaDecoder, "WORTH_CAPTURING", 1000)
    assert torch.equal(ck.generate(model, ids, 40), graph)


def test_modules_run_where_the_decoder_cannot(device):
    model = reference().to(device)
    ck.replace(model, backend="cuda")
    model.transformer.h[1].mlp.register_forward_hook(lambda *_: None)
    assert decoder_parts(model) is None
    ck.replace(half := reference(dtype=torch.float32).to(device), backend="cuda")
    half.double()
    assert decoder_parts(half) is None


@both_ways
def test_errors_name_what_does_not_fit(device):
    model = replaced(reference(), device)
    parts = decoder_parts(model)
    run, _ = written(model, device, small_gpt2.tokens(2, 5), 7)
    with pytest.raises(
        ValueError, match="S must be 1, or the first 7 tokens at most, got 2 after 5"
    ):
        run.step(2)
    run.step(), run.step()
    with pytest.raises(ValueError, match="got 1 after 7"):
        run.step()
    short = dataclasses.replace(parts, wpe=parts.wpe[:, :40])
    with pytest.raises(ValueError, match=r"wpe must have shape \(64, 48\)"):
        CudaDecoder(short, run.tokens)
    with pytest.raises(ValueError, match=r"padding must have shape \(2,\)"):
        written(model, device, small_gpt2.tokens(2, 5), 7, padding=torch.zeros(3, dtype=torch.long))
