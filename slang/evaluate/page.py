"""A run to read: its figures, verdict and answers as text and as a page.

Reads   results/<label>.json
Writes  results/<label>.html: one page without any request to anywhere

Run as: python -m slang.evaluate.page 20251004C     make the page again
"""

import argparse
import json
import sys
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from slang.errors import UserError
from slang.evaluate.quiz import QUIZZES
from slang.evaluate.results import WHO, find, read
from slang.files import replacing

LONGEST = 160  # characters of an answer on a terminal


def show(table: list[dict], names: tuple[str, str] = WHO) -> str:
    """The table as text: losses with their perplexity."""
    lines = [f"{'':50}{names[0]:>10}{names[1]:>10}  difference, 95 % interval{'n':>9}"]
    for row in table:
        interval = f"{row['difference']:+.3f}  [{row['low']:+.3f}, {row['high']:+.3f}]"
        lines.append(f"{row['figure']:50}{row['baseline']:10.3f}{row['adapted']:10.3f}  {interval:28}{row['n']:7}")
        if "ppl" in row:
            lines.append(f"{row['figure'].replace('loss', 'ppl'):50}{row['ppl'][0]:10.1f}{row['ppl'][1]:10.1f}")
        if "ceiling" in row:
            lines.append(f"{'  the base model, told the meanings':50}{row['ceiling']:10.3f}")
    return "\n".join(lines)


def text(result: dict) -> str:
    """What a terminal shows of a run, the verdict last."""
    lines = ["mlx_lm.lora --test, where a pad token counts as a target of every row:"]
    for who in WHO:
        t = result["test"][who]
        pad = f"pad alone {t['pad_loss']:.2f}, {t['pad_share']:.0%} of the sum; without it {t['without_pad']:.3f}"
        lines.append(f"  {who:9} {t['printed']}  {pad}")
    sample = [result["sample"]] if result.get("sample") else []
    lines += ["", show(result["figures"]), *sample, "", *result["odd"], *([""] if result["odd"] else [])]
    for asked in result["asked"]:
        lines += [asked["question"], *(f"  {who:9} {one_line(asked[who])}" for who in WHO)]
    return "\n".join([*lines, *([""] if result["asked"] else []), f"{result['verdict']}: {result['because']}"])


def one_line(answer: str) -> str:
    """An answer as a terminal shows it: a model that never stops fills pages."""
    text = " ".join(answer.split()) or "(empty)"
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def compared(table: list[dict], notes: list[str], labels: tuple[str, str]) -> str:
    """Two runs side by side, and whether they may be compared."""
    said = f"Not like with like: {'; '.join(notes)}." if notes else "Same data, prompt, base model and questions."
    return f"{show(table, labels)}\n\n{said}"


def page(result: dict) -> str:
    """The whole page. Everything from the dictionary or the model is escaped, in the script element too."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    rows = []
    for item in result["items"]:
        quiz = next(name for name in QUIZZES if name in item["quizzes"])
        choices = item["quizzes"][quiz]
        answers = [item[who] for who in WHO]
        sides = [(a["answer"], a["chrf"], a["picks"][quiz] == 0, choices[a["picks"][quiz]]) for a in answers]
        rows.append([item["slang"], item["question"], item["references"], *sides[0], *sides[1], item["seen"]])
    data = json.dumps(rows, ensure_ascii=False).replace("<", "\\u003c").replace("&", "\\u0026")
    curves = {name: points for name, points in result["training"].items() if points}
    most = [max(column) for column in zip(*(point for points in curves.values() for point in points), strict=True)]
    return environment.get_template("page.html").render(r=result, data=data, curves=curves, most=most)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description="Make the pages of runs again.")
    p.add_argument("runs", nargs="+", help="labels (20251004[C] or 20251004C) or JSON files")
    p.add_argument("--results", default="results", help="folder where labels are looked up")
    args = p.parse_args(argv)
    try:
        for path in [find(name, Path(args.results)) for name in args.runs]:
            target = path.with_suffix(".html")
            with replacing(target) as (file,):
                file.write(page(read(path)).encode())
            print(target)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
