"""Packed weights: `python bench/test_packed.py` prints them beside torch and the bound.

Each row is one interleaved run: ours in every format, F.linear in the dtype of x, and torch's own
dynamically quantized linear where this torch still has it. Decoding walks through copies of the
weights that no cache holds, as a model's layers do; its bound is the packed bytes at the bandwidth
that `timing.bandwidth` measures, from huge pages.
Under `pytest bench` the same candidates run one after the other.
"""

import functools
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F

from cgpt_kernels import backends, ops, timing
from cgpt_kernels.ops.gemm import pack_weight

# The products of a 111M model and its head: N, K.
SHAPES = {
    "qkv": (2304, 768),
    "proj": (768, 768),
    "fc1": (3072, 768),
    "fc2": (768, 3072),
    "head": (50257, 768),
}
FORMATS = {"f32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}
FORMATS["int4"] = torch.bfloat16
BEYOND_CACHES = 160e6  # bytes


def dynamic_int8(weight):
    """torch's int8 linear with rows quantized on the fly, or None where it is gone."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(linear))[0]
            found(torch.zeros(1, weight.shape[1]))
        except (AttributeError, RuntimeError):
            return None
    return found


def huge_page_bandwidth():
    """Bytes per second of a sum over 256 MB in huge pages."""
    ones = torch.from_dlpack(backends._C.allocate_buffer(1 << 28)).view(torch.float32).fill_(1)
    return (1 << 28) / timing.interleave({"sum": ones.sum}, seconds=0.5)["sum"].minimum


def candidates(name, M, copies):
    """{who: (call, bytes of one weight)}; each call takes the next of `copies` equal weights."""
    N, K = SHAPES[name]
    weight = torch.randn(N, K)
    found = {}

    def add(who, dtype, nbytes, make, call):
        count = max(1, int(BEYOND_CACHES / nbytes)) if copies else 1
        turn = itertools.cycle([make() for _ in range(count)])
        found[who] = (
            functools.partial(lambda c, x, t: c(x, next(t)), call, x_of[dtype], turn),
            nbytes,
        )

    x_of = {d: torch.randn(M, K).to(d) for d in (torch.float32, torch.bfloat16)}
    for format, dtype in FORMATS.items():
        first = pack_weight(weight, format)
        add(format, dtype, first.nbytes, lambda f=format: pack_weight(weight, f), ops.gemm)
    for dtype in x_of:
        who = f"linear {str(dtype).removeprefix('torch.')}"
        nbytes = weight.numel() * dtype.itemsize
        add(who, dtype, nbytes, lambda d=dtype: weight.to(d, copy=True), F.linear)
    if dynamic_int8(weight) is not None:
        make = functools.partial(dynamic_int8, weight)
        add("dynamic int8", torch.float32, weight.numel(), make, lambda x, linear: linear(x))
    return found


def show(name, M, seconds, bandwidth):
    N, K = SHAPES[name]
    few = M <= 16
    calls = candidates(name, M, copies=few)
    taken = timing.interleave({who: call for who, (call, _) in calls.items()}, seconds=seconds)
    for who, (_, nbytes) in calls.items():
        t = taken[who]
        line = (
            f"{name:<6}{M:>5}{N:>7}{K:>6}  {who:<16}{t.median * 1e6:>10.1f}{t.minimum * 1e6:>10.1f}"
        )
        if few:
            line += f"{nbytes / t.median / 1e9:>9.1f} GB/s{nbytes / bandwidth / t.median:>7.0%}"
        else:
            line += f"{2 * M * N * K / t.median / 1e9:>9.1f} GFLOP/s"
        print(line, flush=True)


@torch.no_grad()
def main(seconds=1.0):
    torch.manual_seed(0)
    print(f"{timing.machine_cpu()}, {torch.get_num_threads()} threads, {backends._C.cpu_isa()}")
    bandwidth = huge_page_bandwidth()
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s")
    print(f"{'':<6}{'M':>5}{'N':>7}{'K':>6}  {'':<16}{'median us':>10}{'minimum':>10}")
    for M, names in ((1, SHAPES), (8, SHAPES), (512, ("qkv", "fc1", "fc2"))):
        for name in names:
            show(name, M, seconds, bandwidth)


@pytest.mark.parametrize("M", [1, 8, 512])
@pytest.mark.parametrize("name", ["proj", "fc1", "fc2"])
@pytest.mark.parametrize("who", [*FORMATS, "linear float32", "linear bfloat16", "dynamic int8"])
def test_packed(benchmark, who, name, M):
    calls = candidates(name, M, copies=M <= 16)
    if who not in calls:
        pytest.skip(f"this torch has no {who}")
    benchmark.group = f"packed {name} M={M}"
    benchmark.extra_info.update(bytes=calls[who][1])
    with torch.no_grad():
        benchmark(calls[who][0])


if __name__ == "__main__":
    main()
