"""README.md and docs/ say what is so now."""

import re
import sys

from conftest import ROOT, run

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_figures_are_of_this_code():
    done = run(sys.executable, ROOT / "docs/figures.py", "--check")
    assert (done.returncode, done.stderr) == (0, "")


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_flags_that_readme_names_exist():
    """Every --flag of a table is known to the program or wrapper of its step."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    sources = [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *ROOT.glob("slang/**/*.py")]
    known = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    known += (
        "--grad-checkpoint --learning-rate --num-layers --batch-size --iters --temp --max-tokens"
    )
    for flag in set(re.findall(r"`(--[a-z-]+)", text)):
        assert flag in known, flag
