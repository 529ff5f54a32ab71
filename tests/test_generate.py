"""generate: greedy and sampled text from the reference GPT and from Hugging Face models."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cgpt_kernels as ck
from cgpt_kernels import _C
from cgpt_kernels.generate import _choose

CONFIG = ck.GPTConfig(vocab_size=101, n_positions=64, n_embd=48, n_layer=3, n_head=3)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = ck.GPT(CONFIG).eval()
    with torch.no_grad():  # weights far enough from 0 that greedy text is not one token repeated
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


@pytest.fixture(scope="module")
def hf(model, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder)
    return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(0, 101, (3, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def padding():
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[0, :4] = 0
    mask[2, :9] = 0
    return mask


@pytest.mark.parametrize("padded", [False, True])
def test_greedy_tokens_equal_transformers_generate(model, hf, prompt, padding, padded):
    mask = padding if padded else None
    expected = hf.generate(
        prompt,
        attention_mask=padding if padded else torch.ones_like(prompt),
        max_new_tokens=20,
        do_sample=False,
        pad_token_id=0,
    )
    assert len(expected[0, 10:].unique()) > 3
    for m in (model, hf):
        for use_cache in (True, False):
            ours = ck.generate(m, prompt, 20, attention_mask=mask, use_cache=use_cache)
            assert torch.equal(ours, expected), (type(m).__name__, use_cache)


def test_padded_prompts_continue_like_the_prompts_alone(model, prompt, padding):
    together = ck.generate(model, prompt, 20, attention_mask=padding)
    for row, n in enumerate((4, 0, 9)):
        alone = ck.generate(model, prompt[row : row + 1, n:], 20)
        assert torch.equal(together[row, 10:], alone[0, 10 - n :])


def test_same_seed_draws_the_same_tokens_on_both_kinds_of_model(model, hf, prompt):
    how = {"temperature": 0.9, "top_k": 40, "top_p": 0.95}
    first = ck.generate(model, prompt, 20, seed=3, **how)
    assert torch.equal(ck.generate(model, prompt, 20, seed=3, **how), first)
    assert torch.equal(ck.generate(hf, prompt, 20, seed=3, **how), first)
    assert not torch.equal(ck.generate(model, prompt, 20, seed=4, **how), first)


def test_without_a_seed_torch_manual_seed_governs_and_with_one_it_is_untouched(model, prompt):
    torch.manual_seed(5)
    first = ck.generate(model, prompt, 10, temperature=1.0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    ck.generate(model, prompt, 10, temperature=1.0, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(ck.generate(model, prompt, 10, temperature=1.0), first)


def test_top_k_of_one_and_small_top_p_are_greedy(model, prompt):
    greedy = ck.generate(model, prompt, 10)
    assert torch.equal(ck.generate(model, prompt, 10, temperature=1.0, top_k=1), greedy)
    assert torch.equal(ck.generate(model, prompt, 10, temperature=1.0, top_p=1e-6), greedy)


def draws(probabilities, n=4000, **how):
    logits = torch.tensor(probabilities).log().expand(n, -1)
    generator = torch.Generator().manual_seed(0)
    how = {"temperature": 1.0, "top_k": None, "top_p": None} | how
    chosen = _choose(logits, generator=generator, **how)
    return chosen.bincount(minlength=len(probabilities)) / n


def test_draws_follow_the_truncated_distributions():
    p = [0.1, 0.4, 0.2, 0.3]
    # 4000 draws: five standard deviations are at most 0.04
    assert draws(p) == pytest.approx(p, abs=0.04)
    assert draws(p, top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.04)
    assert draws(p, top_p=0.6) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.04)
    assert draws(p, top_p=1.0) == pytest.approx(p, abs=0.04)
    assert draws(p, top_k=9) == pytest.approx(p, abs=0.04)
    squared = torch.tensor(p).square()
    expected = (squared / squared.sum()).tolist()
    assert draws(p, temperature=0.5) == pytest.approx(expected, abs=0.04)
    assert draws(p, top_k=2, top_p=0.5) == pytest.approx([0, 1, 0, 0])


@pytest.mark.parametrize("kind", ["model", "hf"])
def test_sequences_end_at_eos_and_generation_stops_with_the_last(kind, request, prompt):
    m = request.getfixturevalue(kind)
    free = ck.generate(m, prompt, 20)[:, 10:]
    ends = [int(free[0, 3]), int(free[1, 7]), int(free[2, 5])]
    stopped = ck.generate(m, prompt, 20, eos_token_id=ends)[:, 10:]
    first = [next(i for i, t in enumerate(row.tolist()) if t in ends) for row in free]
    assert stopped.shape[1] == max(first) + 1 < 20
    for row, at in enumerate(first):
        assert torch.equal(stopped[row, : at + 1], free[row, : at + 1])
        assert (stopped[row, at + 1 :] == ends[0]).all()


def test_stream_receives_every_step(model, prompt):
    seen = []
    out = ck.generate(model, prompt, 6, stream=seen.append)
    assert torch.equal(torch.stack(seen, 1), out[:, 10:])


def test_generation_up_to_the_last_position(model, prompt):
    assert ck.generate(model, prompt, 54).shape == (3, 64)


def test_reduced_precision_generates_with_a_cache_of_its_dtype(model, prompt):
    half = ck.GPT(CONFIG).eval()
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    assert ck.generate(half, prompt, 5).shape == (3, 15)
    cache = half.new_cache(3)
    half(prompt, cache=cache)
    assert cache.keys[0].dtype == torch.bfloat16 and cache.keys[0].shape == (3, 3, 64, 16)


def test_no_gradients_are_recorded_and_training_still_works(model, prompt):
    assert not ck.generate(model, prompt, 2).requires_grad
    model(prompt, targets=prompt).backward()
    model.zero_grad()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 55}, "10 prompt tokens \\+ 55 new ones exceed the model's 64"),
        ({"temperature": -1.0}, "temperature must be 0 \\(greedy\\) or positive, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be at least 1, got 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must lie in \\(0, 1\\], got 0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p must lie in"),
        ({"top_k": 5}, "top_k and top_p need temperature > 0"),
        ({"input_ids": torch.zeros(3, 0, dtype=torch.long)}, "neither empty, got \\(3, 0\\)"),
        ({"input_ids": torch.zeros(4, dtype=torch.long)}, "\\[B, S\\]"),
        ({"input_ids": torch.full((1, 3), 101)}, "\\[0, 101\\) = vocab_size, got 101"),
        ({"attention_mask": torch.ones(3, 9)}, "must have shape \\(3, 10\\), got \\(3, 9\\)"),
        ({"attention_mask": torch.tensor([[1] * 9 + [0]] * 3)}, "must pad on the left"),
        ({"attention_mask": torch.tensor([[1] * 4 + [0] + [1] * 5] * 3)}, "pad on the left"),
        ({"attention_mask": torch.zeros(3, 10)}, "pad on the left"),
    ],
)
@pytest.mark.parametrize("kind", ["model", "hf"])
def test_bad_input_is_named(kind, request, prompt, change, message):
    arguments = {"input_ids": prompt, "max_new_tokens": 5} | change
    with pytest.raises(ValueError, match=message):
        ck.generate(request.getfixturevalue(kind), **arguments)


def test_other_models_are_refused(prompt):
    with pytest.raises(TypeError, match=r"must be a cgpt_kernels\.GPT .* got Linear"):
        ck.generate(torch.nn.Linear(2, 2), prompt, 5)


# ---- drawing in C++ -----------------------------------------------------------------------------


def likelihoods(logits, temperature, top_k, top_p):
    """[V] fp64: what the definition says, in plain PyTorch."""
    logits = logits.double() / temperature
    if top_k:
        logits = logits.masked_fill(
            logits < logits.topk(min(top_k, len(logits))).values[-1], float("-inf")
        )
    p = logits.softmax(0)
    order = p.argsort(descending=True, stable=True)
    before = p[order].cumsum(0) - p[order]
    p[order[before >= top_p - 1e-12]] = 0
    return p / p.sum()


@settings(deadline=None, max_examples=60)
@given(
    V=st.sampled_from([1, 2, 7, 300, 5000]),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 5, 400]),
    top_p=st.sampled_from([0.01, 0.5, 0.95, 1.0]),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_a_draw_inverts_the_distribution(V, temperature, top_k, top_p, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(V, generator=generator)
    p = likelihoods(logits, temperature, top_k, top_p)
    u = torch.rand(50, dtype=torch.float64, generator=generator)
    tokens = torch.empty(50, dtype=torch.int64)
    _C.sample(logits.expand(50, V).contiguous(), u, tokens, temperature, top_k, top_p)
    ends = p.cumsum(0)
    close = 1e-5  # fp32 logits over the temperature: the ends of a token's share may move by this
    assert (p[tokens] > 0).all()
    assert (u < ends[tokens] + close).all() and (u >= (ends - p)[tokens] - close).all()


def test_drawing_refuses_what_has_no_distribution():
    u, tokens = torch.zeros(1, dtype=torch.float64), torch.empty(1, dtype=torch.int64)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must not hold NaN or"):
            _C.sample(torch.tensor([[0.0, bad]]), u, tokens, 1.0, 0, 1.0)
    with pytest.raises(ValueError, match="one must be finite"):
        _C.sample(torch.full((1, 3), -float("inf")), u, tokens, 1.0, 0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [1, 7, 16, 1001])  # below, at and beside the width of a vector
def test_the_greedy_token_is_the_first_largest(V, dtype):
    torch.manual_seed(0)
    logits = torch.randn(6, V).to(dtype)
    logits[1] = logits[1].round()  # ties
    logits[2] = -logits[2].abs() - 1
    logits[3, V // 2], logits[3, V - 1] = -math.nan, math.inf
    logits[4] = -0.0
    logits[4, V // 3 :] = 0.0
    logits[5] = -math.inf
    assert torch.equal(_choose(logits, 0.0, None, None, None), logits.float().argmax(-1))
