"""slang/report.py: figures and verdict, two runs side by side, and the page in a headless Chromium."""

import copy
import html
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, run
from markupsafe import escape

from slang import report

EVIL = "<script>document.title='owned'</script>"


def result(n: int = 40, adapted_right: float = 0.9, control: float = 1.0, seed: int = 0) -> dict:
    """A run over n slangs: the baseline right in a quarter, the adapted model in the given share."""
    random = np.random.default_rng(seed)

    def side(i: int, right: bool) -> dict:
        return {
            "answer": f"Respuesta {i} {right}.",
            "choice": 0 if right else 1 + i % 3,
            "choice_nll": [float(x) for x in random.random(4)],
            "chrf": 80.0 if right else 10.0 + i,
            "exact": right,
            "capped": False,
        }

    items = [
        {
            "slang": f"modismo{i}",
            "question": f'¿Qué es "modismo{i}"?',
            "choices": [f"Bueno {i}.", "Malo.", "Feo.", "Raro."],
            "references": [f"Bueno {i}.", f"Muy bueno {i}."],
            "seen": True,
            "baseline": side(i, i % 4 == 0),
            "adapted": side(i, i < adapted_right * n),
        }
        for i in range(n)
    ]
    losses = {
        name: {
            who: {f"s{i}": [(2.0 if who == "baseline" else level) * 5 + i % 3, 5, 20.0, 7, 9.0] for i in range(n)}
            for who in report.WHO
        }
        for name, level in (("test", 1.0), ("eval", 0.5), ("control", 2.0 * control))
    }
    made = {
        "label": "20251004[C]",
        "note": "a <b>note</b>",
        "model": "models/tiny-gemma3",
        "adapter": {"path": "adapters/tiny", "sha256": "0"},
        "prompt": {"sha256": "p", "system": "Sos."},
        "data": {"train": "a", "test": "b", "eval": "c", "control": "d"},
        "entries": {"slangs": n, "records": 3 * n},
        "seed": 42,
        "test": {
            who: {
                "printed": "Test loss 2.000, Test ppl 7.389.",
                "recomputed": 2.0,
                "pad_share": 0.3,
                "pad_loss": 9.0,
                "without_pad": 1.5,
            }
            for who in report.WHO
        },
        "asked": [{"question": "¿Pura vida?", "baseline": "", "adapted": "Saludo."}],
        "training": {"train": [[0, 3.0], [50, 1.0]], "valid": [[50, 1.5]]},
        "losses": losses,
        "items": items,
    }
    return judged(made)


def judged(made: dict) -> dict:
    made["figures"] = report.figures(made)
    made["verdict"], made["because"] = report.verdict(made)
    return made


# ------------------------------------------------------------------------------------------------ figures and verdict


def test_bootstrap_is_over_slangs():
    """Ten slangs, five of them mended: the interval is that of ten draws."""
    ones = np.ones(10)
    base, adapted = np.zeros(10), np.array([1.0] * 5 + [0.0] * 5)
    row = report.figure("x", (base, ones), (adapted, ones), seed=1)
    assert row["difference"] == 0.5 and row["n"] == 10
    assert row["low"] == pytest.approx(0.2, abs=0.05) and row["high"] == pytest.approx(0.8, abs=0.05)
    weighted = report.figure("x", (np.array([8.0, 1.0]), np.array([4.0, 1.0])), (np.array([4.0, 1.0]), np.array([4.0, 1.0])), 1)
    assert weighted["baseline"] == pytest.approx(9 / 5) and weighted["adapted"] == 1.0


def test_the_four_verdicts_and_what_they_say():
    better = result()
    assert better["verdict"] == "better"
    assert re.fullmatch(
        r"choice accuracy 0\.250 -> 0\.900 \(\+0\.650, 95 % interval \+0\.\d{3} to \+0\.\d{3}, 40 slangs\)", better["because"]
    )
    assert result(adapted_right=0.0)["verdict"] == "worse"
    same = result(adapted_right=0.25)
    assert same["verdict"] == "no better" and "train longer" in same["because"]
    mixed = result(control=1.2)
    assert mixed["verdict"] == "mixed" and "everyday Spanish suffers: control loss 2.19" in mixed["because"]
    assert result(control=1.2, adapted_right=0.25)["verdict"] == "worse"
    assert result(control=1.05)["verdict"] == "better"  # up by less than a tenth


def test_an_adapter_that_changes_nothing_is_told():
    made = result()
    for item in made["items"]:
        item["adapted"] = copy.deepcopy(item["baseline"])
    made = judged(made)
    assert made["verdict"] == "no better" and made["because"].startswith("the adapter does not change the model's output")


def test_a_loss_that_is_no_number_is_worse_and_the_files_stay_valid():
    made = result()
    made["losses"]["test"]["adapted"]["s0"][0] = float("nan")
    made = judged(made)
    assert made["verdict"] == "worse" and "diverged" in made["because"] and "nan" in report.text(made)
    clean = report.finite(made)
    json.dumps(clean, allow_nan=False)
    assert "not a number" in report.page(clean)


