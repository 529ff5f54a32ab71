"""The reference GPT: GPT-2's architecture in plain PyTorch, with nanoGPT's module names.

Pre-LN blocks, learned positions, biases everywhere but in the LM head, the head tied to the token
embedding, dropout off by default (Cerebras-GPT trains without). Every module is a standard torch
module, so this file is what `replace` swaps kernels into and what the result is compared with.

B batch, S new tokens, T all tokens (cached + new), C n_embd, H n_head, D = C / H, V vocab_size.

Sources: GPT-2 (Radford et al. 2019); Cerebras-GPT (arXiv 2304.03208), whose muP variants are
published with model_type "btlm" and the mup_* fields used here.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoint, checks

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}

# Other names that transformers has for these functions.
_SAME_ACTIVATION = {
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
}

# name: (n_layer, n_embd, n_head); the feed-forward width is 4 * n_embd in all of them.
_CEREBRAS_GPT = {
    "cerebras-gpt-111m": (10, 768, 12),
    "cerebras-gpt-256m": (14, 1088, 17),
    "cerebras-gpt-590m": (18, 1536, 12),
    "cerebras-gpt-1.3b": (24, 2048, 16),
    "cerebras-gpt-2.7b": (32, 2560, 32),
    "cerebras-gpt-6.7b": (32, 4096, 32),
    "cerebras-gpt-13b": (40, 5120, 40),
}
_MUP_LARGEST_WIDTH = 2560  # muP variants were trained from 111M to 2.7B only
_MUP_BASE_WIDTH = 256  # width of the proxy model whose hyperparameters muP transfers
_GPT2 = {
    "gpt2": (12, 768, 12),
    "gpt2-medium": (24, 1024, 16),
    "gpt2-large": (36, 1280, 20),
    "gpt2-xl": (48, 1600, 25),
}


_PROBABILITIES = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
_SCALES = ("mup_embeddings_scale", "mup_width_scale", "mup_output_alpha")


@dataclass(frozen=True)
class GPTConfig:
    """Shape and scalings of a GPT; the fields are named as in Hugging Face's config.json.

    activation_function: "gelu" (erf), "gelu_new" (tanh) or "relu".
    initializer_range: standard deviation of the embeddings' init; hidden matrices use
        initializer_range * sqrt(mup_width_scale), output projections that / sqrt(2 * n_layer).
    mup_embeddings_scale multiplies token + position embeddings; mup_width_scale (256 / n_embd)
    times mup_output_alpha multiplies the logits; mup_scale_qk_dot_by_d divides attention logits by
    D instead of sqrt(D). The defaults are the standard parametrisation.
    embd_pdrop, attn_pdrop, resid_pdrop: probabilities of dropout in training, of the embeddings,
    the attention weights and what c_proj adds to the residual stream.
    """

    vocab_size: int = 50257
    n_positions: int = 2048
    n_embd: int = 768
    n_layer: int = 10
    n_head: int = 12
    n_inner: int | None = None  # None: 4 * n_embd
    activation_function: str = "gelu"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    mup_embeddings_scale: float = 1.0
    mup_width_scale: float = 1.0
    mup_output_alpha: float = 1.0
    mup_scale_qk_dot_by_d: bool = False
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    resid_pdrop: float = 0.0

    def __post_init__(self):
        if self.n_inner is None:
            object.__setattr__(self, "n_inner", 4 * self.n_embd)
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"GPTConfig: {name} must be a positive integer, got {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"GPTConfig: n_embd must be a multiple of n_head, got n_embd {self.n_embd} "
                f"and n_head {self.n_head}"
            )
        for name, fits, wanted in (
            *((n, lambda p: 0 <= p < 1, "in [0, 1)") for n in _PROBABILITIES),
            ("layer_norm_epsilon", lambda e: e > 0, "a positive number"),
            ("initializer_range", lambda s: s >= 0, "a number of at least 0"),
            *((n, lambda s: s > 0, "a positive number") for n in _SCALES),
        ):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not fits(value) or value == math.inf:
                raise ValueError(f"GPTConfig: {name} must be {wanted}, got {value!r}")
        if not isinstance(self.mup_scale_qk_dot_by_d, bool):
            raise ValueError(
                "GPTConfig: mup_scale_qk_dot_by_d must be True or False, got "
                f"{self.mup_scale_qk_dot_by_d!r}"
            )
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(
                f"GPTConfig: activation_function must be one of {', '.join(ACTIVATIONS)}, "
                f"got {self.activation_function!r}"
            )

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def attention_scale(self) -> float:
        return 1 / self.head_dim if self.mup_scale_qk_dot_by_d else self.head_dim**-0.5

    @property
    def logits_scale(self) -> float:
        return self.mup_width_scale * self.mup_output_alpha

    @property
    def is_mup(self) -> bool:
        """Whether any scaling differs from plain GPT-2's (then transformers cannot run it)."""
        return self.mup_scale_qk_dot_by_d or (
            self.mup_embeddings_scale,
            self.mup_width_scale,
            self.mup_output_alpha,
        ) != (1.0, 1.0, 1.0)

    @staticmethod
    def names() -> list[str]:
        """The preset names that `from_name` knows."""
        mup = [f"{n}-mup" for n, shape in _CEREBRAS_GPT.items() if shape[1] <= _MUP_LARGEST_WIDTH]
        return [*_CEREBRAS_GPT, *mup, *_GPT2]

    @classmethod
    def from_name(cls, name: str) -> GPTConfig:
        """A published configuration, e.g. "cerebras-gpt-111m", "cerebras-gpt-111m-mup", "gpt2"."""
        key = str(name).lower()
        if key not in cls.names():
            raise ValueError(f"GPTConfig: unknown name {name!r}. Known: {', '.join(cls.names())}")
        end_of_text = {"bos_token_id": 50256, "eos_token_id": 50256}
        if key in _GPT2:
            layers, width, heads = _GPT2[key]
            return cls(50257, 1024, width, layers, heads, None, "gelu_new", **end_of_text)
        layers, width, heads = _CEREBRAS_GPT[key.removesuffix("-mup")]
        config = cls(50257, 2048, width, layers, heads, **end_of_text)
        if not key.endswith("-mup"):
            return config
        return dataclasses.replace(
            config,
            initializer_range=0.08,
            mup_embeddings_scale=10.0,
            mup_width_scale=_MUP_BASE_WIDTH / width,
            mup_scale_qk_dot_by_d=True,
        )

    @classmethod
    def from_dict(cls, d: dict, *, where: str = "config.json") -> GPTConfig:
        """From the contents of a Hugging Face config.json; refuses what this GPT cannot compute."""
        kind = d.get("model_type")
        if kind not in ("gpt2", "btlm"):
            raise ValueError(f"{where}: model_type must be 'gpt2' (or muP's 'btlm'), got {kind!r}")
        only = {  # fields with one supported value, which is also the default where they are absent
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
            "tie_word_embeddings": True,
            "position_embedding_type": "learned",
        }
        for key, supported in only.items():
            if d.get(key, supported) not in (supported, _REFUSED_BY_TRANSFORMERS):
                raise ValueError(f"{where}: {key} must be {supported!r}, got {d[key]!r}")
        known = {f.name for f in dataclasses.fields(cls)}
        # Defaults of transformers' GPT2Config, for files that leave fields out.
        base = {"n_positions": 1024, "n_layer": 12, "activation_function": "gelu_new"}
        if kind == "gpt2":
            base |= {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1}
        fields = base | {k: v for k, v in d.items() if k in known}
        act = fields["activation_function"]
        fields["activation_function"] = _SAME_ACTIVATION.get(act, act)
        try:
            return cls(**fields)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def to_dict(self) -> dict:
        """The contents of config.json: GPT-2's, or for muP one that transformers refuses."""
        fields = dataclasses.asdict(self)
        head = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
        if self.is_mup:
            head = {
                "model_type": "btlm",
                "architectures": ["BTLMLMHeadModel"],
                "position_embedding_type": "learned",
                "scale_attn_weights": _REFUSED_BY_TRANSFORMERS,
            }
        else:
            fields = {k: v for k, v in fields.items() if not k.startswith("mup_")}
        return head | fields | {"tie_word_embeddings": True}


