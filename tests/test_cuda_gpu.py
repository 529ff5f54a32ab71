"""A GPU gives what the host implementation gives, on every case of the op suite: what the tests on
the host say of the CUDA sources then holds where nvcc compiled them.

`make test-gpu` runs this where there is a GPU, and some of it under compute-sanitizer: it takes the
path of every kernel, and memory as torch.empty leaves it.
"""

import contextlib

import pytest
import torch

from cgpt_kernels import backends
from cgpt_kernels.ops import registry
from cgpt_kernels.testing import FORWARD_FACTOR, GRADIENT_FACTOR, compare, run, to_fp64

BUILD = "CGPT_CUDA=host python setup.py build_ext --inplace"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = registry.cases("test")


@contextlib.contextmanager
def on_the_host(module):
    """backend="cuda" takes CPU tensors, as in a process that has CGPT_CUDA_HOST=1 set."""
    caches = backends.implementation, backends.own
    before, backends._CUDA_HOST = backends._CUDA_HOST, module
    for cache in caches:
        cache.cache_clear()
    try:
        yield
    finally:
        backends._CUDA_HOST = before
        for cache in caches:
            cache.cache_clear()


@pytest.fixture
def host():
    """The host implementation where there is a GPU to compare it with; else skips."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if not backends._C.cuda_built():
        pytest.skip("this build has no CUDA code: nvcc was not found or CGPT_CUDA=off")
    return pytest.importorskip("cgpt_kernels._cuda_host", reason=f"not built: {BUILD}")


def differences(case, dtype, host, device, backend):
    """What differs by more than the numerics rule allows an op to be from the truth."""
    function, given = registry.FUNCTIONS[case.op], case.inputs(dtype)
    truth = run(function, to_fp64(given), gradients=True, backend="eager")
    eager = run(function, given, gradients=True, backend="eager")
    with on_the_host(host):
        there = run(function, given, gradients=True, backend="cuda")
    here = run(function, case.inputs(dtype, device), gradients=True, backend=backend)
    for what, true in truth.items():
        factor = GRADIENT_FACTOR if what.startswith("grad") else FORWARD_FACTOR
        allowed = compare(what, there[what], eager[what], true, factor).allowed
        found, wanted = here[what].cpu().double(), there[what].double()
        if not torch.allclose(found, wanted, 0.0, allowed, equal_nan=True):
            yield f"{what}: by {(found - wanted).abs().max():.3e} of {allowed:.3e} allowed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.name}")
def test_a_gpu_and_the_host_implementation_agree(case, dtype, host):
    assert not list(differences(case, dtype, host, "cuda", "cuda"))


def test_a_difference_is_named(monkeypatch):
    """The comparison itself, with the CPU's kernels for a GPU's."""
    host = pytest.importorskip("cgpt_kernels._cuda_host", reason=f"not built: {BUILD}")
    case = next(case for case in CASES if (case.op, case.name) == ("gemm", "residual"))
    for dtype in DTYPES:
        assert not list(differences(case, dtype, host, "cpu", "cpu"))
    draw = type(case).inputs
    others = {"cpu": 1}  # the seed where a device is named
    monkeypatch.setattr(
        type(case), "inputs", lambda c, t, on=None: draw(c, t, seed=others.get(on, 0))
    )
    found = list(differences(case, torch.float32, host, "cpu", "cpu"))
    assert found and all(" of " in one for one in found)
