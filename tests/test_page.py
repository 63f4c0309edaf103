"""slang/evaluate/page.py: a run as text, and as a page in a headless Chromium."""

import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run
from evaluated import result
from markupsafe import escape

from slang.evaluate import page, results

EVIL = "<script>document.title='owned'</script>"
BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)


def test_text_has_perplexities_and_the_share_of_the_pad_target():
    text = page.run_text(result())
    pad = "pad alone 9.00, 30% of the sum; without it 1.500"
    assert f"Test loss 2.000, Test ppl 7.389.  {pad}" in text
    assert "¿Pura vida?\n  baseline  (empty)\n  adapted   Saludo.\n" in text
    lines = text.splitlines()
    loss = next(line for line in lines if line.startswith("answer loss, test"))
    ppl = next(line for line in lines if line.startswith("answer ppl, test"))
    assert float(ppl.split()[-1]) == pytest.approx(math.exp(float(loss.split()[4])), rel=0.02)


def test_an_answer_can_not_move_the_cursor():
    assert page.one_line("a\x1b[2J b\n\nc\u202e") == "a\ufffd[2J b c\ufffd"
    assert page.one_line("x" * 1000) == "x" * 160 + "…"


def made_page(folder: Path, actions: str = "", n: int = 8) -> Path:
    """The page of a run with hostile text in it, and a script that acts as a person would."""
    made = result(n, adapted_right=0.8)
    made.items[1].references[0] = made.items[1].adapted.answer = EVIL
    made.items[2].slang = "</script><!--<script>"
    made.items[3].baseline.answer = "<img src=x onerror=document.title='owned'> & co."
    made.spoken[0].question = EVIL
    text = page.page(results.decoded(results.encoded(made)))
    path = folder / "page.html"
    path.write_text(f"{text}<script>{actions}</script>", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def chromium() -> str:
    for name in BROWSERS:
        if shutil.which(name):
            return name
    missing = "no Chromium here; on Debian or Ubuntu: apt install chromium"
    if os.environ.get("CI"):
        pytest.fail(missing)
    return pytest.skip(missing)


def browse(chromium: str, path: Path, *flags: str) -> str:
    """What Chromium prints of a page after its scripts have run."""
    always = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--hide-scrollbars",
        f"--user-data-dir={path.parent / 'profile'}",
    ]
    done = subprocess.run(
        [chromium, *always, *flags, path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def dom(chromium: str, path: Path) -> str:
    """The page's elements."""
    return browse(chromium, path, "--dump-dom")


def test_page_asks_for_nothing_and_is_escaped(tmp_path):
    text = made_page(tmp_path).read_text(encoding="utf-8")
    assert not re.search(r"https?://|<link|@import|url\(|src=(?!x)", text)
    assert EVIL not in text and text.count("<script") == 3 and "a &lt;b&gt;note" in text
    assert str(escape(EVIL)) in text  # the question


def test_page_shows_the_curves_of_the_training_log():
    made = result()
    text = page.page(made)
    assert "train loss</b> 1.000 at the end" in text and text.count("<polyline") == 2
    assert 'class="valid" points="600.0,80.0 "' in text
    made.training = results.Curves([], [(10.0, 2.0), (20.0, 1.0), (30.0, 1.5)])
    text = page.page(made)
    assert text.count("<polyline") == 1
    assert "valid loss</b> 1.500 at the end, lowest 1.000 at iteration 20" in text
    made.training = results.Curves([], [])
    assert "<polyline" not in page.page(made)


def test_page_in_a_browser_renders_and_hostile_text_is_text(chromium, tmp_path):
    shown = dom(chromium, made_page(tmp_path))
    assert "<title>20251004-C: better</title>" in shown
    assert "owned'</script>" not in shown.replace(html.escape(EVIL), "")
    assert shown.count("<article>") == 8 + 1 and "8 of 8" in shown
    assert f"<p>{html.escape(EVIL, quote=False)}</p>" in shown and "&lt;img src=x" in shown
    assert shown.count('<svg class="figure"') == 8 and shown.count("<polyline") == 2
    for kind in ("fixed (5)", "still wrong (1)", "right before and after (2)"):
        assert kind in shown


def test_search_filter_and_sort_work(chromium, tmp_path):
    actions = """
      const seen = [], act = (id, value) => {
        $(id).value = value; $(id).dispatchEvent(new Event("input"));
        const slangs = [...document.querySelectorAll("#answers h3")].map(h => h.firstChild.data);
        seen.push($("count").textContent + " " + slangs.join(" "));
      };
      act("search", "MODISMO5"); act("search", "ONERROR"); act("search", "");
      act("filter", "kept"); act("filter", ""); act("sort", "worst"); act("search", "nada que ver");
      document.body.append(Object.assign(document.createElement("pre"),
        {id: "seen", textContent: JSON.stringify(seen)}));
    """
    shown = dom(chromium, made_page(tmp_path, actions))
    found = re.search(r'<pre id="seen">(.*?)</pre>', shown, re.DOTALL)[1]
    seen = json.loads(html.unescape(found))
    assert seen[:2] == ["1 of 8 modismo5", "1 of 8 modismo3"]
    assert seen[2].startswith("8 of 8 ")
    assert seen[3] == "2 of 8 modismo0 modismo4"
    assert seen[5].startswith("8 of 8 modismo7 ")
    assert seen[6] == "0 of 8 "


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(
    ("scheme", "background"), [(0, "rgb(20, 23, 27)"), (1, "rgb(251, 250, 248)")]
)
def test_page_fits_wide_and_narrow_dark_and_light(chromium, tmp_path, width, scheme, background):
    """A frame is the phone: Chromium's own window is at least 500 wide."""
    text = html.escape(made_page(tmp_path).read_text(encoding="utf-8"))
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"""<!doctype html><style>* {{ margin: 0; border: 0 }}</style>
        <iframe width={width} height=900 srcdoc="{text}"></iframe>
        <script>onload = () => {{
          const frame = document.querySelector("iframe").contentDocument;
          const out = [...frame.querySelectorAll("body *")]
            .filter(e => e.getBoundingClientRect().right > {width}).map(e => e.outerHTML);
          const colour = getComputedStyle(frame.body).backgroundColor;
          document.title = JSON.stringify([frame.documentElement.scrollWidth, colour, out]);
        }}</script>"""
    )
    shown = browse(chromium, frame, "--dump-dom", f"--blink-settings=preferredColorScheme={scheme}")
    title = re.search(r"<title>(.*?)</title>", shown)[1]
    assert json.loads(html.unescape(title)) == [width, background, []]


def test_pages_are_made_again_from_their_json(tmp_path):
    for label in ("20251004[A]", "20251004-B"):
        (tmp_path / f"{label}.json").write_bytes(results.encoded(result()))
    command = (sys.executable, "-m", "slang.evaluate", "--results", tmp_path, "--page")
    done = run(*command, "20251004A", tmp_path / "20251004-B.json")
    pages = [tmp_path / "20251004[A].html", tmp_path / "20251004-B.html"]
    assert done.stdout == f"{pages[0]}\n{pages[1]}\n"
    for path in pages:
        assert "<!doctype html>" in path.read_text(encoding="utf-8")


def test_a_page_that_can_not_be_made_is_one_line(tmp_path):
    (tmp_path / "20251004-A.json").write_bytes(results.encoded(result()))
    (tmp_path / "20251004-A.html").mkdir()
    command = (sys.executable, "-m", "slang.evaluate", "--results", tmp_path, "--page")
    done = run(*command, "20251004-A")
    name = tmp_path / "20251004-A.html"
    assert (done.returncode, done.stderr) == (1, f"{name}: a folder; name a file\n")


def test_reading_results_loads_no_model():
    code = "import slang.evaluate.command, sys; print(sorted({'mlx', 'jinja2'} & set(sys.modules)))"
    assert run(sys.executable, "-c", code, cwd=ROOT).stdout == "[]\n"