# Stands where GPT2Config demands a bool: GPT2LMHeadModel.from_pretrained would only warn about the
# model_type of a muP checkpoint and then compute other logits.
_REFUSED_BY_TRANSFORMERS = "see mup_scale_qk_dot_by_d"


class KVCache:
    """Keys and values of all layers, [B, H, capacity, D] each, of which `length` are filled.

    GPT.forward appends its tokens and advances `length`. A layer's memory is taken once, at its
    first token, in the dtype and on the device of its keys.
    """

    def __init__(self, n_layer: int, batch: int, capacity: int):
        self.keys: list[Tensor | None] = [None] * n_layer
        self.values: list[Tensor | None] = [None] * n_layer
        self.batch, self.capacity, self.length = batch, capacity, 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, H, S, D] after the cached ones; returns views [B, H, length + S, D]."""
        if self.keys[layer] is None:
            B, H, _, D = k.shape
            self.keys[layer] = k.new_empty(B, H, self.capacity, D)
            self.values[layer] = v.new_empty(B, H, self.capacity, D)
        end = self.length + k.shape[2]
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


def drop(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout in training; x itself where nothing is dropped, which F.dropout would copy."""
    return F.dropout(x, p) if training and p else x


class CausalSelfAttention(nn.Module):
    """Multi-head attention over cached and new tokens; c_attn holds q, k and v side by side."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head = config.n_head
        self.scale = config.attention_scale
        self.attn_pdrop, self.resid_pdrop = config.attn_pdrop, config.resid_pdrop
        self.layer = layer

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        """x [B, S, C] -> [B, S, C]; mask bool [B or 1, 1, S, T] True keeps, None: causal."""
        B, S, C = x.shape
        q, k, v = self.c_attn(x).view(B, S, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # B H S D
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        # SDPA aligns is_causal top-left, which is right only without cached tokens; `GPT` passes a
        # mask wherever that differs, and one new token sees everything. A branch, since SDPA takes
        # no symbolic flag when S is dynamic in a compiled graph.
        causal = False
        if mask is None and S > 1:
            causal = True
        p = self.attn_pdrop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, p, causal, scale=self.scale)
        y = self.c_proj(y.transpose(1, 2).reshape(B, S, C))
        return drop(y, self.resid_pdrop, self.training)


class MLP(nn.Module):
    """x [B, S, C] -> c_proj(activation(c_fc(x))) [B, S, C]."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd)
        self.activation = config.activation_function
        self.resid_pdrop = config.resid_pdrop

    def forward(self, x: Tensor) -> Tensor:
        y = self.c_proj(ACTIVATIONS[self.activation](self.c_fc(x)))
        return drop(y, self.resid_pdrop, self.training)


