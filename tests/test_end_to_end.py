"""The main job at its real size: Cerebras-GPT-111M's shape as a Hugging Face model, replaced."""

import pytest
import torch

import cgpt_kernels as ck

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def model():
    config = transformers.GPT2Config(
        n_embd=768, n_layer=10, n_head=12, n_positions=2048, activation_function="gelu"
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def prompt(model):
    # Published weights cannot be fetched in a test; random ones meet the same kernels and shapes.
    return torch.randint(model.config.vocab_size, (1, 37), generator=torch.manual_seed(1))


def test_greedy_tokens_equal_eagers(model, prompt):
    options = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    eager = model.generate(prompt, **options)
    with ck.replace(model):
        fused = model.generate(prompt, **options)
        own_loop = ck.generate(model, prompt, 64)
    assert eager.shape == (1, 37 + 64)
    assert torch.equal(fused, eager)
    assert torch.equal(own_loop, eager)


@torch.no_grad()
def test_bf16_logits_are_as_near_to_fp32_as_eagers(model, prompt):
    exact = model(prompt).logits
    half = transformers.GPT2LMHeadModel(model.config).eval()
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    eager = (half(prompt).logits - exact).abs().max()
    with ck.replace(half):
        fused = (half(prompt).logits - exact).abs().max()
    assert fused <= 2 * eager + 1e-6 * exact.abs().max()
