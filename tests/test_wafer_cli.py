"""The command line of the wafer, its pictures and traces, and the generated document."""

import csv
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import cgpt_kernels as ck
from cgpt_kernels.cli import app
from cgpt_kernels.wafer import document
from cgpt_kernels.wafer.collectives import simulate
from cgpt_kernels.wafer.ops import gemm_report
from cgpt_kernels.wafer.report import trace_events

ROOT = Path(__file__).resolve().parent.parent


def wafer(*args, code=0):
    done = CliRunner().invoke(app, ["wafer", *map(str, args)])
    assert done.exit_code == code, done.output
    return done.output


class Balanced(HTMLParser):
    """Raises where a tag is left open, and collects what a page would load from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href") and not v.startswith("data:")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page(path):
    parser = Balanced()
    parser.feed(path.read_text())
    assert not parser.open and not parser.loads
    return parser


def test_estimate_prints_phases_and_whether_it_fits():
    text = wafer(
        "estimate", "--model", "cerebras-gpt-13b", "--spec", "wse2", "--mode", "decode", "--grid",
        "660x660",
    )  # fmt: skip
    assert "tokens/s" in text and "output head" in text and "DOES NOT FIT" in text
    found = json.loads(wafer("estimate", "--model", "llama3-8b", "--grid", "420x420", "--json"))
    assert found["grid"] == [420, 420] and found["cycles"] > 0


def test_gemm_sets_algorithms_side_by_side(tmp_path):
    file, trace, png = tmp_path / "gemm.html", tmp_path / "gemm.json", tmp_path / "gemm.png"
    text = wafer("gemm", "--size", "64x48x32", "--grid", "4x4", "--html", file, "--trace", trace,
                 "--heatmap", png)  # fmt: skip
    assert all(name in text for name in ("summa", "cannon", "mesh"))
    found = page(file)
    assert found.tags.count("figure") == 5 and "px 3, py 3" in file.read_text()
    assert len(json.loads(trace.read_text())["traceEvents"]) > 100
    assert png.read_bytes().startswith(b"\x89PNG")


def test_maps_of_products_are_shares_of_the_time():
    for algorithm in ("summa", "cannon", "mesh"):
        maps = gemm_report(24, 18, 30, 2, (6, 6), algorithm, ck.wafer.WSE2).maps
        busy = maps["compute"] + maps["communication"] + maps["idle"]
        assert (busy == busy[0, 0]).all() and min(m.min() for m in maps.values()) >= 0


def test_collective_writes_trace_picture_and_page(tmp_path):
    trace, png, html = (tmp_path / n for n in ("t.json", "m.png", "r.html"))
    text = wafer("collective", "--kind", "allreduce", "--shape", "4x6", "--words", 8, "--algorithm",
                 "ktree", "--trace", trace, "--heatmap", png, "--html", html)  # fmt: skip
    assert "modelled" not in text and "cycles" in text
    events = json.loads(trace.read_text())["traceEvents"]
    assert len({e["pid"] for e in events}) == 24  # a process for each core
    assert png.read_bytes().startswith(b"\x89PNG")
    found = page(html)
    assert found.tags.count("img") == 5 and found.tags.count("svg") == 2


def test_traces_are_in_the_trace_event_format(tmp_path):
    """Of the documented format, all that Perfetto's importer asks of these kinds of events."""
    report, _ = simulate("allreduce", "two_phase", (3, 5), 4, ck.wafer.WSE2, log=100_000)
    report.save_trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert trace["displayTimeUnit"] in ("ns", "ms") and isinstance(trace["traceEvents"], list)
    named, tracks = {"process_name": set(), "thread_name": set()}, {}
    for event in trace["traceEvents"]:
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        if event["ph"] == "M":
            assert isinstance(event["args"]["name"], str)
            of_process = event["name"] == "process_name"
            track = event["pid"] if of_process else (event["pid"], event["tid"])
            assert track not in named[event["name"]]
            named[event["name"]].add(track)
        else:
            assert event["ph"] == "X" and event["name"] in ("along x", "along y", "broadcast")
            assert event["ts"] >= 0 and event["dur"] >= 0
            tracks.setdefault((event["pid"], event["tid"]), []).append(event)
    assert named["thread_name"] == tracks.keys()
    assert named["process_name"] == {pid for pid, _ in tracks}
    for events in tracks.values():  # slices of a track must nest; these follow one another
        events.sort(key=lambda event: event["ts"])
        assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in pairwise(events))
    ends = [e["ts"] + e["dur"] for events in tracks.values() for e in events]
    assert max(ends) == report.cycles


def test_spans_of_a_thread_do_not_overlap():
    report, done = simulate("reduce", "two_phase", (1, 9), 5, ck.wafer.WSE2, log=10_000)
    by_thread = {}
    for core, thread, _, start, end in report.timeline:
        by_thread.setdefault((core, thread), []).append((start, end))
    for spans in by_thread.values():
        spans.sort()
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert max(end for *_, end in report.timeline) == done.cycles


def test_a_report_without_cores_traces_its_phases_and_has_no_map(tmp_path):
    small = ck.GPTConfig.from_name("cerebras-gpt-111m")
    report = ck.wafer.estimate(small, grid=(64, 64), mode="prefill", context=128)
    spans = [e for e in trace_events(report)["traceEvents"] if e["ph"] == "X"]
    assert len(spans) == len(report.phases)
    with pytest.raises(ValueError, match="has no maps: its cycles come from representative rows"):
        report.save_heatmap(tmp_path / "no.png")
    report.save_html(tmp_path / "yes.html")
    page(tmp_path / "yes.html")


