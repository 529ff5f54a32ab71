"""Text generation: one loop for the reference GPT and for Hugging Face causal language models.

Prefill reads the prompt once and fills the KV cache; each further step feeds one token per
sequence and computes the LM head for that position only.

B sequences, S prompt tokens (padded on the left), V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from . import backends, checks, decoder
from .gpt import GPT, check_token_ids
from .replace import decoder_parts

_argmax = getattr(backends._C, "argmax", None)  # a fifth of the time that torch's takes
_ARGMAX_DTYPES = (torch.float32, torch.bfloat16)


@torch.no_grad()
def generate(
    model: nn.Module,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
    use_cache: bool = True,
    kv_cache: str | None = None,
    stream: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Continue each prompt by up to max_new_tokens tokens; returns prompts and continuations.

    model: a `GPT` or a Hugging Face causal language model, in the train or eval mode it is in.
    input_ids: int64 [B, S], S >= 1.
    temperature: 0 is greedy; otherwise the logits are divided by it and a token is drawn.
    top_k, top_p: draw from the k likeliest tokens; from the fewest that hold probability p.
    seed: of the draws; None takes torch's default generator.
    eos_token_id: ends a sequence (several: any of them); the first one then fills its row. None
        never ends one early.
    attention_mask: [B, S], 0 for padding, which must be on the left. None: no padding.
    kv_cache: "int8" keeps keys and values in 8 bits with a scale for each head and token, half of
        bf16's memory, in a wholly replaced model. None keeps them in the model's dtype.
    stream: called after each step with the new tokens, int64 [B], on the CPU.

    Returns int64 [B, S + n], n <= max_new_tokens: shorter only when every sequence has ended.
    """
    run = _adapter(model, use_cache, kv_cache)
    _check_sampling(max_new_tokens, temperature, top_k, top_p, seed, eos_token_id)
    _check_prompt(input_ids, attention_mask, max_new_tokens, run.vocab_size, run.n_positions)
    device = input_ids.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    ends = None
    if eos_token_id is not None:
        ends = torch.as_tensor(eos_token_id, device=device).reshape(-1)

    B, S = input_ids.shape
    total = S + max_new_tokens
    tokens = torch.empty(B, total, dtype=torch.long, device=device)
    tokens[:, :S] = input_ids
    mask = positions = None
    if attention_mask is not None and not attention_mask.bool().all():
        mask = torch.ones_like(tokens)
        mask[:, :S] = attention_mask.bool()
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # padding does not count
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    run.start(tokens, mask)
    for at in range(S, total):
        first = at - 1 if use_cache and at > S else 0  # cached tokens are not fed again
        logits = run.step(
            tokens[:, first:at],
            None if mask is None else mask[:, :at],
            None if positions is None else positions[:, first:at],
        )
        written = run.writes and temperature == 0
        chosen = tokens[:, at]  # B
        if not written:
            chosen = _choose(logits, temperature, top_k, top_p, generator)
        if ends is not None:
            chosen = torch.where(ended, ends[0], chosen)
            ended |= torch.isin(chosen, ends)
        if not written or ends is not None:
            tokens[:, at] = chosen
        if stream is not None:
            stream(chosen.cpu())
        if ends is not None and bool(ended.all()):
            return tokens[:, : at + 1]
    return tokens


