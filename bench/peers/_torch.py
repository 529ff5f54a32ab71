"""What the systems that run in PyTorch share."""

from __future__ import annotations

import inspect

import torch

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    # Quantised weights beside bf16 activations.
    "int8": torch.bfloat16,
    "int4": torch.bfloat16,
}


def reference_gpt(setup):
    """The checkpoint as `cgpt_kernels.GPT`: plain PyTorch with SDPA."""
    from cgpt_kernels import GPT

    return GPT.from_pretrained(setup.folder, dtype=DTYPES[setup.format]).eval()


def hugging_face(setup, attention: str):
    """The checkpoint as transformers' GPT2LMHeadModel."""
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(
        setup.folder, dtype=DTYPES[setup.format], attn_implementation=attention
    ).eval()


def replaced(model, setup):
    """`ck.replace` for inference in the format asked for."""
    import cgpt_kernels as ck

    more = {}
    if setup.format in ("int8", "int4"):
        more["quantize"] = setup.format
    if "keep_original" in inspect.signature(ck.replace).parameters:
        more["keep_original"] = False
    ck.replace(model, dtype=DTYPES[setup.format], **more)
    return model


class CkGenerate:
    """A session around `ck.generate`; beside quantized weights its cache is quantized too."""

    def __init__(self, model, setup):
        self.model = model
        self.kv_cache = "int8" if setup.format in ("int8", "int4") else None

    def generate(self, ids, new_tokens, stamp):
        from cgpt_kernels import generate

        prompt = torch.tensor(ids)
        options = {"kv_cache": self.kv_cache, "stream": lambda _: stamp()}
        out = generate(self.model, prompt, new_tokens, **options)
        return out[:, prompt.shape[1] :].tolist()


class HfGenerate:
    """A session around a Hugging Face model's own `generate`."""

    def __init__(self, model):
        self.model = model
        self.model.generation_config.eos_token_id = None  # no row ends early
        self.model.generation_config.pad_token_id = 0

    def generate(self, ids, new_tokens, stamp):
        prompt = torch.tensor(ids)
        out = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=_Stamps(stamp),
        )
        return out[:, prompt.shape[1] :].tolist()


class _Stamps:
    """Called as transformers calls a streamer: once with the prompt, then with each token."""

    def __init__(self, stamp):
        self.stamp, self.prompt_seen = stamp, False

    def put(self, tokens):
        if self.prompt_seen:
            self.stamp()
        self.prompt_seen = True

    def end(self):
        pass