class Block(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The language model. `GPT(config)` has random weights; see `from_pretrained` for others."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        if not isinstance(config, GPTConfig):
            raise TypeError(
                f"GPT: config must be a GPTConfig, got {type(config).__name__}; "
                "GPTConfig.from_name makes a published one, GPT.from_pretrained reads a folder"
            )
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.n_positions, config.n_embd),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self):
        std = self.config.initializer_range
        hidden = std * self.config.mup_width_scale**0.5
        for name, p in self.named_parameters():
            if name.endswith(("wte.weight", "wpe.weight")):
                nn.init.normal_(p, std=std)
            elif name.endswith("c_proj.weight"):  # 2 * n_layer of them add to the residual stream
                nn.init.normal_(p, std=hidden / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=hidden)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def new_cache(self, batch: int, capacity: int | None = None) -> KVCache:
        """An empty KV cache for `batch` sequences of up to `capacity` tokens (n_positions)."""
        return KVCache(self.config.n_layer, batch, capacity or self.config.n_positions)

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """What the LM head reads: the last layer norm's output times logits_scale, [B, S, C].

        rows: wte(input_ids) where the caller has looked them up.
        """
        self._check_inputs(input_ids, attention_mask, position_ids, cache)
        past = 0 if cache is None else cache.length
        S = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(past, past + S, device=input_ids.device)
        if rows is None:
            rows = self.transformer.wte(input_ids)
        x = rows + self.transformer.wpe(position_ids)  # B S C
        if self.config.mup_embeddings_scale != 1.0:
            x = x * self.config.mup_embeddings_scale
        x = drop(x, self.config.embd_pdrop, self.training)
        mask = _attention_mask(attention_mask, S, past, input_ids.device)
        for block in self.transformer.h:
            x = block(x, mask, cache)
        if cache is not None:
            cache.length += S
        x = self.transformer.ln_f(x)
        return x if self.config.logits_scale == 1.0 else x * self.config.logits_scale

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        targets: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits [B, S, V] (last_only: [B, 1, V]), or with targets their mean loss.

        input_ids: int64 [B, S].
        attention_mask: [B, T], 1 keeps a token, 0 hides it (padding); T counts cached tokens too.
        position_ids: int64 [B, S] or [S]; default: counted from the cache's length, so sequences
            padded on the left need their own.
        cache: from `new_cache`; the tokens are appended to it.
        targets: int64 [B, S], targets[b, s] follows input_ids[b, s]; -100 is left out. The result
            is then the mean cross-entropy in nats, fp32.
        """
        if targets is not None:  # before anything is computed
            self._check_inputs(input_ids, attention_mask, position_ids, cache, targets)
        x = self.hidden_states(input_ids, attention_mask, position_ids, cache)
        if targets is not None:
            return self.loss(x, targets)
        return self.lm_head(x[:, -1:] if last_only else x)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats, fp32. x: what `hidden_states` gives, [B, S, C]; targets as in
        forward."""
        logits = self.lm_head(x).float()
        try:
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        except IndexError:  # torch has looked at them already, and names neither argument nor range
            V = self.config.vocab_size
            bad = targets[((targets < 0) & (targets != -100)) | (targets >= V)]
            raise ValueError(
                f"GPT: targets must lie in [0, {V}) = vocab_size or be -100, got {int(bad[0])}"
            ) from None

    def _check_inputs(self, input_ids, attention_mask, position_ids, cache, targets=None):
        past = 0 if cache is None else cache.length
        checks.is_tensor("GPT", "input_ids", input_ids, numpy=False)
        checks.is_tensor("GPT", "attention_mask", attention_mask, optional=True, numpy=False)
        checks.has_dtype("GPT", "input_ids", input_ids, torch.int64, torch.int32)
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(
                f"GPT: input_ids must be [B, S] with S >= 1, got {tuple(input_ids.shape)}"
            )
        B, S = input_ids.shape
        if past + S > self.config.n_positions:
            raise ValueError(
                f"GPT: {past + S} tokens exceed n_positions = {self.config.n_positions}"
            )
        if cache is not None and (cache.batch != B or past + S > cache.capacity):
            raise ValueError(
                f"GPT: cache holds {cache.batch} x {cache.capacity} tokens, got {B} x {past + S}"
            )
        if attention_mask is not None and attention_mask.shape != (B, past + S):
            raise ValueError(
                f"GPT: attention_mask must have shape {(B, past + S)} = (B, T), "
                f"got {tuple(attention_mask.shape)}"
            )
        # Reading them back would stall a GPU's stream and break a compiled graph.
        readable = input_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if readable:
            check_token_ids(input_ids, self.config.vocab_size)
        if targets is not None:
            checks.is_tensor("GPT", "targets", targets, numpy=False)
            checks.has_dtype("GPT", "targets", targets, torch.int64)
            checks.has_shape("GPT", "targets", targets, (B, S), "(B, S)")
        if position_ids is None:
            return
        checks.is_tensor("GPT", "position_ids", position_ids, numpy=False)
        checks.has_dtype("GPT", "position_ids", position_ids, torch.int64, torch.int32)
        checks.broadcasts_to("GPT", "position_ids", position_ids, (B, S), "(B, S)")
        if readable and position_ids.is_cpu and position_ids.numel():
            low, high = (int(end) for end in torch.aminmax(position_ids))
            if low < 0 or high >= self.config.n_positions:
                raise ValueError(
                    f"GPT: position_ids must lie in [0, {self.config.n_positions}) = n_positions, "
                    f"got {low if low < 0 else high}"
                )

    def optimizer_groups(self, lr: float, weight_decay: float = 0.1) -> list[dict]:
        """Parameter groups for AdamW: matrices decay, vectors do not; muP hidden lr x 256 / C."""
        groups = {}
        for name, p in self.named_parameters():
            embedding = name.endswith(("wte.weight", "wpe.weight"))
            hidden = p.dim() == 2 and not embedding
            key = (
                lr * (self.config.mup_width_scale if hidden else 1.0),
                weight_decay if p.dim() == 2 else 0.0,
            )
            groups.setdefault(key, []).append(p)
        return [{"params": p, "lr": k[0], "weight_decay": k[1]} for k, p in groups.items()]

    @torch.no_grad()
    def fold_mup(self) -> GPT:
        """A plain GPT-2 with the same logits: the muP scalings multiplied into a copy's weights.

        The head is tied to wte, so what wte gains, ln_f gives back. Computed in fp32 (or wider) and
        rounded once to the weights' dtype.
        """
        c = self.config
        plain = dataclasses.replace(
            c,
            mup_embeddings_scale=1.0,
            mup_width_scale=1.0,
            mup_output_alpha=1.0,
            mup_scale_qk_dot_by_d=False,
        )
        q_scale = c.attention_scale / plain.attention_scale
        weights = {}
        for name, p in self.named_parameters():  # the tied head once, as wte
            wide = p.to(torch.promote_types(p.dtype, torch.float32), copy=True)
            if name.endswith(("wte.weight", "wpe.weight")):
                wide *= c.mup_embeddings_scale
            elif ".ln_f." in name:
                wide *= c.logits_scale / c.mup_embeddings_scale
            elif ".c_attn." in name:
                wide[: c.n_embd] *= q_scale
            weights[name] = wide.to(p.dtype)
        return _assemble(plain, weights).train(self.training)

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Write config.json and model.safetensors, each replaced atomically.

        A plain model loads in transformers' GPT2LMHeadModel. A muP model (`config.is_mup`) is saved
        exactly, but as model_type "btlm", which transformers refuses rather than computing other
        logits; `fold_mup()` first makes it a plain one.
        """
        weights = self.state_dict()
        del weights["lm_head.weight"]  # tied: stored once, as wte
        dtype = str(self.transformer.wte.weight.dtype).removeprefix("torch.")
        checkpoint.write(path, self.config.to_dict() | {"dtype": dtype}, weights)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> GPT:
        """Load a Hugging Face GPT-2 folder in eval mode: config.json, safetensors or an older
        pytorch_model.bin, sharded or not.

        dtype: None keeps what is stored; where that is of several dtypes, config.json's, or the
            narrowest that holds them all.
        Raises ValueError naming the file and the field or tensor.
        """
        fields, where = checkpoint.read_config(path)
        if "quantization_config" in fields:
            raise ValueError(
                f"{where}: quantization_config: these weights are quantized; "
                "cgpt_kernels.quantize.load reads what this project quantized"
            )
        config = GPTConfig.from_dict(fields, where=where)
        with torch.device("meta"):
            expected = {name: tuple(p.shape) for name, p in cls(config).state_dict().items()}
        return _assemble(config, checkpoint.read_weights(path, expected, dtype, device)).eval()


def check_token_ids(input_ids: Tensor, vocab_size: int) -> None:
    """ValueError naming the first id outside [0, vocab_size)."""
    bad = input_ids[(input_ids < 0) | (input_ids >= vocab_size)]
    if bad.numel():
        raise ValueError(
            f"GPT: input_ids must lie in [0, {vocab_size}) = vocab_size, got {int(bad[0])}"
        )


def _attention_mask(attention_mask, S: int, past: int, device) -> Tensor | None:
    """Bool [B or 1, 1, S, T], True keeps; None where SDPA's own causal flag says the same."""
    if attention_mask is None and (past == 0 or S == 1):
        return None
    q = torch.arange(past, past + S, device=device)[:, None]  # S 1
    k = torch.arange(past + S, device=device)  # T
    mask = (k <= q)[None, None]  # 1 1 S T
    return mask if attention_mask is None else mask & attention_mask.bool()[:, None, None, :]


def _assemble(config: GPTConfig, weights: dict[str, Tensor]) -> GPT:
    """A GPT that owns the given tensors (by state_dict name), head tied."""
    with torch.device("meta"):  # no second copy of the weights, no time spent on random ones
        model = GPT(config)
    model.load_state_dict(
        weights | {"lm_head.weight": weights["transformer.wte.weight"]}, assign=True
    )
    model.lm_head.weight = model.transformer.wte.weight
    return model