def test_empty_and_endless_answers_are_counted():
    made = result()
    made["items"][0]["adapted"]["answer"] = ""
    made["items"][1]["baseline"]["capped"] = made["items"][2]["baseline"]["capped"] = True
    assert report.odd(made) == ["baseline: 2 of 40 answers cut off: they never stopped", "adapted: 1 of 40 answers empty"]
    assert "adapted: 1 of 40 answers empty" in report.text(made)


def test_text_has_perplexities_and_the_share_of_the_pad_target():
    text = report.text(result())
    assert "Test loss 2.000, Test ppl 7.389.  pad alone 9.00, 30% of the sum; without it 1.500" in text
    loss = next(line for line in text.splitlines() if line.startswith("answer loss, test"))
    ppl = next(line for line in text.splitlines() if line.startswith("answer ppl, test"))
    assert float(ppl.split()[-1]) == pytest.approx(np.exp(float(loss.split()[4])), rel=0.02)


def test_training_log_is_read_tolerantly(tmp_path):
    path = tmp_path / "log.jsonl"
    assert report.training(path) == {"train": [], "valid": []}
    path.write_text(
        '{"iteration": 10, "train_loss": 2.5}\n\nnot JSON\n[1]\n{"iteration": 10, "val_loss": 3}\n{"train_loss": null}\n'
    )
    assert report.training(path) == {"train": [[10.0, 2.5]], "valid": [[10.0, 3.0]]}


# ------------------------------------------------------------------------------------------------------------- compare


def compare(folder, *labels):
    return run(sys.executable, "-m", "slang.report", "--results", folder, "--compare", *labels)


def test_compare_pairs_by_slang_and_says_what_differs(tmp_path):
    a, b = result(adapted_right=0.5), result(adapted_right=0.9)
    a["label"], b["label"] = "20251004[A]", "20251004[C]"
    for run_ in (a, b):
        (tmp_path / f"{run_['label']}.json").write_text(json.dumps(run_), encoding="utf-8")
    done = compare(tmp_path, "20251004A", "20251004[C]")
    assert done.returncode == 0 and done.stderr == ""
    row = next(line for line in done.stdout.splitlines() if line.startswith("choice accuracy")).split()
    assert row[2:5] == ["0.500", "0.900", "+0.400"] and row[-1] == "40"
    assert done.stdout.splitlines()[-1] == "Same data, prompt, base model and questions."

    b["prompt"]["sha256"], b["data"]["test"] = "other", "other"
    b["items"], b["items"][0]["question"] = b["items"][:30], "¿Y?"
    (tmp_path / "20251004[C].json").write_text(json.dumps(b), encoding="utf-8")
    done = compare(tmp_path, "20251004A", "20251004C")
    assert done.stdout.splitlines()[-1] == (
        "Not like with like: the prompts differ; test.jsonl differs; 1 of 30 slangs were asked another question or with other "
        "choices; 10 slangs of 20251004[A] are left out."
    )
    assert "answer loss, eval.jsonl" in done.stdout and "answer loss, test.jsonl" not in done.stdout

    done = compare(tmp_path, "20251004A", "20251004B")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"20251004B: no such run in {tmp_path} (there: 20251004[A], 20251004[C])\n"


# ---------------------------------------------------------------------------------------------------------------- page


def made_page(tmp_path, actions: str = "", n: int = 8):
    """The page of a run with hostile text in it, and a script at its end that acts as a person would."""
    made = result(n, adapted_right=0.8)
    made["items"][1]["references"][0] = made["items"][1]["adapted"]["answer"] = EVIL
    made["items"][2]["slang"] = "</script><!--<script>"
    made["items"][3]["baseline"]["answer"] = "<img src=x onerror=document.title='owned'> & co."
    made["asked"][0]["question"] = EVIL
    path = tmp_path / "page.html"
    path.write_text(report.page(report.finite(made)) + f"<script>{actions}</script>", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def chromium():
    names = ("chromium", "chromium-browser", "google-chrome", "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
    found = next((name for name in names if shutil.which(name)), None)
    if not found:
        pytest.skip("no Chromium here; on Debian or Ubuntu: apt install chromium")
    return found


def dom(chromium, path) -> str:
    """The page's elements after its scripts have run."""
    flags = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        f"--user-data-dir={path.parent / 'profile'}",
    )
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    done = subprocess.run(
        [chromium, *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    assert shown.count('<svg class="figure"') == 6 and shown.count("<polyline") == 2
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


def test_page_is_made_again_from_its_json(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(report.finite(result())), encoding="utf-8")
    done = run(sys.executable, "-m", "slang.report", path)
    assert done.stdout == f"{tmp_path / 'x.html'}\n" and "<!doctype html>" in (tmp_path / "x.html").read_text(encoding="utf-8")
    assert not (ROOT / "x.html").exists()
