"""The choices of every question scored by slang/evaluate, against one by one through mlx_lm.

Both score the same choices with the same adapted model in one process: `mlx_lm.load`, and for each
choice one pass of the model over prompt and choice. The two must agree to 1e-3 nats before their
times count. "arithmetic" is what the choices need in multiply-adds, at the rate at which a 1024 x
1024 float32 product runs here: each prompt once, the embedding at answers. With one thread a second
is one of CPU time.

Run as: OPENBLAS_NUM_THREADS=1 python benchmarks/evaluate.py --model gemma-3-270m \\
            --adapter-path adapters/demo --data data/demo --slangs 62
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm import load

sys.path.insert(0, str(Path(__file__).parent.parent))
import adapter
from slang_step import product_rate

from slang.evaluate import measure, quiz, scoring
from slang.evaluate.tokens import answer_tokens, prompt_tokens
from slang.models import find
from slang.train.shapes import Work

LIMIT = 1e-3  # nats


def one_by_one(net, tokenizer, items: list[quiz.Item]) -> list[list[float]]:
    """Mean NLL in nats of each choice of each item, up to <end_of_turn>."""
    scores = []
    for item in items:
        scores.append([])
        (start,) = prompt_tokens(tokenizer, [item.messages])
        for answer in answer_tokens(tokenizer, item.messages, item.candidates()):
            tokens = [*start, *answer[:-1]]
            logits = net(mx.array([tokens]))[0, len(start) - 1 :].astype(mx.float32)
            chosen = mx.take_along_axis(logits, mx.array(answer)[:, None], axis=-1)[:, 0]
            scores[-1].append((mx.logsumexp(logits, axis=-1) - chosen).mean().item())
    return scores


def questions_of(models: scoring.Models, items: list[quiz.Item]) -> list[scoring.Question]:
    asked = measure.quiz_questions(models.tokenizer, items)
    return [each.question for each in asked if each.purpose == "item"]


def together(models: scoring.Models, items: list[quiz.Item], generate: bool) -> list[list[float]]:
    """The same by slang.evaluate, with the greedy answer too if wanted."""
    questions = questions_of(models, items)
    for question in questions:
        question.generate = generate
    replies = scoring.ask(models.adapted, models.tokenizer, questions)
    return [[float(loss.mean()) for loss in reply.losses] for reply in replies]


def arithmetic(models: scoring.Models, items: list[quiz.Item]) -> float:
    """Seconds that the choices' multiply-adds take at the rate of a product, there alone."""
    work = Work.of(models.adapted)
    questions = questions_of(models, items)
    shared = len(scoring.shared_start(questions))
    needed = 0
    for question in questions:
        own = len(question.prompt) - shared + sum(len(answer) - 1 for answer in question.answers)
        needed += own * work.token + sum(map(len, question.answers)) * work.answer
    return needed / product_rate(time.process_time)


def timed(work: Callable[[], list[list[float]]]) -> tuple[list[list[float]], float, float]:
    """(what it gives, wall seconds, CPU seconds)."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - wall, time.process_time() - cpu


def main(argv: list[str] | None = None) -> int:
    p = adapter.parser(__doc__, data="data")
    p.add_argument("--slangs", type=int, default=200, help="how many slangs of the dictionary")
    args = p.parse_args(argv)
    model = str(find.find(args.model))
    _, items = adapter.items(args)
    total = len(items)
    items = items[:: max(1, len(items) // args.slangs)][: args.slangs]

    models = scoring.load_models(model, args.adapter_path)
    net, tokenizer = load(model, adapter_path=args.adapter_path)
    if mx.default_device() == mx.cpu:
        net.set_dtype(mx.float32)
    one_by_one(net, tokenizer, items[:2])  # both are warm
    theirs, *seconds = timed(lambda: one_by_one(net, tokenizer, items))
    times = {"mlx_lm, one choice at a time": seconds}
    in_numpy = scoring.in_numpy
    for name, generate, numpy in (
        ("slang.evaluate, choices", False, in_numpy),
        ("slang.evaluate, choices and greedy answers", True, in_numpy),
        ("the same with MLX's kernels", True, lambda _: False),
    ):
        scoring.in_numpy = numpy
        ours, *times[name] = timed(lambda generate=generate: together(models, items, generate))
        gap = np.abs(np.concatenate(theirs) - np.concatenate(ours)).max()
        if gap > LIMIT:
            print(f"{name}: {gap:.4f} nats off mlx_lm; its time says nothing", file=sys.stderr)
            return 1
    scoring.in_numpy = in_numpy
    least = arithmetic(models, items)
    times["arithmetic of the choices"] = [least, least]
    n = sum(map(len, theirs))
    print(f"{len(items)} slangs, {n} choices, largest difference {gap:.1e} nats")
    print(f"{'':44}{'wall s':>8}{'cpu s':>8}{'ratio':>8}{'a slang':>9}{f'all {total}':>11}")
    for name, (wall, cpu) in times.items():
        ratio = cpu / seconds[1]
        each = cpu / len(items)
        print(
            f"{name:44}{wall:8.1f}{cpu:8.1f}{ratio:8.2f}{each:7.2f} s{total * each / 60:7.1f} min"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
