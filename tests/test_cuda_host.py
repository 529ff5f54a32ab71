"""The CUDA substrate on the host: what its instructions give, and what misuse it reports.

The kernels are those of csrc/cuda/substrate_test.cu, compiled by g++ as every CUDA source is for
the op suite (`CGPT_CUDA_HOST=1 pytest -k cuda tests/test_ops.py`).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cgpt_kernels.ops import philox

ROOT = Path(__file__).resolve().parent.parent
BUILD = "CGPT_CUDA=host python setup.py build_ext --inplace"
host = pytest.importorskip("cgpt_kernels._cuda_host", reason=f"not built: {BUILD}")

THREADS = 128
SEEDS = ("0", "1", "2")


@pytest.fixture(params=SEEDS)
def order_of_threads(request, monkeypatch):
    monkeypatch.setenv("CGPT_CUDA_HOST_SEED", request.param)


in_every_order = pytest.mark.usefixtures("order_of_threads")


@in_every_order
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_and_ldmatrix_multiply(dtype):
    a = torch.randint(-8, 9, (16, 16)).to(dtype)
    b = torch.randint(-8, 9, (16, 8)).to(dtype)
    out = torch.full((2, 16, 8), float("nan"))
    host.substrate_test("mma", a, b, out)
    assert torch.equal(out, (a.float() @ b.float()).expand(2, 16, 8))


@in_every_order
def test_warp_collectives_and_block_sums():
    x, out = torch.randn(THREADS), torch.full((6, THREADS), float("nan"))
    host.substrate_test("warp", x, None, out)
    lanes, warps = torch.arange(32), x.view(4, 32)
    assert torch.equal(out[0].view(4, 32), warps[:, lanes ^ 5])
    down = torch.where(lanes + 3 < 32, lanes + 3, lanes)
    assert torch.equal(out[1].view(4, 32), warps[:, down])
    up = torch.where(lanes >= 2, lanes - 2, lanes)
    assert torch.equal(out[2].view(4, 32), warps[:, up] + warps.flip(1))
    assert torch.equal(out[3], (x > 0).float())
    torch.testing.assert_close(out[4], x.sum().expand(THREADS))
    assert torch.equal(out[5], x.max().expand(THREADS))


def grid(name, blocks=3):
    x = torch.cat([torch.randn(THREADS), torch.zeros(2)])
    out = torch.full((2, blocks, THREADS), float("nan"))
    host.substrate_test(name, x, None, out)
    return x[:THREADS], out[1]


@in_every_order
def test_blocks_of_a_cooperative_launch_meet():
    x, out = grid("grid")
    block = torch.arange(3.0)[:, None]
    wrote = x + block  # [block, thread]
    after = wrote.roll(-1, 0) + wrote[:, torch.arange(THREADS) ^ 1]
    assert torch.equal(out, after.roll(-1, 0))


@in_every_order
@pytest.mark.parametrize(
    "name, blocks, message",
    [
        ("grid_missed", 3, "grid_barrier, which all blocks must reach, but another block has fini"),
        ("grid_not_cooperative", 3, "grid_barrier needs a cooperative launch"),
        ("grid", 9, "at most . blocks run side by side, got 9"),
    ],
)
def test_misuse_of_the_grids_barrier_is_reported(name, blocks, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        grid(name, blocks)
    grid("grid")


def test_philox_is_the_shared_one():
    out = torch.empty(4 * THREADS)
    host.substrate_test("philox", None, None, out)
    zero, blocks = torch.zeros(THREADS, dtype=torch.int64), torch.arange(THREADS)
    key = torch.tensor(7), torch.tensor(1 << 8)
    words = philox.philox_4x32((blocks, zero, zero, zero), key)
    assert torch.equal(out.view(THREADS, 4), (torch.stack(words, 1) >> 8).float())


RACE = r"thread \d+: race: (reads|writes) shared memory at byte \d+, which thread \d+ "
BARRIER = "waits at block_barrier, which all threads must reach, but thread"
UNDER_WAY = r"reads shared memory at byte \d+ while a copy_async into it by thread \d+ is under way"
MISUSES = {
    "race_between_warps": RACE + "(wrote|read) with no barrier in between",
    "race_within_a_warp": RACE,
    "race_write_after_read": RACE,
    "missed_barrier": f"thread 0: {BARRIER} 77 waits at warp_barrier",
    "early_return": f"thread 0: {BARRIER} 5 has finished",
    "divergent_shuffle": "waits at shuffle_xor, which all 32 lanes must reach, but thread 9 has",
    "different_collectives": r"is at (ballot|shuffle_xor) while other lanes of its warp wait at",
    "shared_out_of_bounds": r"thread 127: reads 4 bytes at byte \d+ of shared memory, which has",
    "copy_not_waited_for": UNDER_WAY,
    "copy_read_by_another": f"{RACE}|{UNDER_WAY}",
    "barrier_nobody_completes": "thread 9: waits at barrier_wait for what nobody brings",
    "unaligned": r"thread \d+: an access of 16 bytes is not aligned",
}


@in_every_order
@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_reported_with_block_and_thread(name):
    x, out = torch.randn(THREADS + 4), torch.empty(THREADS)
    message = r"substrate_test: block \(\d, 0, 0\), .*(" + MISUSES[name] + ")"
    with pytest.raises(RuntimeError, match=message):
        host.substrate_test(name, x, None, out)


@in_every_order
def test_a_launch_after_a_misuse_is_as_good_as_new():
    x, out = torch.randn(THREADS), torch.empty(THREADS)
    for name in ("copy_not_waited_for", "missed_barrier", "divergent_shuffle"):
        with pytest.raises(RuntimeError):
            host.substrate_test(name, x, None, out)
        host.substrate_test("none", x, None, out)
        assert torch.equal(out, x.roll(-1))


WIDTHS = {"a row in a warp": 1000, "a row in a block": 3001, "a row in no registers": 8300}


def layer_norm_gradients(x, dy, weight, mean, rstd):
    (rows, C), made = x.shape, [torch.full_like(t, float("nan")) for t in (x, weight, weight)]
    shares = torch.full((2, host.layer_norm_bwd_shares_cuda(rows), C), float("nan"))
    host.layer_norm_bwd_cuda(dy, None, x, weight, mean, rstd, *made, shares)
    return made


@in_every_order
@pytest.mark.parametrize("C", WIDTHS.values(), ids=WIDTHS)
def test_layer_norm_of_every_class_of_widths(C):
    x, dy = torch.randn(19, C), torch.randn(19, C)
    weight, bias = torch.randn(C), torch.randn(C)
    y, mean, rstd = torch.empty_like(x), torch.empty(19), torch.empty(19)
    host.layer_norm_fwd_cuda(x, None, weight, bias, y, None, mean, rstd, 1e-5)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    truth = torch.nn.functional.layer_norm(leaves[0], (C,), *leaves[1:])
    torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-5)
    found = layer_norm_gradients(x, dy, weight, mean, rstd)
    for grad, true in zip(found, torch.autograd.grad(truth, leaves, dy.double()), strict=True):
        torch.testing.assert_close(grad.double(), true, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("C", WIDTHS.values(), ids=WIDTHS)
def test_the_order_of_threads_changes_no_bit(C, monkeypatch):
    x, dy = torch.randn(70, C), torch.randn(70, C)
    weight, mean, rstd = torch.randn(C), x.mean(1), 1 / x.std(1)
    monkeypatch.setenv("CGPT_CUDA_HOST_SEED", SEEDS[0])
    wanted = layer_norm_gradients(x, dy, weight, mean, rstd)
    for seed in SEEDS[1:]:
        monkeypatch.setenv("CGPT_CUDA_HOST_SEED", seed)
        found = layer_norm_gradients(x, dy, weight, mean, rstd)
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def run(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_only_the_environment_variable_brings_the_host_implementation_in():
    code = """
