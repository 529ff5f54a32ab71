"""What one block of a transformer costs on a grid of cores, and the embedding and head around them.

Letters: d, s, f are the widths of model, context and feed-forward per core (divided by a side of
the grid, rounded up). All arithmetic is fp16 with one word for two values. In decode a block is
vectors times matrices: local products, then an all-reduce along one axis (the phase engine runs
them). In prefill tokens lie over the rows of cores and widths over the columns: MeshGEMMs and
softmax rows. A backward is made of the two products that each product asks for.
"""

from __future__ import annotations

from dataclasses import dataclass

from .phases import Phase, allreduce, cycles, local
from .spec import WaferSpec
from .strips import product
from .tiles import product_cycles
from .transposed import Form, shares

LONGEST = 4096  # words of one collective: a core holds them, and gives half of its memory at most


@dataclass(frozen=True)
class Block:
    """The shape of a decoder and its blocks; a GPTConfig is taken as it is.

    n_kv: width of keys (and of values) in heads that share them, default n_embd. gated: two
    projections up, one multiplied with the activation of the other (SwiGLU). rms: RMSNorm, without
    mean. vocab_size 0: no output head.
    """

    n_embd: int
    n_inner: int
    n_layer: int = 1
    n_kv: int | None = None
    gated: bool = False
    rms: bool = False
    vocab_size: int = 0

    @property
    def kv(self) -> int:
        return self.n_kv or self.n_embd

    @property
    def matrix_elements(self) -> int:
        """Weights of one block."""
        up = 2 if self.gated else 1
        return self.n_embd * (2 * self.n_embd + 2 * self.kv + (up + 1) * self.n_inner)


# As WaferLLM ran them: keys and values of full width. The models themselves have n_kv=1024.
LLAMA3_8B = Block(4096, 14336, 32, gated=True, rms=True, vocab_size=128256)
QWEN2_72B = Block(8192, 29568, 80, gated=True, rms=True, vocab_size=152064)


def block_of(config) -> Block:
    """Block of a GPTConfig or anything with its fields; a Block as it is."""
    if isinstance(config, Block):
        return config
    missing = [n for n in ("n_embd", "n_inner", "n_layer", "vocab_size") if not hasattr(config, n)]
    if missing:
        raise TypeError(
            f"estimate: config must be a GPTConfig or a wafer Block, got "
            f"{type(config).__name__} without {', '.join(missing)}"
        )
    return Block(config.n_embd, config.n_inner, config.n_layer, vocab_size=config.vocab_size)


