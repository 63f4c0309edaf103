"""What slang/knowledge.py found, to read: the figures with their intervals, a verdict, a page, and two runs side by side.

Reads   results/<label>.json (and $ADAPTER_PATH/log.jsonl for the loss curve, when knowledge.py makes it)
Writes  results/<label>.html: one page without any request to anywhere

Run as: python -m slang.report results/20251004[C].json                make the page again
        python -m slang.report --compare 20251004A 20251004C           adapted against adapted, paired by slang
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader

WHO = ("baseline", "adapted")
DRAWS = 10_000
HARM = 1.10  # control loss above this many times the baseline's is harm done
SCORES = {
    "choice accuracy": lambda a: a["choice"] == 0,
    "answer chrF": lambda a: a["chrf"],
    "exact answers": lambda a: a["exact"],
}


def ppl(loss: float) -> float:
    """exp(loss), infinite where a float can't hold it."""
    return math.inf if loss > 700 else math.exp(loss)


def finite(value: object) -> object:
    """The same structure with None for every NaN and infinity, which are not JSON."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def figure(name: str, base: tuple, adapted: tuple, seed: int) -> dict:
    """One row of the table: a ratio of sums over slangs for both models, and a 95 % interval of the difference.

    `base` and `adapted` are (numerators, denominators), (slangs,) each. The bootstrap draws slangs, the same for both models.
    """
    columns, n, random = np.array([*base, *adapted], np.float64).T, len(base[0]), np.random.default_rng(seed)
    differences = []
    for _ in range(0, DRAWS, 500):
        draw = random.integers(n, size=(500, n)) + n * np.arange(500)[:, None]
        sums = np.bincount(draw.ravel(), minlength=500 * n).reshape(500, n) @ columns
        differences.append(sums[:, 2] / sums[:, 3] - sums[:, 0] / sums[:, 1])
    low, high = np.percentile(np.concatenate(differences), [2.5, 97.5])
    total = columns.sum(axis=0)
    b, a = float(total[0] / total[1]), float(total[2] / total[3])
    return {"figure": name, "baseline": b, "adapted": a, "difference": a - b, "low": float(low), "high": float(high), "n": n}


def sides(first: dict, second: dict) -> list[tuple]:
    """(NLL, tokens) of the slangs that both {slang: sums} have, for `figure`; a JSON null is a NaN."""
    both = [slang for slang in first if slang in second]
    return [tuple(np.array([side[slang][:2] for slang in both], np.float64).T) for side in (first, second)]


def figures(result: dict) -> list[dict]:
    """The table of a run, losses first; unseen slangs are rows of their own."""
    table = []
    for name, losses in result["losses"].items():
        title = "control loss" if name == "control" else f"answer loss, {name}.jsonl"
        table.append(figure(title, *sides(*(losses[who] for who in WHO)), result["seed"]))
    for seen, suffix in ((True, ""), (False, ", unseen slangs")):
        group = [item for item in result["items"] if item["seen"] == seen]
        for name, score in SCORES.items() if group else ():
            values = [([float(score(item[who])) for item in group], [1.0] * len(group)) for who in WHO]
            table.append(figure(name + suffix, *values, result["seed"]))
    return table


def verdict(result: dict) -> tuple[str, str]:
    """(better, mixed, no better or worse; a line that says why, and what to do)."""
    table = {row["figure"]: row for row in result["figures"]}
    items, control, row = result["items"], table.get("control loss"), table.get("choice accuracy")
    if not all(math.isfinite(r["adapted"]) for r in table.values()):
        return "worse", "the adapted model's loss is not a number: training diverged; train again with a lower --learning-rate"
    if all(i["baseline"]["answer"] == i["adapted"]["answer"] and
           np.allclose(i["baseline"]["choice_nll"], i["adapted"]["choice_nll"], rtol=0, atol=1e-6) for i in items):  # fmt: skip
        return "no better", "the adapter does not change the model's output; train longer, or set ADAPTER_PATH to another"
    says = "{baseline:.3f} -> {adapted:.3f} ({difference:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}"
    because = "choice accuracy " + says.format(**row) + f", {row['n']} slangs)"
    harm = control and control["low"] > 0 and control["adapted"] > HARM * control["baseline"]
    if harm:
        because += f"; everyday Spanish suffers: control loss {control['baseline']:.3f} -> {control['adapted']:.3f}"
        because += f" ({control['adapted'] / control['baseline'] - 1:+.0%}); try a lower --learning-rate or fewer --iters"
    if row["high"] < 0:
        return "worse", because
    if row["low"] > 0:
        return ("mixed" if harm else "better"), because
    return ("worse" if harm else "no better"), because + ("" if harm else "; train longer or on more wordings")


def odd(result: dict) -> list[str]:
    """Answers that are none: empty, or cut off because the model did not stop."""
    counts = [(who, what, sum(map(test, (item[who] for item in result["items"])))) for who in WHO for what, test in
              (("empty", lambda a: not a["answer"]), ("cut off: they never stopped", lambda a: a["capped"]))]  # fmt: skip
    return [f"{who}: {n} of {len(result['items'])} answers {what}" for who, what, n in counts if n]


def show(table: list[dict], names: tuple[str, str] = WHO) -> str:
    """The table as text: losses with their perplexity."""
    lines = [f"{'':34}{names[0]:>12}{names[1]:>12}  difference, 95 % interval{'n':>9}"]
    for row in table:
        interval = f"{row['difference']:+.3f}  [{row['low']:+.3f}, {row['high']:+.3f}]"
        lines.append(f"{row['figure']:34}{row['baseline']:12.3f}{row['adapted']:12.3f}  {interval:28}{row['n']:7}")
        if "loss" in row["figure"]:
            lines.append(f"{row['figure'].replace('loss', 'ppl'):34}{ppl(row['baseline']):12.1f}{ppl(row['adapted']):12.1f}")
    return "\n".join(lines)


def text(result: dict) -> str:
    """What a terminal shows of a run, the verdict last."""
    lines = ["mlx_lm.lora --test, where a pad token counts as a target of every row:"]
    for who in WHO:
        t = result["test"][who]
        lines.append(f"  {who:9} {t['printed']}  pad alone {t['pad_loss']:.2f}, {t['pad_share']:.0%} of the sum; without "
                     f"it {t['without_pad']:.3f}")  # fmt: skip
    lines += ["", show(result["figures"]), *(["", *odd(result)] if odd(result) else []), ""]
    lines += [
        f"{asked['question']}\n  baseline  {asked['baseline']}\n  adapted   {asked['adapted']}" for asked in result["asked"]
    ]
    return "\n".join([*lines, "", f"{result['verdict']}: {result['because']}"])


def log_cells(result: dict) -> list[str]:
    """`baseline -> adapted` of the columns of results/LOG.md: answer ppl, choice accuracy, chrF, control loss."""
    rows = {row["figure"]: row for row in result["figures"]}
    wanted = {
        "answer loss, test.jsonl": "{:.1f}",
        "choice accuracy": "{:.3f}",
        "answer chrF": "{:.1f}",
        "control loss": "{:.3f}",
    }
    said = {name: [ppl(rows[name][w]) if "ppl" in name or name.startswith("answer loss") else rows[name][w] for w in WHO]
            for name in wanted if name in rows}  # fmt: skip
    return [" -> ".join(map(form.format, said[name])) if name in said else "" for name, form in wanted.items()]


def training(path: Path) -> dict[str, list[list[float]]]:
    """{"train": [[iteration, loss], ...], "valid": [...]} of a training log in JSONL; lines that say neither are skipped."""
    curves: dict[str, list[list[float]]] = {"train": [], "valid": []}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            for name, keys in (("train", ("train_loss",)), ("valid", ("val_loss", "valid_loss"))):
                loss = next((float(row[k]) for k in keys if row.get(k) is not None), math.nan)
                if math.isfinite(loss):
                    curves[name].append([float(row.get("iteration", row.get("iter", 0))), loss])
        except (ValueError, TypeError, AttributeError):
            continue
    return curves


def page(result: dict) -> str:
    """The whole page. Everything from the dictionary or the model is escaped, in the script element too."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    rows = []
    for item in result["items"]:
        sides = [
            (s["answer"], s["chrf"], int(s["choice"] == 0), item["choices"][s["choice"]]) for s in (item[who] for who in WHO)
        ]
        rows.append([item["slang"], item["question"], item["references"], *sides[0], *sides[1], int(item["seen"])])
    data = json.dumps(finite(rows), ensure_ascii=False).replace("<", "\\u003c").replace("&", "\\u0026")
    curves = {k: v for k, v in result.get("training", {}).items() if v}
    points = [point for curve in curves.values() for point in curve]
    return environment.get_template("report.html").render(
        r=result, odd=odd(result), data=data, curves=curves, ppl=ppl,
        most=[max(column) for column in zip(*points, strict=True)] or [1, 1])  # fmt: skip


