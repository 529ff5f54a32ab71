"""torch.compile sees the Triton kernels: what its graphs hold, and what Inductor makes of them.

No GPU: kernels are compiled for compute capability 9.0 through a driver that knows nothing but its
target. Tensors lie on the CPU, where autograd runs; Inductor's code is made for fake CUDA tensors.
"""

import collections
import functools
import re
import types

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from functorch.compile import default_partition  # noqa: E402
from torch._dynamo import device_interface  # noqa: E402
from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from torch._higher_order_ops import triton_kernel_wrap  # noqa: E402
from torch._inductor import scheduler  # noqa: E402
from torch._inductor.compile_fx import compile_fx_inner  # noqa: E402
from torch._inductor.decomposition import select_decomp_table  # noqa: E402
from torch._inductor.exc import InductorError  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

import cgpt_kernels as ck  # noqa: E402
from cgpt_kernels import backends, ops, tune  # noqa: E402
from cgpt_kernels.ops import registry  # noqa: E402
from cgpt_kernels.testing import differentiable  # noqa: E402
from cgpt_kernels.triton_substrate import launch, machine_code  # noqa: E402
from tests.triton_writes import OUTPUTS, writes  # noqa: E402

if launch.INTERPRETED:
    pytest.skip("the interpreter traces nothing", allow_module_level=True)


class Hopper:
    """A driver that compiles for an H100 and launches nothing."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(backends, "_devices", lambda backend: ("cpu", "cuda"))
    monkeypatch.setattr(driver, "_active", Hopper())
    torch._dynamo.reset()
    with launch.as_if("9.0"):
        yield
    torch._dynamo.reset()


class Stop(Exception):
    """Instead of running a graph."""


def stop(*args):
    raise Stop


def graphs(function, *inputs, **options):
    """What torch.compile makes of a call: one graph of forward and backward, or of the forward."""
    found = []

    def keep(graph, _):
        found.append(graph)
        return stop

    def partition(graph, inputs, **sizes):
        found.append(graph)
        return default_partition(graph, inputs, **sizes)

    compilers = {"fw_compiler": lambda *_: stop, "inference_compiler": keep}
    backend = aot_autograd(**compilers, partition_fn=partition)
    with pytest.raises(Stop):
        torch.compile(function, backend=backend, fullgraph=True, **options)(*inputs)
    return found


def kernels(found):
    """How often each Triton kernel is in the graphs; holds what they write against WRITES."""
    counts = collections.Counter()
    for node in (node for graph in found for node in graph.graph.nodes):
        assert "cgpt" not in str(node.target), f"an op that is not opened: {node.format_node()}"
        if node.target is not triton_kernel_wrap.triton_kernel_wrapper_functional:
            continue
        kernel = triton_kernel_wrap.kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
        name = kernel.fn.fn.__name__  # a JITFunction in an Autotuner of one configuration
        given = {k: v for k, v in node.kwargs["kwargs"].items() if v is not None}
        assert set(node.kwargs["tensors_to_clone"]) == writes(name, given), name
        counts[name] += 1
    return dict(counts)


def case(op, name):
    return next(c for c in registry.cases("test", op) if c.name == name)


NORM_BACKWARD = {"layer_norm_bwd_kernel": 1, "add_shares_kernel": 1}
ATTENTION_BACKWARD = {
    "attention_rows_kernel": 1,
    "attention_keys_kernel": 1,
    "attention_queries_kernel": 1,
}
# op, case -> kernels of forward and backward
EXPECTED = {
    ("layer_norm", "odd_tail"): {"layer_norm_fwd_kernel": 1, **NORM_BACKWARD},
    ("add_layer_norm", "odd_tail"): {"layer_norm_fwd_kernel": 1, **NORM_BACKWARD},
    ("gemm", "odd"): {"gemm_kernel": 3, "add_shares_kernel": 1, "gemm_activation_bwd_kernel": 1},
    ("gemm", "all_kn"): {"gemm_kernel": 3, "add_shares_kernel": 1, "gemm_activation_bwd_kernel": 1},
    ("gemm", "dropout_all"): {
        "gemm_kernel": 3,
        "add_shares_kernel": 1,
        "gemm_activation_bwd_kernel": 1,
    },
    ("attention", "packed"): {"attention_fwd_kernel": 1, **ATTENTION_BACKWARD},
    ("attention", "alibi"): {"attention_fwd_kernel": 1, **ATTENTION_BACKWARD},
    ("attention", "bias_bool"): {"attention_fwd_kernel": 1, **ATTENTION_BACKWARD},
    ("attention", "bias_qk"): {
        "attention_fwd_kernel": 1,
        **ATTENTION_BACKWARD,
        "attention_bias_kernel": 1,
    },
    ("attention", "dropout_all"): {
        "attention_fwd_kernel": 1,
        **ATTENTION_BACKWARD,
        "attention_bias_kernel": 1,
    },
    ("linear_cross_entropy", "bias"): {
        "linear_cross_entropy_fwd_kernel": 1,
        "linear_cross_entropy_join_kernel": 1,
        "linear_cross_entropy_bwd_kernel": 1,
        "product_kernel": 2,
        "add_shares_kernel": 1,
    },
}


@pytest.mark.parametrize("op, name", EXPECTED)
def test_the_graphs_of_an_op_hold_its_kernels_forward_and_backward(op, name):
    inputs = case(op, name).inputs(torch.bfloat16)
    for leaf in differentiable(inputs):
        inputs[leaf].requires_grad_()
    function = registry.FUNCTIONS[op]
    found = kernels(graphs(lambda: function(**inputs, backend="triton")))
    assert found == EXPECTED[op, name]


def test_decoding_holds_the_kernel_of_the_chunks_and_the_one_that_joins_them():
    q, k = torch.randn(2, 2, 1, 64), torch.randn(2, 2, 700, 64)
    found = graphs(lambda q, k: ops.attention(q, k, k, backend="triton"), q, k)
    assert kernels(found) == {"attention_fwd_kernel": 1, "attention_join_kernel": 1}


def block(x, gain, weight, bias, head):
    """Every op, and torch's own between them."""
    x, s = ops.add_layer_norm(x, x * 2, gain, bias, backend="triton")
    x = ops.gemm(x, weight, bias, activation="gelu", residual=s, backend="triton")
    B, T, C = x.shape
    heads = x.view(B, T, 2, 64).transpose(1, 2)
    x = ops.attention(heads, heads, heads, dropout_p=0.1, backend="triton")
    x = x.transpose(1, 2).reshape(B, T, C)
    target = torch.zeros(B, T, dtype=torch.int64, device=x.device)
    return ops.linear_cross_entropy(x, head, target, backend="triton")


