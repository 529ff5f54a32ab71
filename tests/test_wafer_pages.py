"""The HTML report as a browser shows it: nothing loaded, nothing cut off, every picture drawn."""

import json
import re
import shutil
import subprocess
import tempfile

import numpy as np
import pytest

import cgpt_kernels as ck
from cgpt_kernels.wafer import whatif
from cgpt_kernels.wafer.collectives import simulate

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)}")

# Runs in the page: what is larger than its place, and what was drawn.
PROBE = """<script>addEventListener("load", () => {
  const all = (s) => [...document.querySelectorAll(s)], box = (e) => e.getBoundingClientRect();
  const inside = (e, frame) => box(e).left >= box(frame).left - 1 && box(e).right <= box(frame).right + 1;
  const found = {
    loaded: performance.getEntriesByType("resource").filter((e) => !e.name.startsWith("data:")).length,
    wide: document.documentElement.scrollWidth - innerWidth,
    cut: all("section, .card").filter((e) => e.scrollWidth > e.clientWidth + 1).length,
    images: all("img").map((e) => [e.naturalHeight, e.naturalWidth, box(e).width > 100]),
    outside: all("svg").flatMap((s) => [...s.querySelectorAll("rect, text")].filter((e) => !inside(e, s)))
      .map((e) => e.outerHTML),
    bar: all("svg.phases rect").reduce((sum, e) => sum + box(e).width, 0) / box(all("svg.phases")[0]).width,
    lanes: all("svg.timeline rect").length,
    rows: all("section:last-of-type tbody tr").length,
    bold: all("tr.best").length,
  };
  document.title = "PROBE" + JSON.stringify(found);
});</script></body>"""  # noqa: E501


def browse(*options):
    """What the browser prints, started with a profile of its own."""
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        done = subprocess.run(
            [*command, f"--user-data-dir={profile}", *map(str, options)],
            capture_output=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.decode()


def probe(path, width):
    text = path.read_text()
    assert "<script" not in text
    path.with_suffix(".probe.html").write_text(text.replace("</body>", PROBE))
    dom = browse(f"--window-size={width},900", "--dump-dom", f"file://{path}".replace(
        ".html", ".probe.html"))  # fmt: skip
    found = re.search(r"<title>PROBE(.*?)</title>", dom)
    assert found, dom[:500]
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A model's page and that of simulated cores."""
    folder = tmp_path_factory.mktemp("pages")
    config, options = ck.GPTConfig.from_name("cerebras-gpt-111m"), {"context": 256}
    model = ck.wafer.estimate(config, grid=(64, 96), **options)
    answers = whatif.of_estimate("gpt", config, (64, 96), ck.wafer.WSE2, **options)
    model.save_html(folder / "model.html", compare=answers)
    cores, _ = simulate("allreduce", "ring", (6, 8), 48, ck.wafer.WSE2, log=100_000)
    answers = whatif.of_collective("allreduce", "ring", (6, 8), 48, ck.wafer.WSE2, "instruction")
    cores.save_html(folder / "cores.html", compare=answers)
    return folder


@pytest.mark.parametrize(
    "name, shape, width",
    [("model", [64, 96], 1200), ("cores", [6, 8], 1200), ("cores", [6, 8], 700)],
)
def test_a_page_shows_everything_within_its_frame(pages, name, shape, width):
    found = probe(pages / f"{name}.html", width)
    assert found["loaded"] == 0 and found["wide"] <= 0 and found["outside"] == []
    assert found["cut"] == 0 or width < 1000  # tables of a narrow window are scrolled
    assert found["images"] == [[*shape, True]] * 5
    assert found["bar"] == pytest.approx(1, abs=0.01)
    assert found["lanes"] > 10 and found["rows"] > 5 and found["bold"] >= 2


def test_a_page_is_drawn_in_colour(pages, tmp_path):
    image = pytest.importorskip("PIL.Image", reason="no Pillow to read the picture with")
    file = tmp_path / "page.png"
    browse("--window-size=1100,1600", f"--screenshot={file}", f"file://{pages / 'cores.html'}")
    pixels = np.asarray(image.open(file).convert("RGB"))
    assert pixels.shape == (1600, 1100, 3)
    colours = np.unique(pixels.astype(np.int32) @ (1 << 16, 1 << 8, 1))
    assert len(colours) > 100 and (pixels.max(2).astype(int) - pixels.min(2)).max() > 100