def compare(a: dict, b: dict) -> tuple[list[dict], list[str]]:
    """(the table of b's adapted model against a's, what keeps the two from being like with like)."""
    other = {item["slang"]: item for item in b["items"]}
    pairs = [(item, other[item["slang"]]) for item in a["items"] if item["slang"] in other]
    notes = [f"{what} differ{s}" for what, s, same in (
        ("the prompts", "", a["prompt"]["sha256"] == b["prompt"]["sha256"]), ("the base model", "s", a["model"] == b["model"]),
        ("the seed of the questions", "s", a["seed"] == b["seed"])) if not same]  # fmt: skip
    notes += [f"{name}.jsonl differs" for name in a["data"] if a["data"][name] != b["data"].get(name)]
    if moved := sum(x["choices"] != y["choices"] or x["question"] != y["question"] for x, y in pairs):
        notes.append(f"{moved} of {len(pairs)} slangs were asked another question or with other choices")
    for name, table in (("slangs", a["items"]), ("slangs", b["items"])):
        if len(pairs) < len(table):
            notes.append(f"{len(table) - len(pairs)} {name} of {(a if table is a['items'] else b)['label']} are left out")
    table = []
    for name in a["losses"]:
        if a["data"].get(name) == b["data"].get(name) and name in b["losses"]:
            both = sides(a["losses"][name]["adapted"], b["losses"][name]["adapted"])
            table.append(figure("control loss" if name == "control" else f"answer loss, {name}.jsonl", *both, a["seed"]))
    for name, score in SCORES.items() if pairs else ():
        values = [([float(score(p[side]["adapted"])) for p in pairs], [1.0] * len(pairs)) for side in (0, 1)]
        table.append(figure(name, *values, a["seed"]))
    return table, notes


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description="Make a run's page again, or put two runs side by side.")
    p.add_argument("runs", nargs="*", help="JSON files or labels")
    p.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two labels (20251004[C] or 20251004C) or JSON files")
    p.add_argument("--results", default="results", help="where labels are looked up")
    args = p.parse_args(argv)
    found = {}
    for name in args.compare or args.runs:
        label = re.sub(r"^(\d{8})([A-Z]+)$", r"\1[\2]", name)
        found[name] = path = next((f for f in (Path(name), Path(args.results) / f"{label}.json") if f.is_file()), None)
        if path is None:
            known = ", ".join(sorted(f.stem for f in Path(args.results).glob("*.json"))) or "none"
            print(f"{name}: no such run in {args.results} (there: {known})", file=sys.stderr)
            return 1
    results = [json.loads(found[name].read_text(encoding="utf-8")) for name in args.compare or args.runs]
    if not args.compare:
        for result, name in zip(results, args.runs, strict=True):
            target = found[name].with_suffix(".html")
            target.write_text(page(result), encoding="utf-8")
            print(target)
        return 0
    table, notes = compare(*results)
    if not table:
        print(f"{' and '.join(args.compare)} share no slang and no data: nothing to compare", file=sys.stderr)
        return 1
    print(show(table, tuple(result["label"] for result in results)))
    print("\n" + (f"Not like with like: {'; '.join(notes)}." if notes else "Same data, prompt, base model and questions."))
    return 0


if __name__ == "__main__":
    sys.exit(main())