def block_inputs(B=2, T=64, device="cpu"):
    shapes = (B, T, 128), (128,), (128, 128), (128,), (501, 128)
    return [torch.randn(*shape, dtype=torch.bfloat16, device=device) for shape in shapes]


def test_sizes_that_change_stay_symbols():
    inputs = block_inputs()
    torch._dynamo.mark_dynamic(inputs[0], 1)
    found = graphs(block, *[t.requires_grad_() for t in inputs])
    assert "layer_norm_fwd_kernel" in kernels(found)
    inputs = [t for t in found[0].graph.nodes if t.op == "placeholder"]
    assert any(isinstance(t.meta["val"], torch.SymInt) for t in inputs)


def test_a_replaced_model_trains_through_its_kernels_alone():
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32, "vocab_size": 97}
    model = ck.GPT(ck.GPTConfig(**sizes, attn_pdrop=0.1, resid_pdrop=0.1)).train()
    ck.replace(model, backend="triton")
    tokens = torch.randint(97, (1, 17))
    found = kernels(graphs(lambda: model(tokens[:, :-1], targets=tokens[:, 1:])))
    assert found["layer_norm_fwd_kernel"] == found["layer_norm_bwd_kernel"] == 5
    assert found["attention_fwd_kernel"] == found["attention_keys_kernel"] == 2
    assert found["gemm_kernel"] == 3 * 4 * 2  # forward, dx, dweight of four products a layer
    assert found["linear_cross_entropy_fwd_kernel"] == 1


