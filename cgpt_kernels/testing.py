"""The numerics rule, in one place: how far an op may be from the truth, and the table that says so.

The truth is the reference in fp64. What counts is the largest absolute error of a tensor, measured
against the error that plain PyTorch makes in the same dtype on the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
SLACK = 1e-6  # of the largest absolute value of the true tensor: some ulp of fp32


@dataclass(frozen=True)
class Comparison:
    """One output or gradient of one call, held to the rule."""

    what: str
    error: float
    eager_error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed

    def __str__(self) -> str:
        return (
            f"{self.what}: error {self.error:.3e}, allowed {self.allowed:.3e} "
            f"(eager's {self.eager_error:.3e})"
        )


def _largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def _error(value: Tensor, truth: Tensor) -> float:
    """Largest absolute error; NaN in one only counts as infinite, NaN in both as agreement."""
    value = value.double().to(truth.device)
    both = torch.isnan(value) & torch.isnan(truth)
    difference = torch.where(both | (value == truth), 0.0, (value - truth).abs())
    return _largest(torch.where(torch.isnan(difference), float("inf"), difference))


def compare(
    what: str, value: Tensor, eager: Tensor, truth: Tensor, factor: float, elsewhere: float = 0.0
) -> Comparison:
    """Hold one tensor to the rule.

    allowed = max(factor * eager's error, error of the truth rounded to the dtype) + SLACK * scale

    The second term matters for a handful of elements only, where eager may hit the truth by luck:
    a correctly rounded result is never wrong.

    Args:
        elsewhere: eager's error on other values of the same shapes; the larger one counts.
    """
    if value.dtype != eager.dtype or value.shape != eager.shape:
        got, wanted = (f"{t.dtype} {tuple(t.shape)}" for t in (value, eager))
        raise AssertionError(f"{what}: expected {wanted}, got {got}")
    eager_error = max(_error(eager, truth), elsewhere)
    rounding = _error(truth.to(value.dtype), truth)
    scale = _largest(torch.nan_to_num(truth, 0.0, 0.0, 0.0))
    allowed = max(factor * eager_error, rounding) + SLACK * scale
    return Comparison(what, _error(value, truth), eager_error, allowed)


def to_fp64(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same values in fp64; alibi_slopes stay fp32, their only dtype."""

    def widen(name, value):
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if floating and name != "alibi_slopes" else value

    return {name: widen(name, value) for name, value in inputs.items()}


def differentiable(inputs: dict[str, Any]) -> list[str]:
    """Names of the tensors among inputs that have gradients."""
    return [
        name
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point() and name != "alibi_slopes"
    ]


def run(
    function: Callable, inputs: dict[str, Any], *, gradients: bool = False, **options
) -> dict[str, Tensor]:
    """Outputs by name ("out", or "out0", "out1"), and gradients ("grad of x") where asked for.

    The gradient is that of sum(out * g) for fixed random g, the same for every dtype and backend.
    """
    names = differentiable(inputs) if gradients else []
    leaves = {n: inputs[n].detach().requires_grad_() for n in names}
    outputs = function(**{**inputs, **leaves}, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    many = len(outputs) > 1
    named = {f"out{i}" if many else "out": out.detach() for i, out in enumerate(outputs)}
    if names:
        generator = torch.Generator().manual_seed(1)
        # Multiples of 1/8 below 4: exact in every dtype, so that only the op's errors are seen.
        directions = [
            torch.randint(-31, 32, out.shape, generator=generator).to(out) / 8 for out in outputs
        ]
        found = torch.autograd.grad(
            outputs, [leaves[n] for n in names], directions, allow_unused=True
        )
        for name, grad in zip(names, found, strict=True):
            named[f"grad of {name}"] = torch.zeros_like(leaves[name]) if grad is None else grad
    return named


def hold_to_rule(
    function: Callable,
    inputs: dict[str, Any],
    *,
    gradients: bool = False,
    candidate: Callable | None = None,
    draws: Iterable[dict[str, Any]] = (),
    **options,
) -> list[Comparison]:
    """Compare a call with eager in the same dtype, both against fp64; raise where one is beyond.

    Args:
        function: an op of cgpt_kernels.ops.
        inputs: its keyword arguments.
        gradients: also the gradients of every floating tensor among inputs.
        candidate: what to hold to the rule instead of the function, with the same signature.
        draws: other inputs of the same shapes, on which eager's error is measured too. With a
            handful of elements one draw may hit the truth by luck; eager's error is what it is
            without.
        options: passed to the candidate only, e.g. backend="cpu".
    """

    def reference(inputs):
        return run(function, inputs, gradients=gradients, backend="eager")

    truth, eager = reference(to_fp64(inputs)), reference(inputs)
    elsewhere = dict.fromkeys(truth, 0.0)
    for draw in draws:
        true, plain = reference(to_fp64(draw)), reference(draw)
        for what, largest in elsewhere.items():
            elsewhere[what] = max(largest, _error(plain[what], true[what]))
    ours = run(candidate or function, inputs, gradients=gradients, **options)
    found = [
        compare(
            what,
            ours[what],
            eager[what],
            truth[what],
            GRADIENT_FACTOR if what.startswith("grad") else FORWARD_FACTOR,
            elsewhere[what],
        )
        for what in truth
    ]
    beyond = [str(c) for c in found if not c.ok]
    if beyond:
        raise AssertionError("; ".join(beyond))
    return found


# ---- the table ----------------------------------------------------------------------------------

# What holds exactly, and the test that says so.
PROMISES = (
    (
        "The same inputs give the same bits, run after run, on every tier.",
        ("test_the_same_bits_in_100_runs", "test_every_tier_repeats_its_bits"),
    ),
    (
        "Every way into an op (lean, autograd, torch.library) gives the same bits.",
        ("test_library_path_gives_the_same_bits_as_the_lean_path",),
    ),
    (
        "Strides and offsets of the inputs change no bit of the outputs.",
        (
            "test_non_contiguous_inputs_give_the_same_bits",
            "test_row_strides_and_offsets_are_read_in_place",
        ),
    ),
    (
        "Keys after a query, and padded keys whatever they hold, change no bit of its output.",
        ("test_attention_ignores_future_keys", "test_masked_keys_may_hold_anything"),
    ),
    (
        "Entries of a batch and rows of a matrix do not touch each other.",
        ("test_batch_entries_do_not_touch_each_other", "test_gemm_rows_do_not_touch_each_other"),
    ),
    (
        "A query that sees no key gives 0 and takes gradient 0, never NaN.",
        ("test_a_query_that_sees_nothing_gives_zero_and_takes_no_gradient",),
    ),
    (
        "The dropout mask is Philox 4x32-10 of (seed, element index) on every backend, bit for "
        "bit; the backward draws the same one.",
        (
            "test_philox_known_answers",
            "test_dropout_mask_is_the_shared_one",
            "test_dropout_backward_uses_the_mask_of_the_forward",
        ),
    ),
    (
        "gemm and layer_norm and their gradients have the same bits for any number of threads.",
        ("test_no_bit_depends_on_the_thread_count",),
    ),
    (
        "add_layer_norm returns x + residual as rounded to the dtype, and normalises that.",
        ("test_add_layer_norm_is_layer_norm_of_the_rounded_sum",),
    ),
    (
        "Nothing is written outside the outputs, and fresh memory is never read.",
        ("test_nothing_is_written_outside_the_outputs", "nan_filled_memory"),
    ),
)


def rule_table(cases, dtypes) -> str:
    """The rule per op and dtype, and the exact promises, as Markdown.

    Args:
        cases: the test cases (anything with op, name, shape, why).
        dtypes: the dtypes the tests run.
    """
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    lines = [
        "| op | dtypes | cases | output | gradient | plus, of the largest value |",
        "|---|---|---|---|---|---|",
    ]
    by_op: dict[str, list] = {}
    for case in cases:
        by_op.setdefault(case.op, []).append(case)
    for op, own in by_op.items():
        lines.append(
            f"| `{op}` | {names} | {len(own)} | at most {FORWARD_FACTOR:g} x eager's error "
            f"| at most {GRADIENT_FACTOR:g} x eager's error | {SLACK:g} |"
        )
    lines += ["", "| case | shape | why it is there |", "|---|---|---|"]
    lines += [f"| `{case.op}` {case.name} | {case.shape} | {case.why} |" for case in cases]
    lines += ["", "| what holds exactly | held by |", "|---|---|"]
    lines += [
        f"| {promise} | {', '.join(f'`{test}`' for test in tests)} |" for promise, tests in PROMISES
    ]
    return "\n".join(lines) + "\n"