class _ReferenceSteps:
    """Logits of the last position, step by step, from a `GPT` and its static cache.

    writes: whether a step leaves the greedy tokens behind its own in the `tokens` of `start`.
    """

    writes = False

    def __init__(self, model: nn.Module, config, use_cache: bool):
        self.model, self.use_cache = model, use_cache
        self.vocab_size, self.n_positions = config.vocab_size, config.n_positions

    def start(self, tokens: Tensor, mask: Tensor | None) -> None:
        self.cache = self.model.new_cache(*tokens.shape) if self.use_cache else None

    def step(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        logits = self.model(
            ids, attention_mask=mask, position_ids=positions, cache=self.cache, last_only=True
        )
        return logits[:, -1]  # B V


class _DecoderSteps:
    """The same from a replaced model's parts, one call of C++ a step."""

    writes = False

    def __init__(self, parts: decoder.Parts, kv_cache: str | None = None):
        self.parts, self.kv_cache = parts, kv_cache
        self.vocab_size, self.n_positions = parts.wte.shape[0], parts.wpe.shape[0]

    def start(self, tokens: Tensor, mask: Tensor | None) -> None:
        self.decoder = decoder.Decoder(self.parts, *tokens.shape, self.kv_cache)

    def step(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        return self.decoder.step(ids, None if mask is None else mask == 0, positions)  # B V


class _CudaDecoderSteps(_DecoderSteps):
    """The same on a GPU, which needs nothing of the host from one greedy token to the next."""

    writes = True

    def start(self, tokens: Tensor, mask: Tensor | None) -> None:
        padding = None if mask is None else (mask == 0).sum(1)  # B
        self.decoder = decoder.CudaDecoder(self.parts, tokens, padding, self.kv_cache)

    def step(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        return self.decoder.step(ids.shape[1])  # B V


class _HuggingFaceSteps:
    """The same from a Hugging Face causal language model and the cache it returns."""

    writes = False

    def __init__(self, model: nn.Module, use_cache: bool):
        self.model, self.use_cache = model, use_cache
        config = model.config
        self.vocab_size = config.vocab_size
        self.n_positions = getattr(config, "max_position_embeddings", None)
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT
        self.accepted = inspect.signature(inner.forward).parameters
        # transformers 5.24 gave it this name, in results too
        self.cache_name = "cache" if "cache" in self.accepted else "past_key_values"

    def start(self, tokens: Tensor, mask: Tensor | None) -> None:
        self.cache = None

    def step(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        optional = {"position_ids": positions, "logits_to_keep": 1}
        cache = {self.cache_name: self.cache}
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            **cache,
            use_cache=self.use_cache,
            **{k: v for k, v in optional.items() if k in self.accepted and v is not None},
        )
        if self.use_cache:
            self.cache = getattr(out, self.cache_name)
        return out.logits[:, -1]  # B V


def _adapter(model: nn.Module, use_cache: bool, kv_cache: str | None):
    checks.is_choice("generate", "kv_cache", kv_cache, decoder.KV_CACHES)
    parts = decoder_parts(model) if use_cache else None
    if parts is not None:
        steps = _DecoderSteps if parts.backend == "cpu" else _CudaDecoderSteps
        return steps(parts, kv_cache)
    if kv_cache is not None:
        raise ValueError(
            f"generate: kv_cache={kv_cache!r} needs use_cache and a wholly replaced model: call "
            "cgpt_kernels.replace(model), whose .table tells what is left alone"
        )
    plain = getattr(model, "_orig_mod", model)  # torch.compile wraps the module
    if isinstance(plain, GPT):
        return _ReferenceSteps(model, plain.config, use_cache)
    if getattr(getattr(plain, "active_peft_config", None), "is_prompt_learning", False):
        raise TypeError(
            "generate: model must have no virtual tokens (peft's prompt and prefix tuning), which "
            "would be put before every new token; call model.generate, which knows them"
        )
    if hasattr(plain, "can_generate") and plain.can_generate():
        if not plain.config.is_encoder_decoder:
            return _HuggingFaceSteps(model, use_cache)
    raise TypeError(
        "generate: model must be a cgpt_kernels.GPT or a Hugging Face causal language model, "
        f"got {type(plain).__name__}"
    )


def _choose(logits: Tensor, temperature: float, top_k, top_p, generator) -> Tensor:
    """One token per row of logits [B, V]."""
    if temperature == 0:
        if _argmax is None or not logits.is_cpu or logits.dtype not in _ARGMAX_DTYPES:
            return logits.float().argmax(-1)
        chosen = torch.empty(logits.shape[0], dtype=torch.int64)
        _argmax(logits if logits.stride(1) == 1 else logits.contiguous(), chosen)
        return chosen
    logits = logits.float()
    if logits.is_cpu and backends._C is not None:
        B = logits.shape[0]
        u = torch.rand(B, dtype=torch.float64, generator=generator)
        chosen = torch.empty(B, dtype=torch.int64)
        backends._C.sample(logits.contiguous(), u, chosen, temperature, top_k or 0, top_p or 1.0)
        return chosen
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        outside = p.cumsum(-1) - p >= top_p  # what stands before it already holds top_p
        logits = logits.scatter(-1, order, ordered.masked_fill(outside, -math.inf))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _check_sampling(max_new_tokens, temperature, top_k, top_p, seed, eos_token_id) -> None:
    ends = eos_token_id if isinstance(eos_token_id, Sequence) else (eos_token_id,)
    if not ends or not all(hasattr(end, "__index__") for end in ends if eos_token_id is not None):
        raise TypeError(
            f"generate: eos_token_id must be an int, several or None, got {eos_token_id!r}"
        )
    for name, value in (("max_new_tokens", max_new_tokens), ("top_k", top_k), ("seed", seed)):
        if not (hasattr(value, "__index__") or (value is None and name != "max_new_tokens")):
            raise TypeError(f"generate: {name} must be an int, got {value!r}")
    checks.is_number("generate", "temperature", temperature)
    checks.is_number("generate", "top_p", top_p, optional=True)
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"generate: temperature must be 0 (greedy) or positive, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must lie in (0, 1], got {top_p}")
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise ValueError(f"generate: seed must lie in [-2^63, 2^63), got {seed}")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError("generate: top_k and top_p need temperature > 0 (0 is greedy)")


def _check_prompt(input_ids, attention_mask, max_new_tokens, vocab_size, n_positions) -> None:
    checks.is_tensor("generate", "input_ids", input_ids, numpy=False)
    checks.is_tensor("generate", "attention_mask", attention_mask, optional=True, numpy=False)
    checks.has_dtype("generate", "input_ids", input_ids, torch.int64, torch.int32)
    checks.same_device(
        "generate", "input_ids", {"input_ids": input_ids, "attention_mask": attention_mask}
    )
    if input_ids.is_meta:
        raise ValueError("generate: input_ids must hold tokens, got a tensor on device 'meta'")
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(
            f"generate: input_ids must be [B, S], neither empty, got {tuple(input_ids.shape)}"
        )
    check_token_ids(input_ids, vocab_size)
    S = input_ids.shape[1]
    if n_positions is not None and S + max_new_tokens > n_positions:
        raise ValueError(
            f"generate: {S} prompt tokens + {max_new_tokens} new ones exceed the model's "
            f"{n_positions} positions"
        )
    if attention_mask is None:
        return
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"generate: attention_mask must have shape {tuple(input_ids.shape)}, "
            f"got {tuple(attention_mask.shape)}"
        )
    keep = attention_mask.bool()
    if not keep[:, -1].all() or (keep[:, :-1] & ~keep[:, 1:]).any():
        raise ValueError("generate: attention_mask must pad on the left (zeros, then ones)")
