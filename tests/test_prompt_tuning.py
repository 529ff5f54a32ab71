"""peft's prompt, prefix and p-tuning on a replaced model: the same numbers as on eager."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")
import peft
from small_gpt2 import close, left_padded, logits, make, tokens

import cgpt_kernels as ck
from cgpt_kernels.replace import decoder_parts
from cgpt_kernels.testing import FORWARD_FACTOR, SLACK

CONFIGS = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "projected prefix": lambda: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=24
    ),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=24
    ),
}
kinds = pytest.mark.parametrize("kind", CONFIGS)


def tuned(kind, model, dtype=torch.float32):
    torch.manual_seed(3)
    return peft.get_peft_model(model, CONFIGS[kind]()).to(dtype).eval()


def pair(kind, order="replace last", dtype=torch.float32):
    eager = tuned(kind, make(resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0), dtype)
    if order == "replace last":
        model = copy.deepcopy(eager)
        ck.replace(model)
        return eager, model
    model = make(resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)
    ck.replace(model)
    return eager, tuned(kind, model, dtype)


@kinds
@pytest.mark.parametrize("order", ["replace last", "replace first"])
def test_logits_and_gradients_are_eagers(kind, order):
    eager, model = pair(kind, order)
    ids, mask = left_padded(3, 12)
    plain = logits(make(), ids, attention_mask=mask)
    expected = logits(eager, ids, attention_mask=mask)
    assert not torch.allclose(expected[:, -12:], plain), "the virtual tokens change nothing"
    close(logits(model, ids, attention_mask=mask), expected)

    grads = []
    for m in (eager, model):
        m.train()
        labels = ids.masked_fill(mask == 0, -100)
        m(ids, attention_mask=mask, labels=labels).loss.backward()
        grads.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert grads[0] and grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        close(grads[1][name], grad, 1e-4)


@kinds
def test_bf16_holds_the_numerics_rule(kind):
    eager, model = pair(kind, dtype=torch.bfloat16)
    exact = logits(copy.deepcopy(eager).double(), tokens())
    plain, found = (logits(m, tokens()).double() for m in (eager, model))
    allowed = FORWARD_FACTOR * (plain - exact).abs().max() + SLACK * exact.abs().max()
    assert (found - exact).abs().max() <= allowed


@kinds
def test_generation_is_eagers(kind):
    eager, model = pair(kind)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ids, mask = left_padded(2, 9)
    wanted = eager.generate(input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **options), wanted)
    assert decoder_parts(model) is None, "the decoder knows no virtual tokens"


@kinds
def test_ck_generate_names_what_writes_behind_virtual_tokens(kind):
    for model in pair(kind):
        with pytest.raises(TypeError, match=r"virtual tokens .* call model.generate"):
            ck.generate(model, tokens(), 8)
