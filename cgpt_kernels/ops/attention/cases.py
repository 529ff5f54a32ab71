"""Named cases of attention.

Letters: B batch, H heads, Sq queries, Sk keys, D head size.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from ..case import BENCH, BOTH, Case, Random


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """bias: None, or the shape of attn_bias in letters that are dimensions or 1, e.g. "1Hqk".

    layout: "bhsd" contiguous; "bshd" views of [B, S, H, D]; "packed" views of [B, S, 3, H, D].
    """

    op: ClassVar[str] = "attention"
    B: int
    H: int
    Sq: int
    Sk: int
    D: int
    causal: bool = True
    layout: str = "bhsd"
    padding: str | None = None  # "left", "right" or "all": the second half of the batch is padding
    bias: str | None = None
    bias_kind: str = "T"  # "T", "fp32", "bool", "min" (finfo.min as Hugging Face masks)
    alibi: bool = False
    scale: float | None = None
    dropout_p: float = 0.0
    spread: float = 1.0

    def _qkv(self, draw):
        B, H, Sq, Sk, D = self.B, self.H, self.Sq, self.Sk, self.D
        if self.layout == "packed":
            qkv = draw.normal(B, Sk, 3, H, D) * self.spread
            q, k, v = qkv.unbind(2)  # [B, S, H, D] each
            return q[:, Sk - Sq :].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.layout == "bshd":
            q = draw.normal(B, Sq, H, D) * self.spread
            k, v = draw.normal(B, Sk, H, D), draw.normal(B, Sk, H, D)
            return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        q = draw.normal(B, H, Sq, D) * self.spread
        return q, draw.normal(B, H, Sk, D), draw.normal(B, H, Sk, D)

    def _bias(self, draw):
        sizes = {"B": self.B, "H": self.H, "q": self.Sq, "k": self.Sk, "1": 1}
        shape = [sizes[letter] for letter in self.bias]
        if self.bias_kind == "bool":
            return draw.chance(0.7, *shape)
        if self.bias_kind == "min":
            hidden = draw.chance(0.5, *shape)
            hidden[..., : max(1, self.Sq // 2), :] = True  # rows that see nothing but the minimum
            low = torch.finfo(draw.dtype).min
            return torch.zeros(shape, dtype=draw.dtype, device=draw.device).masked_fill(hidden, low)
        wide = torch.promote_types(draw.dtype, torch.float32)
        return draw.normal(*shape, dtype=wide if self.bias_kind == "fp32" else None)

    def inputs(self, dtype, device="cpu", seed=0):
        draw = Random(seed, dtype, device)
        q, k, v = self._qkv(draw)
        given = {"q": q, "k": k, "v": v, "causal": self.causal, "scale": self.scale}
        if self.padding is not None:
            j = torch.arange(self.Sk, device=device)
            b = torch.arange(self.B, device=device)[:, None]
            padded = 2 * b % (self.Sk + 1)  # [B, 1], 0 in the first entry
            if self.padding == "all":
                padded = torch.where(2 * b >= self.B, self.Sk, 0)
            left = self.padding == "left"
            given["key_padding_mask"] = j < padded if left else j >= self.Sk - padded
        if self.bias is not None:
            given["attn_bias"] = self._bias(draw)
        if self.alibi:
            slopes = 2.0 ** (-8.0 * torch.arange(1, self.H + 1) / self.H)
            given["alibi_slopes"] = slopes.to(device)
        if self.dropout_p:
            given.update(dropout_p=self.dropout_p, seed=0x1234_5678_9ABC)
        return given

    def torch_call(self, inputs, wrap=lambda f: f):
        """scaled_dot_product_attention; its mask is made beforehand, which is its best case."""
        if self.bias is not None or self.alibi:
            raise ValueError(f"attention case {self.name}: no single torch call does this")
        mask, causal = None, self.causal and self.Sq == self.Sk
        if self.causal and self.Sq not in (1, self.Sk):
            mask = torch.ones(self.Sq, self.Sk, dtype=torch.bool).tril(self.Sk - self.Sq)
        if self.padding is not None:
            real = ~inputs["key_padding_mask"][:, None, None, :]
            mask, causal = (real if mask is None else mask & real), False
        options = {"is_causal": causal, "scale": self.scale, "dropout_p": self.dropout_p}
        attend = wrap(
            lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
        )
        args = inputs["q"], inputs["k"], inputs["v"], mask
        return lambda: attend(*args)

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of one head, padding aside."""
        if not self.causal:
            return self.Sq * self.Sk
        shift = self.Sk - self.Sq
        return sum(min(max(i + shift + 1, 0), self.Sk) for i in range(self.Sq))

    @property
    def flops(self):
        return 4 * self.B * self.H * self.D * self.pairs

    def bytes(self, dtype):
        return 2 * self.B * self.H * self.D * (self.Sq + self.Sk) * dtype.itemsize


def _case(name, why, B, H, Sq, Sk, D, **options):
    return AttentionCase(name=name, why=why, B=B, H=H, Sq=Sq, Sk=Sk, D=D, **options)


_BENCH = dict(use=(BENCH,))

