"""The speed that this project sets itself, against what was measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .measure import Row

OURS = ("ours_gpt", "ours_hf")


@dataclass(frozen=True)
class Target:
    """At least `ratio` times as fast as the peer, or at least `share` of the bound.

    metric: "prefill", "decode" or "total", the time compared.
    ours: systems that each have to reach it.
    peers: systems compared with; None is all that are not ours. The fastest counts.
    """

    name: str
    format: str
    work: str
    metric: str
    ratio: float | None = None
    share: float | None = None
    ours: tuple[str, ...] = OURS
    peers: tuple[str, ...] | None = None


TARGETS = (
    Target("decode bf16", "bf16", "512", "decode", ratio=1.35),
    Target("decode bf16, of the read bandwidth", "bf16", "512", "decode", share=0.85),
    Target("decode int8", "int8", "512", "decode", ratio=2.0),
    Target("decode int4", "int4", "512", "decode", ratio=2.0),
    Target("decode fp32", "fp32", "512", "decode", ratio=1.05),
    Target("prefill 512 bf16", "bf16", "512", "prefill", ratio=2.0),
    Target("prefill 512 int8", "int8", "512", "prefill", ratio=2.0),
    Target("prefill 512 fp32", "fp32", "512", "prefill", ratio=1.2),
    Target("prefill 2048 bf16", "bf16", "2048", "prefill", ratio=2.0, peers=("torch_sdpa",)),
    Target("batch 8 decode bf16", "bf16", "batch", "decode", ratio=1.3),
    Target(
        *("inside Hugging Face generate, bf16", "bf16", "512", "total"),
        ratio=1.5,
        ours=("ours_hf_generate",),
        peers=("hf_generate",),
    ),
)
# Of single.py: against torch's call, or as a share of the cores' bf16 rate.
SINGLE_RATIOS = {
    "attention D64": 1.5,
    "attention D128": 1.5,
    "attention D80": 1.5,
    "gemm M=1, 768 x 768": 5.0,
}
SINGLE_SHARES = {"gemm 512 x 768 x 3072": 0.65}


@dataclass(frozen=True)
class Verdict:
    """One line of the table.

    ours, peer: medians as text with their unit, and whose they are.
    value, target: the ratio or share reached and asked for; value None where it was not measured,
        for the reason in `missing`.
    """

    name: str
    who: str
    ours: str
    peer: str
    value: float | None
    target: float
    is_share: bool
    missing: str | None = None

    @property
    def met(self) -> bool:
        return self.value is not None and self.value >= self.target

    @property
    def verdict(self) -> str:
        """met, or by how much it falls short."""
        if self.value is None:
            return f"not measured: {self.missing}"
        return "met" if self.met else f"short by {1 - self.value / self.target:.0%}"


def judge(rows: Iterable[Row], reasons: dict[str, str]) -> list[Verdict]:
    """The targets on whole models.

    Args:
        reasons: why a system did not run, by "system:format".
    """
    rows = list(rows)
    found = []
    for target in TARGETS:
        here = [r for r in rows if (r.format, r.work) == (target.format, target.work)]
        peers = [
            r
            for r in here
            if not r.red and (r.system in target.peers if target.peers else not r.ours)
        ]
        best = min(peers, key=lambda r: seconds(r, target.metric), default=None)
        for name in target.ours:
            row = next((r for r in here if r.system == name), None)
            found.append(_verdict(target, name, row, best, reasons))
    return found


def _verdict(
    target: Target, name: str, row: Row | None, best: Row | None, reasons: dict[str, str]
) -> Verdict:
    wanted, is_share = (target.share or target.ratio), target.share is not None
    missing, value, peer = None, None, ""
    if row is None:
        missing = reasons.get(f"{name}:{target.format}", "not part of this run")
    elif row.red:
        missing = row.red
    elif is_share:
        value, peer = share(row, target.metric), "the bound"
    elif best is None:
        missing = "no peer ran"
    else:
        value = seconds(best, target.metric) / seconds(row, target.metric)
    if best is not None and not is_share:
        peer = f"{best.title}, {rate(best, target.metric)}"
    ours = rate(row, target.metric) if row else ""
    who = row.title if row else name
    return Verdict(target.name, who, ours, peer, value, wanted, is_share, missing)


def judge_single(rows: Iterable[dict], peaks: dict | None) -> list[Verdict]:
    """The targets on single ops."""
    found = []
    for row in rows:
        name, ours = row["name"], f"{row['seconds_median'] * 1e6:.0f} us"
        theirs = f"torch, {row['torch_median'] * 1e6:.0f} us"
        if name in SINGLE_RATIOS:
            ratio = row["torch_median"] / row["seconds_median"]
            found.append(Verdict(name, "ops", ours, theirs, ratio, SINGLE_RATIOS[name], False))
        elif peaks is not None:
            reached = row["flops"] / row["seconds_median"] / peaks["flops"]["bf16"]
            rate = f"{peaks['flops']['bf16'] / 1e12:.2f} TFLOP/s"
            found.append(Verdict(name, "ops", ours, rate, reached, SINGLE_SHARES[name], True))
    return found


def seconds(row: Row, metric: str) -> float:
    """Median seconds of what the metric compares."""
    found = {
        "prefill": row.prefill_median,
        "decode": row.token_median,
        "total": row.total_median,
    }[metric]
    return float("inf") if found is None else found


def share(row: Row, metric: str) -> float:
    """Share of the bound that the median reaches."""
    bound = row.prefill_bound if metric == "prefill" else row.token_bound
    return bound / seconds(row, metric)


def rate(row: Row, metric: str) -> str:
    """The median in the metric's own unit."""
    if metric == "decode":
        return f"{row.tokens_per_second:.1f} tok/s"
    return f"{seconds(row, metric) * 1e3:.0f} ms"
