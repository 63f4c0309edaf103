"""README.md and docs/ say what is so now."""

import ast
import errno
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, run

# Of the tables of flags in README.md, in their order.
PROGRAMS = [["make_jsonl.py"], ["split_jsonl.py"]]
PROGRAMS += [["-m", f"slang.{step}"] for step in ("train", "evaluate", "chat", "export")]
FOLDERS = ("adapters", "benchmarks", "data", "docs")  # results and models may lie beside them
PAGES = [ROOT / "README.md", *(page for name in FOLDERS for page in (ROOT / name).glob("*.md"))]


def test_figures_are_of_this_code():
    done = run(sys.executable, ROOT / "docs/figures.py", "--check")
    assert (done.returncode, done.stderr) == (0, "")


def headings(page: Path) -> set[str]:
    """As links name them: `## Which size?` is which-size."""
    titles = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere():
    for page in PAGES:
        links = re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8"))
        for target, heading in links:
            there = page.parent / target if target else page
            assert there.exists(), f"{page.name}: {target}"
            assert not heading or heading in headings(there), f"{page.name}: {target}#{heading}"


def test_flags_that_readme_names_exist():
    """Each table of flags names those of its step's program."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| flag .*\n((?:\|.*\n)+)", text, re.MULTILINE)
    for program, table in zip(PROGRAMS, tables, strict=True):
        known = run(sys.executable, *program, "--help").stdout
        for flag in re.findall(r"`(--[a-z-]+)", table):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", known), f"{program[-1]}: {flag}"


def constant_parts() -> Iterator[str]:
    """What the sources print whatever the values are: string literals, cut at what is filled in."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("slang/**/*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if is_text and node not in docstrings:
                yield node.value
    for path in ROOT.glob("*.sh"):
        text = path.read_text(encoding="utf-8").replace('" \\\n      "', " ")
        for quoted in re.findall(r'"([^"\n]*)"', text):
            yield from re.split(r"\$\{?\w+\}?", quoted)
    yield os.strerror(errno.ENOSPC)


def unexplained(message: str, parts: list[str]) -> list[str]:
    """The words of a message that are in none of these parts and look like no value."""
    for part in sorted(parts, key=len, reverse=True):
        message = message.replace(part, " | ")
    return re.findall(r"(?<![\w./-])[a-záéíóúñ]{3,}(?![\w./-])", message)


@pytest.fixture(scope="module")
def parts() -> list[str]:
    """Those of two words and more, for single ones would explain any sentence; and what stands
    between two values, such as `than`."""
    every = set(constant_parts())
    tails = {part.partition(", ")[2] for part in every}  # the page leaves out how some begin
    words = {part.strip(" :;(") for part in every | tails if re.search(r"\w\W+\w", part)}
    return [*words, *(part for part in every if re.fullmatch(r" \w+ ", part))]


def test_messages_of_the_table_can_be_printed(parts):
    text = (ROOT / "docs/when-it-stops.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `+ ?(.*?) ?`+ \|", text, re.MULTILINE)
    assert len(shown) == 10  # as the page says
    for message in shown:
        assert not unexplained(message, parts), message


def test_another_message_could_not(parts):
    told = "not UTF-8 (byte 10 of the line); save the file as UTF-8"
    assert unexplained(told, parts) == []
    assert unexplained(told.replace("save", "keep"), parts) == ["keep", "the", "file"]
    assert unexplained("the disk is full", parts) == ["the", "disk", "full"]