CASES = [
    _case("ones", "the smallest call there is", 1, 1, 1, 1, 1),
    _case("tiny", "overhead is all there is", 1, 2, 4, 4, 8, use=BOTH),
    _case("causal", "the plain GPT case, D = 64", 2, 3, 37, 37, 64),
    _case("full", "bidirectional, as BERT", 2, 2, 33, 33, 64, causal=False),
    _case("d_80", "head size of the 2.7B model", 1, 2, 19, 19, 80, layout="packed"),
    _case("d_128", "head size of the 590M, 1.3B and 6.7B models", 1, 2, 21, 21, 128, layout="bshd"),
    _case("d_7", "odd head size: vector tails in D", 1, 2, 9, 11, 7),
    _case("packed", "query, key, value as one projection leaves them", 2, 4, 24, 24, 16,
          layout="packed"),
    _case("packed_last", "the last queries of a packed projection", 2, 4, 3, 24, 16,
          layout="packed"),
    _case("decode", "one query against a KV cache", 3, 2, 1, 75, 64, layout="bshd"),
    _case("decode_padded", "one query, left-padded batch", 3, 2, 1, 40, 64, padding="left"),
    _case("decode_long", "keys cut into chunks that are joined, the last one short", 2, 1, 1, 600,
          16, layout="bshd"),
    _case("decode_long_masks", "chunks of padding only, several queries, dropout across chunks", 2,
          2, 3, 700, 8, padding="all", alibi=True, dropout_p=0.2),
    _case("chunk", "a chunk of queries against a longer cache, bottom-right causal", 1, 2, 7, 71,
          32),
    _case("more_queries", "S_q > S_k: the first rows see nothing and give 0", 2, 2, 13, 5, 16),
    _case("long_keys", "several key blocks: the running maximum is rescaled", 1, 1, 70, 300, 32),
    _case("long", "dk and dv add up over many blocks of queries", 1, 1, 1030, 1030, 16),
    _case("left_padding", "left padding under causal: whole rows masked", 4, 2, 12, 12, 16,
          padding="left"),
    _case("right_padding", "right padding, bidirectional", 4, 2, 12, 12, 16, causal=False,
          padding="right"),
    _case("all_padding", "whole batch entries are padding", 4, 2, 6, 10, 16, causal=False,
          padding="all"),
    _case("bias", "a full additive bias", 2, 3, 10, 14, 16, causal=False, bias="BHqk"),
    _case("bias_qk", "a bias shared by batch and heads: its gradient sums", 2, 3, 10, 14, 16,
          bias="qk"),
    _case("bias_b11k", "a padding mask as an additive bias", 2, 3, 10, 14, 16, causal=False,
          bias="B11k", bias_kind="fp32"),
    _case("bias_1hq1", "a bias that is constant along a row", 2, 3, 10, 14, 16, bias="1Hq1"),
    _case("bias_bool", "a bool mask as scaled_dot_product_attention takes it", 2, 3, 10, 14, 16,
          causal=False, bias="B1qk", bias_kind="bool"),
    _case("bias_min", "finfo.min as Hugging Face masks: whole rows of it stay finite", 2, 2, 9, 9,
          16, causal=False, bias="B1qk", bias_kind="min"),
    _case("alibi", "ALiBi, causal, more keys than queries", 2, 4, 11, 17, 16, alibi=True),
    _case("alibi_full", "ALiBi is symmetric without a causal mask", 1, 4, 12, 12, 16, alibi=True,
          causal=False),
    _case("mup_scale", "muP scales by 1 / D", 1, 2, 15, 15, 64, scale=1 / 64),
    _case("spread", "logits far apart: exp underflows, nothing overflows", 1, 2, 30, 30, 32,
          spread=30.0),
    _case("dropout", "the shared mask, odd row length", 2, 2, 9, 11, 16, dropout_p=0.3),
    _case("dropout_all", "dropout with every mask at once", 2, 2, 10, 15, 16, dropout_p=0.5,
          padding="left", bias="1Hqk", alibi=True, layout="packed"),
    _case("111m_512", "111M, 512-token prefill", 1, 12, 512, 512, 64, layout="packed", **_BENCH),
    _case("111m_2048", "111M, full context", 1, 12, 2048, 2048, 64, layout="packed", **_BENCH),
    _case("111m_decode", "111M, one token, 512 in the cache", 1, 12, 1, 512, 64, **_BENCH),
    _case("111m_decode_2048", "111M, one token, full cache", 1, 12, 1, 2048, 64, **_BENCH),
    _case("590m_512", "D = 128", 1, 12, 512, 512, 128, layout="packed", **_BENCH),
    _case("2b7_512", "D = 80", 1, 32, 512, 512, 80, layout="packed", **_BENCH),
    _case("111m_512_dropout", "training with dropout, unfused in torch on the CPU", 1, 12, 512, 512,
          64, layout="packed", dropout_p=0.1, **_BENCH),
    _case("bert_256", "bidirectional with right padding", 4, 12, 256, 256, 64, causal=False,
          padding="right", layout="packed", **_BENCH),
]  # fmt: skip
