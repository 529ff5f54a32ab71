"""The lean launch of Triton kernels launches what Triton would, for less; on a GPU that is fake."""

import shutil
import time

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from cgpt_kernels import tune  # noqa: E402
from cgpt_kernels.ops.attention import attention_triton  # noqa: E402
from cgpt_kernels.ops.layer_norm import layer_norm_triton  # noqa: E402
from cgpt_kernels.triton_substrate import launch  # noqa: E402

if launch.INTERPRETED:
    pytest.skip("the interpreter launches nothing", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("a GPU is there, which no fake can replace", allow_module_level=True)
if shutil.which("gcc") is None:
    pytest.skip("needs gcc for the fake driver", allow_module_level=True)

from tests.fake_gpu import fake_gpu  # noqa: E402


@pytest.fixture(scope="module")
def gpu():
    with fake_gpu() as gpu:
        yield gpu


@pytest.fixture(autouse=True)
def nothing_launched(gpu, monkeypatch):
    monkeypatch.setattr(launch, "_compiled", {})
    gpu.stream = 0
    gpu.launches()


def layer_norm(x, y=None, w=None):
    y, w = torch.empty_like(x) if y is None else y, torch.ones(x.shape[1]) if w is None else w
    layer_norm_triton.layer_norm_fwd(x, None, w, None, y, None, None, None, 1e-5)


# Calls that the budget compiles too: Triton keeps what it compiled.
CALLS = (
    "layer_norm C=128",
    "gemm 512x768x3072",
    "attention D=64 dropout",
    "attention D=64 bias",
    "attention D=64 decode",
    "cross_entropy 512x768x50257",
)


@pytest.mark.parametrize("name", CALLS)
def test_it_launches_what_triton_would(name, gpu, monkeypatch):
    def launched():
        tune.CALLS[name]()
        # where memory lies is another matter from call to call
        return [{k: v for k, v in one.items() if k != "pointer"} for one in gpu.launches()]

    tune.CALLS[name]()  # compiles
    gpu.launches()
    lean = launched()
    assert len(launch._compiled) <= len(lean) and lean
    monkeypatch.setattr(launch, "_LEAN", False)
    assert lean == launched()


def test_tensors_are_passed_by_where_they_lie(gpu):
    x = torch.randn(4, 64)
    for _ in range(2):
        layer_norm(x)
    assert {one["pointer"] for one in gpu.launches()} == {x.data_ptr()}


def test_it_runs_on_the_current_stream(gpu):
    x = torch.randn(4, 64)
    for gpu.stream in (0, 0, 77, 5):
        layer_norm(x)
    assert [one["stream"] for one in gpu.launches()] == [0, 0, 77, 5]


def test_what_triton_specialises_on_gets_code_of_its_own(gpu, monkeypatch):
    """A size of 1, one divisible by 16, an address that is not, a dtype: as Triton tells them
    apart, whatever was launched before."""
    memory = torch.randn(16 * 64 + 8)
    aligned = memory[: 16 * 64].view(16, 64)
    calls = (
        aligned,
        aligned[:1],
        aligned[:5],
        aligned[:, :40],
        memory[1 : 1 + 16 * 64].view(16, 64),
        aligned.bfloat16(),
    )
    functions = []
    for lean in (True, True, False):
        monkeypatch.setattr(launch, "_LEAN", lean)
        for x in calls:
            layer_norm(x, torch.empty(x.shape, dtype=x.dtype))
        functions.append([one["function"] for one in gpu.launches()])
    assert functions[0] == functions[1] == functions[2]
    assert len(set(functions[0])) == len(calls)


def test_a_seed_is_no_reason_to_look_again(gpu):
    q = torch.randn(1, 1, 32, 64, dtype=torch.bfloat16)
    for seed in (3, 5, 2**40):
        given = q, q, q, None, None, None, torch.empty_like(q), None, 0.125, True, 0.5, seed
        attention_triton.attention_fwd(*given)
    assert len(launch._compiled) == 1
    assert len({one["function"] for one in gpu.launches()}) == 1


def test_shapes_that_never_come_back_are_forgotten(monkeypatch):
    monkeypatch.setattr(launch, "_MOST", 4)
    for rows in range(16, 16 * 10, 16):
        layer_norm(torch.randn(rows, 64))
        assert len(launch._compiled) <= 4


def test_hooks_of_a_profiler_are_called(gpu):
    x, heard = torch.randn(4, 64), []
    layer_norm(x)
    hooks = triton.knobs.runtime.launch_enter_hook
    hook = lambda metadata: heard.append(metadata.get()["name"])  # noqa: E731
    hooks.add(hook)
    try:
        layer_norm(x)
    finally:
        hooks.remove(hook)
    layer_norm(x)
    assert heard == ["layer_norm_fwd_kernel"]
    assert len(gpu.launches()) == 3


def test_it_takes_less_of_the_host(monkeypatch):
    q = torch.randn(1, 2, 32, 64, dtype=torch.bfloat16)
    given = q, q, q, None, None, None, torch.empty_like(q), None, 0.125, True, 0.0, 0
    taken = {True: [], False: []}
    for _ in range(200):
        for lean, times in taken.items():
            monkeypatch.setattr(launch, "_LEAN", lean)
            start = time.perf_counter()
            attention_triton.attention_fwd(*given)
            times.append(time.perf_counter() - start)
    assert min(taken[True]) < 0.7 * min(taken[False])