def inductor_code(monkeypatch, function, *shapes):
    """What torch.compile would run on an H100, as Python source; made on fake CUDA tensors."""
    h100 = types.SimpleNamespace(
        name="H100", major=9, minor=0, multi_processor_count=132, warp_size=32,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
        max_threads_per_block=1024, shared_memory_per_block_optin=232448, L2_cache_size=50 << 20,
    )  # fmt: skip
    answers = {
        "is_available": True, "current_device": 0, "device_count": 1, "set_device": None,
        "get_device_properties": h100, "get_device_capability": (9, 0), "synchronize": None,
        "get_compute_capability": 90, "get_raw_stream": 0, "get_rng_state": torch.zeros(1),
        "set_rng_state": None, "exchange_device": 0, "maybe_exchange_device": 0,
        "_exchange_device": 0, "_maybe_exchange_device": 0,
    }  # fmt: skip
    interface = device_interface.CudaInterface

    found = []

    def generate(self):
        found.append(self.codegen()[0].value)
        raise Stop

    def compiler(graph, inputs):
        with monkeypatch.context() as patch:
            for where in (torch.cuda, interface, interface.Worker):
                for name, answer in answers.items():
                    said = staticmethod(lambda *_, answer=answer: answer)
                    patch.setattr(where, name, said, raising=False)
            patch.setattr(scheduler, "has_triton", lambda: True)
            patch.setattr(torch.utils._triton, "has_triton", lambda: True)
            patch.setattr(GraphLowering, "compile_to_module", generate)
            patch.setattr(torch._inductor.config, "force_disable_caches", True)
            patch.setattr(torch._inductor.config, "compile_threads", 1)
            with pytest.raises(InductorError, match="Stop"):
                compile_fx_inner(graph, inputs)
        return stop

    made = {"decompositions": select_decomp_table(), "inference_compiler": compiler}
    backend = aot_autograd(fw_compiler=compiler, **made)
    with FakeTensorMode(), torch.no_grad(), pytest.raises(Stop):
        inputs = [torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in shapes]
        torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return found[0]


def test_inductor_launches_the_kernels_itself_and_copies_nothing_for_them(monkeypatch):
    shapes = (2, 64, 128), (128,), (128, 128), (128,), (501, 128)
    code = inductor_code(monkeypatch, block, *shapes)
    body = code[code.index("def call(") : code.index("runner = ")]
    launched = re.findall(r"(\w+)_\d+\.run\(", body)
    ours = [name for name in launched if name in OUTPUTS]
    assert ours == [
        "layer_norm_fwd_kernel",
        "gemm_kernel",
        "attention_fwd_kernel",
        "linear_cross_entropy_fwd_kernel",
        "linear_cross_entropy_join_kernel",
    ]
    assert "torch.ops.cgpt" not in body and "clone" not in body
    # 2 x, the targets (made once for each kernel that reads them), and the mean of the losses
    assert len(launched) - len(ours) <= 4, body


def test_export_keeps_ops_whole():
    class Norm(torch.nn.Module):
        def forward(self, x, weight):
            return ops.layer_norm(x, weight, backend="triton")

    program = torch.export.export(Norm(), (torch.randn(4, 32), torch.ones(32)))
    program = program.run_decompositions({})
    assert torch.ops.cgpt.layer_norm.default in {n.target for n in program.graph.nodes}


def test_what_goes_into_caches_on_disk_names_the_sources_and_the_table(tmp_path, monkeypatch):
    name = backends.traced("triton")
    assert name.startswith("triton:") and backends.traced("cuda") == "cuda"
    assert backends.implementation("gemm", name) == backends.implementation("gemm", "triton")
    folder = tmp_path / "triton_substrate"
    folder.mkdir()
    monkeypatch.setattr(launch, "__file__", str(folder / "launch.py"))
    found = set()
    for text in ("a", "b"):
        (folder / "launch.json").write_text(text)
        found.add(launch.fingerprint.__wrapped__())
    assert len(found) == 2


def test_the_first_op_asked_for_brings_the_limits_of_all():
    backends.implementation("gemm", "triton")
    assert {"layer_norm", "add_layer_norm", "attention"} <= set(backends._LIMITS["triton"])


@pytest.mark.parametrize("asked, told", [("none", "ieee"), ("tf32", "tf32")])
def test_fp32_products_run_in_tf32_only_where_torch_was_told_so(asked, told):
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, asked
    try:
        call = functools.partial(tune.gemm, 64, 64, 64, torch.float32)
        launched = machine_code.record(call, "9.0")
    finally:
        matmul.fp32_precision = before
    assert {x.arguments["PRECISION"] for x in launched if "PRECISION" in x.arguments} == {told}
