"""Gradients of linear_cross_entropy on the CPU: groups of rows, tiers, threads, when they are made.

M rows, K width, V vocabulary.
"""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cgpt_kernels import backends, ops
from cgpt_kernels.ops.cross_entropy.cases import LinearCrossEntropyCase
from cgpt_kernels.testing import hold_to_rule, run

if backends.implementation("linear_cross_entropy", "cpu")[0] is None:
    pytest.skip("cgpt_kernels._C is not built", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TIERS = backends._C.cpu_isas()


on_tiers = pytest.mark.parametrize("tier", TIERS, indirect=True)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def problem(M=37, K=24, V=301, dtype=torch.float32, **options):
    case = LinearCrossEntropyCase(name="", why="", M=M, K=K, V=V, **options)
    return case.inputs(dtype)


# Several groups of rows: 4 in fp32, 2 in 16 bits; and more than 2, whose sum is kept in fp32.
GROUPS = {
    "groups": LinearCrossEntropyCase(
        name="", why="", M=201, K=17, V=22001, bias=True, ignored=0.1, smoothing=0.1
    ),
    "many groups": LinearCrossEntropyCase(name="", why="", M=2100, K=8, V=2300, reduction="sum"),
}


@pytest.mark.usefixtures("nan_filled_memory")
@each_dtype
@pytest.mark.parametrize("case", GROUPS.values(), ids=GROUPS)
def test_rows_in_groups_are_as_exact_as_eager(case, dtype):
    hold_to_rule(ops.linear_cross_entropy, case.inputs(dtype), gradients=True, backend="cpu")


@pytest.mark.usefixtures("nan_filled_memory")
@each_dtype
@on_tiers
def test_every_tier_is_as_exact_as_eager(tier, dtype):
    # 450 vocabulary rows: two blocks and a tail; 33 rows of x: a panel and a tail; K beside steps.
    for reduction in ("mean", "none"):
        inputs = problem(33, 50, 450, dtype, bias=True, smoothing=0.1, reduction=reduction)
        hold_to_rule(ops.linear_cross_entropy, inputs, gradients=True, backend="cpu")


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_the_number_of_threads_changes_no_bit(dtype):
    inputs = GROUPS["groups"].inputs(dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(ops.linear_cross_entropy, inputs, gradients=True, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for what, wanted in found[0].items():
        assert torch.equal(found[1][what], wanted) and torch.equal(found[2][what], wanted), what


def test_the_loss_has_the_same_bits_with_and_without_gradients():
    for M in (3, 40, 200):
        inputs = problem(M, 64, 3001)
        plain = ops.linear_cross_entropy(**inputs)
        inputs["x"].requires_grad_()
        assert torch.equal(ops.linear_cross_entropy(**inputs).detach(), plain)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_are_never_read(reduction):
    inputs = problem(40, 24, 301, ignored=0.3, reduction=reduction)
    hidden = inputs["target"] == -100
    kept = {**inputs, "x": inputs["x"][~hidden], "target": inputs["target"][~hidden]}
    wanted = torch.autograd.grad(
        ops.linear_cross_entropy(**{**kept, "x": kept["x"].requires_grad_()}).sum(), kept["x"]
    )[0]
    inputs["x"][hidden] = float("nan")
    x, weight = inputs["x"].requires_grad_(), inputs["weight"].requires_grad_()
    loss = ops.linear_cross_entropy(**inputs).sum()
    dx, dweight = torch.autograd.grad(loss, (x, weight))
    assert (dx[hidden] == 0).all() and torch.equal(dx[~hidden], wanted)
    assert torch.isfinite(dweight).all()


@pytest.mark.usefixtures("nan_filled_memory")
@each_dtype
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("M", [0, 5])
def test_gradients_are_zero_where_no_row_counts(M, reduction, dtype):
    inputs = problem(M, 8, 11, dtype, bias=True, ignored=1.1, reduction=reduction)
    for what, found in run(ops.linear_cross_entropy, inputs, gradients=True).items():
        if what != "out":
            assert (found == 0).all(), what


@each_dtype
def test_a_second_backward_gives_the_same_gradients(dtype):
    inputs = problem(dtype=dtype)
    weight = inputs["weight"].requires_grad_()
    loss = ops.linear_cross_entropy(**inputs)
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(weight.grad, first + first)


def test_a_parameter_takes_its_gradient_without_a_copy():
    inputs = problem(dtype=torch.bfloat16)
    weight = inputs["weight"].requires_grad_()
    loss = ops.linear_cross_entropy(**inputs)
    made = loss.grad_fn.grads[1].data_ptr()
    loss.backward()
    assert weight.grad.data_ptr() == made


def test_a_weight_changed_before_a_second_backward_is_refused():
    inputs = problem()
    weight = inputs["weight"].requires_grad_()
    loss = ops.linear_cross_entropy(**inputs)
    loss.backward(retain_graph=True)
    with torch.no_grad():
        weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_dtype
def test_the_incoming_gradient_scales(dtype):
    inputs = problem(dtype=dtype)
    hold_to_rule(
        lambda **call: ops.linear_cross_entropy(**call) * 0.37,
        inputs,
        gradients=True,
        backend="cpu",
    )


def test_fp16_gradients_wait_for_the_scale_that_keeps_them_from_vanishing():
    """A softmax over 3001 classes, averaged over 512 rows: 6.5e-7, where fp16 has steps of 6e-8."""
    inputs = problem(512, 8, 3001, torch.float16, spread=0.01)
    weight = inputs["weight"].requires_grad_()
    scaled = torch.autograd.grad(ops.linear_cross_entropy(**inputs) * 2.0**14, weight)[0]
    wide = inputs["weight"].detach().double().requires_grad_()
    logits = F.linear(inputs["x"].double(), wide)
    (truth,) = torch.autograd.grad(F.cross_entropy(logits, inputs["target"]), wide)
    assert ((scaled.double() / 2.0**14 - truth).abs() <= 2e-3 * truth.abs() + 1e-10).all()


@pytest.mark.parametrize("needs", [("x",), ("weight",), ("bias",), ("x", "bias")], ids=str)
def test_frozen_inputs_get_no_gradient_and_change_none(needs):
    inputs = problem(bias=True)
    wanted = run(ops.linear_cross_entropy, inputs, gradients=True)
    leaves = [inputs[name].requires_grad_() for name in needs]
    found = torch.autograd.grad(ops.linear_cross_entropy(**inputs), leaves)
    factor = torch.randint(-31, 32, (), generator=torch.Generator().manual_seed(1)) / 8
    for name, grad in zip(needs, found, strict=True):
        assert torch.equal(grad * factor, wanted[f"grad of {name}"]), name


def test_a_tied_weight_gets_both_gradients():
    weight, tokens = torch.randn(97, 16).requires_grad_(), torch.randint(97, (2, 13))

    def loss(head):
        x = F.embedding(tokens[:, :-1], weight)
        return head(x.tanh(), weight, tokens[:, 1:])

    found = torch.autograd.grad(loss(ops.linear_cross_entropy), weight)[0]
    wanted = torch.autograd.grad(
        loss(lambda x, w, t: F.cross_entropy(F.linear(x, w).flatten(0, 1), t.flatten())), weight
    )[0]
    torch.testing.assert_close(found, wanted)


def test_autocast_gives_the_master_weights_their_gradients():
    inputs = problem(64, 32, 501)
    weight = inputs["weight"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(ops.linear_cross_entropy(**inputs), weight)[0]
    narrow = {k: v.bfloat16() if k in ("x", "weight") else v for k, v in inputs.items()}
    narrow["weight"] = narrow["weight"].detach().requires_grad_()
    wanted = torch.autograd.grad(ops.linear_cross_entropy(**narrow), narrow["weight"])[0]
    assert found.dtype == torch.float32 and torch.equal(found, wanted.float())


def test_compiled_gradients_are_those_of_eager():
    inputs = problem(dtype=torch.bfloat16)
    leaves = [inputs[name].requires_grad_() for name in ("x", "weight")]

    def both(function):
        loss = function(**inputs)
        return loss, *torch.autograd.grad(loss * 3, leaves)

    torch._dynamo.reset()
    compiled = torch.compile(ops.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for wanted, found in zip(both(ops.linear_cross_entropy), both(compiled), strict=True):
        assert torch.equal(wanted, found)


def test_a_gradient_of_a_gradient_is_refused():
    inputs = problem()
    x = inputs["x"].requires_grad_()
    incoming = torch.ones((), requires_grad=True)
    loss = ops.linear_cross_entropy(**inputs)
    (dx,) = torch.autograd.grad(loss, x, incoming, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_extra_memory_is_an_eighth_of_eagers(dtype):
    """Beyond inputs and gradients, by the process's high-water mark: eager has 12 bytes a logit."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        pytest.skip("/proc/self/clear_refs is missing")
    M, K, V = 256, 64, 50257
    inputs = problem(M, K, V, dtype)
    leaves = [inputs[name].requires_grad_() for name in ("x", "weight")]

    def resident(what):
        found = re.search(rf"{what}:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return 1024 * int(found[1])

    def peak(loss):
        torch.autograd.grad(loss(), leaves)  # first call: pools, threads
        reset.write_text("5")
        before = resident("VmRSS")
        torch.autograd.grad(loss(), leaves)
        return resident("VmHWM") - before - sum(leaf.nbytes for leaf in leaves)

    def eager():
        logits = F.linear(inputs["x"], inputs["weight"]).float()
        return F.cross_entropy(logits, inputs["target"])

    ours = peak(lambda: ops.linear_cross_entropy(**inputs))
    assert ours <= 1.1 * M * V + (6 << 20)
    assert ours <= peak(eager) / 5  # the fixed part weighs more at this size than at 512 rows