def test_maps_state_their_imbalance():
    report, _ = simulate("reduce", "star", (1, 8), 16, ck.wafer.WSE2)
    found = report.imbalance("communication")
    assert found["max/mean"] > 2 and found["max"] == report.maps["communication"].max()
    assert np.array_equal(
        report.maps["compute"] + report.maps["communication"] + report.maps["idle"],
        np.full((1, 8), report.cycles),
    )


def test_a_sweep_is_one_row_for_each_combination(tmp_path):
    file = tmp_path / "sweep.csv"
    wafer("sweep", "--model", "cerebras-gpt-111m", "--grids", "32x32,64x64", "--out", file)
    rows = list(csv.DictReader(file.open()))
    assert len(rows) == 4 and {r["spec"] for r in rows} == {"wse2", "wse3"}
    assert "cerebras" in wafer("sweep", "--model", "cerebras-gpt-111m", "--grids", "32x32")
    grouped = json.loads(wafer("sweep", "--model", "cerebras-gpt-111m", "--grids", "64x64",
                               "--groups", "4,8", "--specs", "wse2", "--json"))  # fmt: skip
    assert [r["groups"] for r in grouped] == [4, 8] and grouped[0]["cycles"] != grouped[1]["cycles"]


def test_products_and_collectives_are_swept_too(tmp_path):
    file = tmp_path / "sweep.json"
    wafer("sweep", "--size", "64x64x64", "--grids", "4x4,8x8", "--out", file)
    rows = json.loads(file.read_text())
    assert len(rows) == 2 * 2 * 3 and all(r["cycles"] > 0 for r in rows)
    rows = json.loads(wafer("sweep", "--kind", "reduce", "--grids", "1x16", "--words", "1,64",
                            "--algorithms", "chain,tree,magic", "--json"))  # fmt: skip
    bad = [r for r in rows if r["error"]]
    assert len(rows) == 12 and all("got 'magic'" in r["error"] for r in bad) and len(bad) == 4


def test_an_estimate_has_maps_of_its_cores():
    report = ck.wafer.estimate(ck.GPTConfig.from_name("cerebras-gpt-111m"), grid=(40, 56))
    maps = report.maps
    assert maps.keys() == {"compute", "communication", "idle", "hops", "SRAM"}
    busy = maps["compute"] + maps["communication"] + maps["idle"]
    assert (busy == busy[0, 0]).all() and maps["idle"].min() >= 0
    assert 12 * maps["hops"].sum() <= report.hops * 12 / 10 + 1  # of one of its ten blocks
    assert report.words > 0


def test_validate_prints_every_row():
    text = wafer("validate", "--kind", "micro")
    assert text.count("\n| @") >= 3 and "%" in text
    rows = json.loads(wafer("validate", "--kind", "micro", "--json"))
    assert all({"what", "published", "predicted", "error", "source"} <= row.keys() for row in rows)


def test_report_compares_machines_and_grids(tmp_path):
    file = tmp_path / "report.html"
    wafer("report", "--model", "cerebras-gpt-111m", "--grid", "64x64", "--context", 128, "--out",
          file)  # fmt: skip
    text, found = file.read_text(), page(file)
    assert found.tags.count("h3") == 4 and found.tags.count("img") == 5
    for words in ("WSE-3", "128 x 128", "32 x 32", "streaming", "prefill", "train"):
        assert words in text
    rows = re.findall(r"<tr[^>]*><td>(.*?)</td>", text.split("<h2>What if</h2>")[1])
    assert len(rows) > 8 and all(row.startswith("cerebras-gpt-111m: ") for row in rows)


@pytest.mark.parametrize(
    "args, message",
    [
        (("estimate", "--model", "gpt-9", "--grid", "4x4"), "unknown name 'gpt-9'"),
        (("estimate", "--model", "gpt2", "--grid", "four"), "--grid must be ROWSxCOLUMNS"),
        (("estimate", "--model", "gpt2", "--grid", "4x4", "--spec", "wse9"), "wse2 or wse3"),
        (("gemm", "--size", "4x4", "--grid", "2x2"), "--size must be MxKxN"),
        (("estimate", "--model", "gpt2", "--grid", "2000x10"), "within WSE-2's usable (994, 750)"),
        (("gemm", "--size", "20000x20000x20000", "--grid", "4x4"), "for its tiles, WSE-2 leaves"),
        (("gemm", "--size", "4x4x4", "--grid", "4x4", "--algorithm", "fast"), "got 'fast'"),
        (("sweep", "--grids", "4x4"), "one of --model, --size and --kind"),
        (
            (
                "collective",
                *"--kind reduce --shape 1x700 --words 1 --algorithm tree --spec wse3".split(),
            ),
            "needs 10 input queues, the limit is 8",
        ),
    ],
    ids=str,
)
def test_errors_are_one_line(args, message):
    assert message in wafer(*args, code=2)


@pytest.mark.parametrize(
    "command", ["estimate", "gemm", "collective", "sweep", "validate", "report"]
)
def test_help_explains_every_option(command):
    text = wafer(command, "--help")
    options = re.findall(r"^ *(--[\w-]+)(.*(?:\n {20,}\S.*)*)", text, re.MULTILINE)
    assert options
    for name, rest in options:
        assert len(re.sub(r"[A-Z]{3,}|\[.*?\]|\s", "", rest)) > 3, f"{name} says nothing"


def test_the_document_is_current():
    wanted = document.document()
    assert (ROOT / "docs" / "wafer-model.md").read_text() == wanted, (
        "run `python -m cgpt_kernels.wafer.document docs/wafer-model.md`"
    )
    for name in re.findall(r"`(?:csrc|cgpt_kernels)/[\w./]+`", wanted):
        assert (ROOT / name.strip("`")).exists()