import torch, cgpt_kernels as ck
x, w = torch.randn(2, 8), torch.ones(8)
print(ck.explain("layer_norm", x, w, None).backend)
try: ck.ops.layer_norm(x, w, backend="cuda"); print("ran")
except ValueError as e: print(e)
"""
    auto, asked = run(code, CGPT_CUDA_HOST="").stdout.splitlines()
    assert auto == "cpu"
    assert asked.startswith("layer_norm: backend 'cuda' cannot run: ")
    auto, asked = run(code, CGPT_CUDA_HOST="1").stdout.splitlines()
    assert (auto, asked) == ("cpu", "ran")


@pytest.mark.skipif(
    not list(ROOT.glob("cgpt_kernels/_cuda_host_asan.*")),
    reason=f"not built: {BUILD.replace('host', 'host_asan')}",
)
def test_address_sanitizer_finds_an_access_beyond_a_tensor():
    code = """
import torch
from cgpt_kernels import _cuda_host_asan as host
out = torch.empty(128)
host.substrate_test("none", torch.randn(128), None, out)
print("fine so far", flush=True)
host.substrate_test("global_out_of_bounds", torch.randn(128), None, out)
"""
    # libstdc++ too: the sanitizer looks for its exceptions when it starts.
    ask = ["g++", "-print-file-name=libasan.so", "-print-file-name=libstdc++.so"]
    libraries = [
        subprocess.run([ask[0], what], check=True, capture_output=True, text=True).stdout.strip()
        for what in ask[1:]
    ]
    done = run(code, LD_PRELOAD=" ".join(libraries), ASAN_OPTIONS="detect_leaks=0")
    assert "fine so far" in done.stdout, done.stderr[-4000:]
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr and "wrong_kernel" in done.stderr
