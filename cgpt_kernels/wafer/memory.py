"""What a core holds of a model, in bytes: what fits and what does not is part of an estimate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .blocks import Block, share
from .spec import WaferSpec

# Bytes per weight: fp16; in training also its gradient, and an fp32 copy with both moments of Adam.
WEIGHT, TRAINED = 2, 16


@dataclass(frozen=True)
class Held:
    """One core of a rectangle. Matrices have the model's width over the rows of cores, and what
    comes of it over the columns; shares are rounded up, as cycles are counted for them."""

    b: Block
    rows: int
    columns: int

    @property
    def d(self) -> int:
        return share(self.b.n_embd, self.rows)

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Of the model, of keys, of the feed-forward, and of what goes up into it."""
        b = self.b
        dx, kv, f = (share(n, self.columns) for n in (b.n_embd, b.kv, b.n_inner))
        return dx, kv, f, (2 if b.gated else 1) * f

    def weights(self, layers: int, head: bool) -> int:
        """Their number: of so many blocks, and of embedding and head, which share theirs."""
        dx, kv, f, up = self.widths
        block = 2 * dx + 2 * kv + up + f
        return self.d * (layers * block + head * share(self.b.vocab_size, self.columns))

    def token(self, layers: int) -> int:
        """Of a token in its row of cores: keys and values of `layers` blocks, and a logit before
        and after its exponential, of one block at a time."""
        return 2 * (layers * 2 * self.widths[1] + 2)

    def decode(self, weights: int, cached: int, head: bool, context: int, batch: int) -> int:
        """Weights of blocks, the keys and values that are cached, and vectors of each request."""
        dx, kv, _, up = self.widths
        vectors = 2 * (3 * self.d + max(dx + 2 * kv, up))
        cache = share(context, self.rows) * self.token(cached)
        return WEIGHT * self.weights(weights, head) + batch * (cache + vectors)

    def kept(self, tokens: int) -> int:
        """Activations of one block that a backward reads: what enters norms and products, q, k, v,
        and both sides of the activation. Probabilities are made again."""
        dx, kv, f, up = self.widths
        return 2 * share(tokens, self.rows) * (6 * dx + 2 * kv + up + f)

    def entering(self, tokens: int) -> int:
        """What enters a block."""
        return 2 * share(tokens, self.rows) * self.widths[0]

    def widest(self, tokens: int, context: int) -> int:
        """The most that is alive at once while tokens pass through a block, one head at a time."""
        dx, kv, _, up = self.widths
        attention = 2 * dx + 2 * kv + max(dx, share(context, self.columns))
        return 2 * share(tokens, self.rows) * max(attention, 2 * dx + up)


@dataclass(frozen=True)
class Need:
    """Bytes on the fullest core: in all, of these code and stack, and kept for a backward."""

    total: int
    fixed: int
    kept: int = 0

    def advice(self, spec, cores: int, mode: str, parallel: str, recompute: bool) -> str:
        """What would help where it does not fit."""
        limit = spec.sram_bytes - spec.sram_reserved
        times = math.ceil((self.total - self.fixed) / (limit - self.fixed))
        others = [f"{times} times the cores would hold it"]
        if times * cores > spec.rows * spec.columns:
            others[0] += ", more than the wafer has"
        if parallel != "streaming":
            others.append("or parallel='streaming'")
        if mode == "train" and not recompute:
            others.append("or recompute=True")
        if parallel == "streaming" or mode == "train":
            others.append("or a smaller batch or context")
        return f"does not fit: a core needs {self.total:,} B, has {limit:,} B; {', '.join(others)}"


def need_of(
    spec: WaferSpec,
    b: Block,
    place,
    *,
    mode: str,
    parallel: str,
    batch: int,
    context: int,
    tokens: int,
    micro: int,
    moving: int,
    recompute: bool,
) -> Need:
    """Of a core of the place; in a pipeline of its stages, or of embedding and head.

    tokens: of one of `micro` micro-batches. moving: bytes of a product's tiles on their way.
    """
    fixed, kept = spec.decoder_code_bytes + spec.stack_bytes, 0
    core, end = Held(b, *place.sides), Held(b, *place.ends)
    own = share(context, place.parts)  # keys and values of a group's own part
    stages = parallel == "pipeline"
    layers = 1 if stages else b.n_layer
    weights = 0 if parallel == "streaming" else layers
    head = bool(b.vocab_size) and parallel not in ("pipeline", "streaming")
    if mode == "decode":
        need = core.decode(weights, layers, head, own, batch)
        last = WEIGHT * end.weights(0, True) + 2 * tokens * end.d
    else:
        per_weight = TRAINED if mode == "train" else WEIGHT
        need = per_weight * core.weights(weights, head)
        working = core.widest(tokens, own) + moving
        if mode == "train":
            # 1F1B: the first stage has as many micro-batches under way as there are stages
            flying = min(micro, b.n_layer + bool(b.vocab_size)) if stages else 1
            kept = flying * layers * core.kept(tokens)
            if recompute:
                kept = flying * layers * core.entering(tokens) + core.kept(tokens)
            need += kept + 2 * working  # and their gradients
        else:
            cache = share(own, core.rows) * batch * layers * 4 * core.widths[1]
            need += cache + working
        last = per_weight * end.weights(0, True) + 2 * end.entering(tokens)
    return Need(fixed + max(need, last if stages else 0), fixed, kept)