def share(n: int, P: int) -> int:
    """Of n things over P cores, rounded up."""
    return -(-n // P)


def halves(n: int) -> int:
    """Words of n fp16 values."""
    return -(-n // 2)


def all_reduces(spec: WaferSpec, name: str, axis: str, words: int) -> tuple[Phase, ...]:
    """An all-reduce, in parts where a core cannot hold it in one; each call of a library of
    collectives costs its software besides what moves."""
    parts = share(words, LONGEST)
    call = local("call of collectives", spec.collective_call)
    return (call, allreduce(name, axis, share(words, parts))) * parts


def decode_phases(
    spec: WaferSpec, b: Block, rows: int, columns: int, context: int, batch: int
) -> tuple:
    """One token through one block on rows x columns cores; collectives as in WaferLLM's decode.

    Vectors lie along y before the first product of a pair and along x after it, so that no
    transposition is needed; `batch` requests share what weights are read, not the cycles.
    """
    d, dx = share(b.n_embd, rows), share(b.n_embd, columns)
    kv, s, f = share(b.kv, columns), share(context, columns), share(b.n_inner, columns)
    up = 2 if b.gated else 1

    def product(k, n):
        return batch * product_cycles(spec, 1, k, n, 2)

    def step(*ops):
        return batch * sum(spec.vector_cycles(name, n) for name, n in ops)

    def reduce(name, axis, n):
        return all_reduces(spec, f"{name}: all-reduce", axis, halves(n) * batch)

    def scalar(functions):
        return batch * functions * spec.scalar_function

    norm = (("fmulh", d), ("faddh", d), ("fmulh", d), ("fmulh", d))
    rstd = scalar(3)  # divide by the width, root, divide
    moments = 1 if b.rms else 2
    return (
        local("norms", step(*norm) + rstd),
        *reduce("norms", "y", moments),
        local("q, k, v", product(d, dx + 2 * kv)),
        *reduce("q, k, v", "y", dx + 2 * kv),
        local("rotation and cache", step(*[("fmulh", d)] * 4, *[("faddh", d)] * 2, ("fmovh", d))),
        local("scores", product(d, s)),
        *reduce("scores", "x", s),
        local("softmax", step(("fmulh", s), ("fmaxh", s))),
        *reduce("softmax", "y", 1),
        local("softmax", step(("faddh", s), ("faddh", s)) + scalar(s)),
        *reduce("softmax", "y", 1),
        local("softmax", step(("fmulh", s)) + scalar(1)),
        local("attention output", product(s, d)),
        *reduce("attention output", "y", d),
        local("projection", product(d, dx)),
        *reduce("projection", "x", dx),
        local("norms", step(("faddh", d), *norm) + rstd),
        *reduce("norms", "y", moments),
        local("feed-forward up", product(d, up * f)),
        *reduce("feed-forward up", "y", up * f),
        local("activation", step(("fmulh", f)) + scalar(2 * f)),  # x / (1 + exp(-x)), elementwise
        local("feed-forward down", product(f, d)),
        *reduce("feed-forward down", "x", d),
        local("norms", step(("faddh", d))),
    )


Product = tuple[str, int, int, int, bool]  # name, M, K, N; turned: A B^T with B as it lies


def block_products(b: Block, tokens: int, context: int) -> tuple[Product, ...]:
    """One block's matrix products for so many tokens, each attending to `context` keys."""
    d, f = b.n_embd, b.n_inner
    return (
        ("q, k, v", tokens, d, d, False),
        ("q, k, v", tokens, d, b.kv, False),
        ("q, k, v", tokens, d, b.kv, False),
        ("scores", tokens, d, context, True),
        ("attention output", tokens, context, d, False),
        ("projection", tokens, d, d, False),
        ("feed-forward up", tokens, d, f, False),
        *([("feed-forward up", tokens, d, f, False)] if b.gated else []),
        ("feed-forward down", tokens, f, d, False),
    )


def turned_cycles(spec: WaferSpec, form: Form) -> tuple[int, int]:
    """Cycles of a product with a transposed operand, and of them compute: transposed.py's layout,
    but partial sums go in chains to the core whose turn it is, as in the published program.

    The chains of one step follow those before like a pipeline: what counts is what a core does,
    words in and out, and the two places from one step's root to the next one's.
    """
    t = form.tiles
    compute = form.line * product_cycles(spec, t.m, t.k, t.n, t.itemsize)
    places = 2 * t.c + 2 * (spec.hop + 2 * spec.ramp + spec.stop) if form.line > 1 else 0
    moves = t.b if form.ring > 1 else 0
    return compute + form.line * (moves + places + spec.product_step), compute


def softmax_cycles(spec: WaferSpec, length: int, count: int, loop: int, itemsize: int = 2) -> int:
    """Of `count` vectors of logits: scaled, their maximum, subtracted, exponentials in scalar code,
    summed, divided. loop: cycles around each vector instruction."""
    kind = "h" if itemsize == 2 else "s"
    names = [f"f{name}{kind}" for name in ("mul", "mul", "max", "add", "add")]
    vectors = sum(spec.vector_cycles(name, length) + loop for name in names)
    quotients = length if count > 1 else 1  # one per query: vectors run down the rows, or along one
    return count * vectors + (length * count + quotients) * spec.scalar_function


def gemm_cycles(spec: WaferSpec, rows: int, columns: int, M: int, K: int, N: int, turned: bool):
    """Cycles of a product of fp16 matrices on rows x columns cores, and the bytes per core of the
    tiles that are on their way.

    Where the tiles do not fit, the longer of M and N is cut into halves, one after the other.
    """
    passes = 1
    while True:
        tiles = shares(M, K, N, rows, columns, 2)
        form = Form.of(tiles, rows, columns)
        words = form.words if turned else tiles.memory("mesh", rows, columns)
        if 4 * words <= spec.data_bytes or tiles.m == tiles.k == tiles.n == 1:
            break
        if max(tiles.m, tiles.n) == 1:
            K = share(K, 2)
        else:
            M, N = (M, share(N, 2)) if N >= M else (share(M, 2), N)
        passes *= 2
    if turned:
        total, moving = turned_cycles(spec, form)[0], form.tiles.b + form.tiles.c
    else:
        total, moving = product(spec, rows, columns, "mesh", tiles)[0], tiles.a + tiles.b
    return passes * total, 4 * moving


def alignment_cycles(spec: WaferSpec, rows: int, columns: int, M: int, K: int) -> int:
    """Cycles until each row of A [M, K] lies as MeshGEMM's first step wants it: half a ring."""
    L = max(rows, columns)
    words = halves(share(M, rows) * share(K, L))
    flight = spec.async_start + spec.hop + 2 * spec.ramp + spec.stop
    return L // 2 * (spec.product_step + flight + words)


class Matrices:
    """Products on rows x columns cores, added up by name; `moving` is the most bytes of tiles on
    their way. A product's A is aligned where it is not the one before's."""

    def __init__(self, spec: WaferSpec, rows: int, columns: int):
        self.spec, self.grid = spec, (rows, columns)
        self.phases: dict[str, float] = {}
        self.moving, self.aligned = 0, None

    def add(self, name: str, cycles: float) -> None:
        self.phases[name] = self.phases.get(name, 0.0) + cycles

    def forward(self, made: Product, density: float = 1.0, *, swapped: bool = False) -> None:
        """density: of the weights, whose zeros are skipped. swapped: along the other axes."""
        name, M, K, N, turned = made
        grid = self.grid[::-1] if swapped else self.grid
        found, moving = gemm_cycles(self.spec, *grid, M, K, N, turned)
        self.add(name, found * density)
        self.moving = max(self.moving, moving)
        if not turned and self.aligned != (name, M, K):
            self.add("alignment", alignment_cycles(self.spec, *grid, M, K))
            self.aligned = (name, M, K)

    def backward(self, made: Product, density: float = 1.0) -> None:
        """dA and dB of C = A B (dC B^T, A^T dC), or of C = A B^T (dC B, dC^T A).

        Sums over M run along the columns of cores: the turned product along the other axes.
        """
        name, M, K, N, turned = made
        self.forward((name, M, N, K, not turned), density)
        made = (name, K, M, N, True) if turned else (name, N, M, K, True)
        self.forward(made, density, swapped=True)


def block_phases(
    spec: WaferSpec,
    b: Block,
    rows: int,
    columns: int,
    tokens: int,
    context: int,
    density: float = 1.0,
    train: bool = False,
) -> tuple[dict[str, float], int]:
    """Cycles by name of one block for `tokens` tokens, and bytes per core of tiles on their way.

    train: and backward, which makes the scores again from q, k and the rows' sums, and passes over
    what is elementwise twice more.
    """
    matrices = Matrices(spec, rows, columns)
    for made in block_products(b, tokens, context):
        weights = made[0] not in ("scores", "attention output")
        matrices.forward(made, density if weights else 1.0)
        if train:
            matrices.backward(made, density if weights else 1.0)
            if made[0] == "scores":
                matrices.forward(made)
    held = share(tokens, rows)
    d, s, f = (share(n, columns) for n in (b.n_embd, context, b.n_inner))

    def calls(*ops):  # vectors over a core's rows, as the matrices lie
        return sum(n * (spec.vector_cycles(name, held) + spec.loop_tuned) for name, n in ops)

    norm = calls(("fmulh", 3 * d), ("faddh", d)) + 3 * held * spec.scalar_function
    softmax = softmax_cycles(spec, held, s, spec.loop_tuned)
    moves = (
        *all_reduces(spec, "norms", "x", halves(2 * held)) * 2,
        *all_reduces(spec, "softmax", "x", halves(held)) * 2,
    )
    _, moved = cycles(spec, 1, columns, moves)
    elementwise = {
        "norms": 2 * norm + calls(("faddh", 2 * d)) + moved["norms"],
        "rotation": calls(("fmulh", 4 * d), ("faddh", 2 * d)),
        "softmax": softmax + moved["softmax"],
        "activation": calls(("fmulh", f)) + 2 * held * f * spec.scalar_function,
        "call of collectives": moved["call of collectives"],
    }
    for name, found in elementwise.items():
        matrices.add(name, (3 if train else 1) * found)
    return matrices.phases, matrices.moving


def end_phases(
    spec: WaferSpec, b: Block, rows: int, columns: int, requests: int, groups: int | None = None
) -> dict[str, float]:
    """Embedding and head of one token each of `requests` requests; none without a vocabulary.

    The head's matrix, which is the embedding's, has its width over the rows of cores and its tokens
    over the columns: one core of a row holds a token's share, and sends it along the row.
    """
    if not b.vocab_size:
        return {}
    d, v = share(b.n_embd, rows), share(b.vocab_size, columns)
    moves = all_reduces(spec, "head", "y", halves(v) * requests)
    head = requests * product_cycles(spec, 1, d, v, 2)
    head += len(moves) // 2 * cycles(spec, rows, columns, moves[:2], groups)[0]  # parts are alike
    flood = halves(d) * requests + columns * spec.hop + 2 * spec.ramp
    return {"embedding": spec.collective_call + flood, "output head": head}


def read_phases(
    spec: WaferSpec, b: Block, rows: int, columns: int, tokens: int, density: float, train: bool
) -> dict[str, float]:
    """Embedding of all tokens; in training the head for each, its loss, and both backwards."""
    if not b.vocab_size:
        return {}
    # a token's share of a column of cores comes down that column, one after the other
    embedding = tokens * halves(share(b.n_embd, columns)) + rows * spec.hop + 2 * spec.ramp
    matrices = Matrices(spec, rows, columns)
    matrices.add("embedding", (2 if train else 1) * (embedding + spec.collective_call))
    if train:
        made = ("output head", tokens, b.n_embd, b.vocab_size, False)
        matrices.forward(made, density)
        matrices.backward(made, density)
        exponentials = share(tokens, rows) * share(b.vocab_size, columns)
        matrices.add("output head", exponentials * spec.scalar_function)
    return matrices.phases


def macs_per_token(b: Block, context: int, density: float = 1.0) -> float:
    """Multiply-adds of all blocks for one token: nonzero weights, attention to `context` keys."""
    return b.n_layer * (density * b.matrix_elements + 2 * context * b.n_embd)
