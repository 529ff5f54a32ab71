"""`cgpt-kernels tune` without a GPU: what is tried, what is kept, what is written."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="triton is not installed")

from cgpt_kernels import backends, bench, ops, tune
from cgpt_kernels.ops import registry
from cgpt_kernels.triton_substrate import launch

if launch.INTERPRETED:
    pytest.skip("the interpreter launches nothing", allow_module_level=True)


@pytest.fixture
def table():
    """The launch table, put back afterwards."""
    before = json.dumps(launch.table())
    yield launch.table()
    for cache in (launch.table, launch.auto, backends.measured):
        cache.cache_clear()
    launch.config.cache_clear()
    assert json.dumps(launch.table()) == before  # the file itself was not touched


def test_the_table_is_written_as_it_was_read():
    assert launch.as_text() == launch.TABLE_PATH.read_text()


def test_every_class_has_a_reason_and_values_for_each_capability():
    for kernel, classes in launch.table().items():
        for which, entry in classes.items():
            assert entry["why"], (kernel, which)
            for capability in launch.CAPABILITIES:
                assert entry[capability].keys() == entry["8.0"].keys(), (kernel, which)
            assert "measured" in entry, (kernel, which)


def test_the_fastest_candidate_is_kept_and_the_rest_of_the_table_stays(table, tmp_path):
    before = json.loads(json.dumps(table))
    shown = []

    def time(launches):
        assert {x.kernel.fn.__name__ for x in launches} <= {
            "layer_norm_fwd_kernel",
            "layer_norm_bwd_kernel",
            "add_shares_kernel",
        }
        return 10.0 - launches[0].options["num_warps"] - launches[0].arguments.get("BLOCK_R", 0)

    found = tune.tune(
        "layer_norm C=768", device="meta", time=time, show=shown.append, out=tmp_path / "t.json"
    )
    entry = found["layer_norm_fwd"]["C <= 1024"]
    assert entry["8.0"]["num_warps"] == 8 and entry["8.0"]["BLOCK_R"] == 8
    assert entry["measured"]["8.0"]["us"] == -6.0
    assert entry["9.0"] == before["layer_norm_fwd"]["C <= 1024"]["9.0"]
    assert found["gemm"] == before["gemm"]
    assert json.loads((tmp_path / "t.json").read_text())["kernels"] == found
    assert shown[-1] == f"written to {tmp_path / 't.json'}"


def test_the_standing_values_are_tried_first_and_classes_of_16_stay():
    standing = {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3, "CHUNK": 256}
    tried = tune.candidates(standing)
    assert tried[0] == standing and len(tried) > 10
    assert all(c["BLOCK_M"] == 16 and c["CHUNK"] == 256 for c in tried)


# ---- what auto tries first ----------------------------------------------------------------------


def call(dtype=torch.bfloat16, *shape):
    """A tensor on a GPU that is not there, as far as resolve looks at it."""
    return SimpleNamespace(
        device=torch.device("cuda", 0),
        dtype=dtype,
        shape=torch.Size(shape),
        element_size=lambda: dtype.itemsize,
    )


@pytest.fixture
def gpu(table, monkeypatch, tmp_path):
    """A GPU on which every backend runs everything; a function: tune it with made-up times."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "meta")
    monkeypatch.setattr(backends, "why_not", lambda op, backend, tensors: None)

    def measured(us, prefix="auto gemm", red=()):
        asked = []

        def measure(case, dtype, *, backend, gradients, **options):
            asked.append((case.name, gradients))
            return SimpleNamespace(
                us_median=us(backend, case, dtype),
                eager_us_median=100.0,
                red="wrong" if backend in red else None,
            )

        out = tmp_path / "t.json"
        options = {"time": None, "show": lambda line: None, "out": out, "measure": measure}
        tune.tune(prefix, device="meta", **options)
        written = json.loads(out.read_text())["auto"]
        monkeypatch.setattr(backends, "measured", functools.cache(lambda: written))
        assert out.read_text() == launch.as_text()
        return asked

    return measured


def test_where_nothing_is_measured_auto_tries_cuda_first(gpu):
    assert backends.AUTO["cuda"] == ("cuda", "triton", "eager")
    assert backends.measured() == {}
    assert backends.resolve("gemm", "auto", (call(torch.bfloat16, 4, 64),)) == "cuda"
    gpu(lambda backend, case, dtype: 50.0, "auto layer_norm")
    assert backends.resolve("gemm", "auto", (call(torch.bfloat16, 4, 64),)) == "cuda"


def test_auto_takes_the_fastest_of_a_class_of_shapes(gpu):
    def us(backend, case, dtype):
        few = case.M <= 16
        if backend == "cuda":
            return 20.0 if few else 80.0
        return 30.0 if few or dtype == torch.bfloat16 else 300.0

    asked = gpu(us)
    assert {name for name, _ in asked} > {case.name for case in registry.cases("bench", "gemm")}
    few, many = call(torch.bfloat16, 2, 8, 64), call(torch.bfloat16, 4, 1024, 64)
    assert backends.resolve("gemm", "auto", (few,)) == "cuda"
    assert backends.resolve("gemm", "auto", (many,)) == "triton"
    assert backends.resolve("gemm", "auto", (call(torch.float16, 4, 1024, 64),)) == "triton"
    assert backends.resolve("gemm", "auto", (call(torch.float32, 4, 1024, 64),)) == "cuda"
    assert backends.resolve("layer_norm", "auto", (many,)) == "cuda"  # not measured
    found = backends.measured()["meta"]["gemm"]
    assert found["16 bit, M <= 16"] == {"cuda": 0.2, "triton": 0.3, "eager": 1.0}


def test_auto_takes_eager_where_it_is_faster_and_never_what_was_not_exact(gpu):
    gpu(lambda backend, case, dtype: 150.0 if backend == "cuda" else 10.0, red=("triton",))
    assert backends.resolve("gemm", "auto", (call(torch.bfloat16, 4, 64),)) == "eager"
    assert backends.measured()["meta"]["gemm"]["16 bit, M <= 16"]["triton"] is None


def test_torch_compile_asks_the_table_too(table, monkeypatch):
    class Stop(Exception):
        pass

    def backend(graph, inputs):
        graphs.append(graph.code)
        raise Stop

    times = {"16 bit, M <= 16": {"triton": 2.0, "cuda": 2.0, "eager": 1.0}}
    monkeypatch.setattr(backends, "measured", lambda: {"H100": {"gemm": times}})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "H100")
    graphs = []
    compiled = torch.compile(ops.gemm, backend=backend, fullgraph=True)
    for rows in (8, 32):
        with FakeTensorMode(), torch.no_grad(), pytest.raises(Exception, match="Stop"):
            compiled(*(torch.empty(n, 64, device="cuda", dtype=torch.bfloat16) for n in (rows, 64)))
    few, many = graphs
    assert "linear" in few and "cgpt" not in few
    assert "triton" in many or "cgpt" in many


def test_few_rows_are_timed_without_a_backward(gpu):
    for op in ("gemm", "attention"):
        asked = dict(gpu(lambda backend, case, dtype: 50.0, f"auto {op}"))
        few = {
            c.name
            for c in registry.cases("bench", op)
            if getattr(c, "M", c.__dict__.get("Sq")) <= 16
        }
        assert few and all(gradients == (name not in few) for name, gradients in asked.items())


def test_cases_are_timed_as_the_benchmark_times_them():
    assert tune.tune.__kwdefaults__["measure"] is bench.measure


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_tune_says_so():
    with pytest.raises(ValueError, match="tune: needs an NVIDIA GPU"):
        tune.tune()
