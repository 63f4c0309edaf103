"""slang/evaluate/page.py: a run as text, and as a page in a headless Chromium."""

import html
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, run
from markupsafe import escape
from matplotlib import image
from test_evaluate import result

from slang.evaluate import page, results

EVIL = "<script>document.title='owned'</script>"


def test_text_has_perplexities_and_the_share_of_the_pad_target():
    text = page.text(result())
    assert "Test loss 2.000, Test ppl 7.389.  pad alone 9.00, 30% of the sum; without it 1.500" in text
    assert "¿Pura vida?\n  baseline  (empty)\n  adapted   Saludo.\n" in text
    loss = next(line for line in text.splitlines() if line.startswith("answer loss, test"))
    ppl = next(line for line in text.splitlines() if line.startswith("answer ppl, test"))
    assert float(ppl.split()[-1]) == pytest.approx(math.exp(float(loss.split()[4])), rel=0.02)


def made_page(tmp_path, actions: str = "", n: int = 8):
    """The page of a run with hostile text in it, and a script at its end that acts as a person would."""
    made = result(n, adapted_right=0.8)
    made["items"][1]["references"][0] = made["items"][1]["adapted"]["answer"] = EVIL
    made["items"][2]["slang"] = "</script><!--<script>"
    made["items"][3]["baseline"]["answer"] = "<img src=x onerror=document.title='owned'> & co."
    made["asked"][0]["question"] = EVIL
    path = tmp_path / "page.html"
    path.write_text(page.page(results.finite(made)) + f"<script>{actions}</script>", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def chromium():
    names = ("chromium", "chromium-browser", "google-chrome", "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
    found = next((name for name in names if shutil.which(name)), None)
    if not found:
        pytest.skip("no Chromium here; on Debian or Ubuntu: apt install chromium")
    return found


def browse(chromium, path, *flags) -> str:
    """What Chromium prints of a page after its scripts have run."""
    always = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
    command = [chromium, *always, f"--user-data-dir={path.parent / 'profile'}", *flags, path.as_uri()]
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def dom(chromium, path) -> str:
    """The page's elements."""
    return browse(chromium, path, "--dump-dom")


def test_page_asks_for_nothing_and_is_escaped(tmp_path):
    page = made_page(tmp_path).read_text(encoding="utf-8")
    assert not re.search(r"https?://|<link|@import|url\(|src=(?!x)", page)
    assert EVIL not in page and page.count("<script") == 3 and "a &lt;b&gt;note" in page
    assert str(escape(EVIL)) in page  # the question


def test_page_in_a_browser_renders_and_hostile_text_is_text(chromium, tmp_path):
    shown = dom(chromium, made_page(tmp_path))
    assert "<title>20251004[C]: better</title>" in shown and "owned'</script>" not in shown.replace(html.escape(EVIL), "")
    assert shown.count("<article>") == 8 + 1 and "8 of 8" in shown
    assert f"<p>{html.escape(EVIL, quote=False)}</p>" in shown and "&lt;img src=x" in shown
    assert shown.count('<svg class="figure"') == 8 and shown.count("<polyline") == 2
    assert "fixed (5)" in shown and "still wrong (1)" in shown and "right before and after (2)" in shown


def test_search_filter_and_sort_work(chromium, tmp_path):
    actions = """
      const seen = [], act = (id, value) => {
        $(id).value = value; $(id).dispatchEvent(new Event("input"));
        const slangs = [...document.querySelectorAll("#answers h3")].map(h => h.firstChild.data);
        seen.push($("count").textContent + " " + slangs.join(" "));
      };
      act("search", "MODISMO5"); act("search", "ONERROR"); act("search", ""); act("filter", "kept"); act("filter", "");
      act("sort", "worst"); act("search", "nada que ver");
      document.body.append(Object.assign(document.createElement("pre"), {id: "seen", textContent: JSON.stringify(seen)}));
    """
    shown = dom(chromium, made_page(tmp_path, actions))
    seen = json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', shown, re.DOTALL)[1]))
    assert seen[0] == "1 of 8 modismo5" and seen[1] == "1 of 8 modismo3" and seen[2].startswith("8 of 8 ")
    assert seen[3] == "2 of 8 modismo0 modismo4" and seen[5].startswith("8 of 8 modismo7 ")
    assert seen[6] == "0 of 8 "


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(("scheme", "background"), [("dark", "#14171b"), ("light", "#fbfaf8")])
def test_page_fits_wide_and_narrow_light_and_dark(chromium, tmp_path, width, scheme, background):
    """A frame is the phone, for Chromium's own window is at least 500 wide. The screenshot has the scheme's colour in it."""
    page = html.escape(made_page(tmp_path).read_text(encoding="utf-8"))
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"""<!doctype html><style>* {{ margin: 0; border: 0 }}</style><iframe width={width} height=900 srcdoc="{page}"></iframe>
        <script>onload = () => {{
          const frame = document.querySelector("iframe").contentDocument, all = [...frame.querySelectorAll("body *")];
          const out = all.filter(e => e.getBoundingClientRect().right > {width}).map(e => e.outerHTML);
          document.title = JSON.stringify([frame.documentElement.scrollWidth, out]); }}</script>"""
    )
    title = re.search(r"<title>(.*?)</title>", dom(chromium, frame))[1]
    assert json.loads(html.unescape(title)) == [width, []]
    scheme = f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"
    browse(chromium, frame, scheme, f"--screenshot={tmp_path / 'page.png'}", "--window-size=1280,900")
    pixels = (image.imread(tmp_path / "page.png")[:, :width, :3] * 255).round().astype("uint8")
    assert f"#{bytes(pixels[5, 5].tolist()).hex()}" == background
    assert len({tuple(pixel) for pixel in pixels.reshape(-1, 3)}) > 100  # text, in several colours


def test_page_is_made_again_from_its_json(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(results.finite(result())), encoding="utf-8")
    done = run(sys.executable, "-m", "slang.evaluate.page", path)
    assert done.stdout == f"{tmp_path / 'x.html'}\n" and "<!doctype html>" in (tmp_path / "x.html").read_text(encoding="utf-8")
    assert not (ROOT / "x.html").exists()
    without = run(
        sys.executable, "-c", "import slang.evaluate.page, sys; print(sorted({'mlx', 'transformers'} & set(sys.modules)))"
    )
    assert without.stdout == "[]\n"  # it reads JSON only
