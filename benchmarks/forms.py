"""Which questions does an adapter answer rightly, and which not?

Each slang that evaluate.sh would ask is asked in every held-out form of prompt.toml, and in FRESH
ones, which stand in no prompt.toml and were written before an answer to them was read. So they show
what the held-out forms can't show alone, now that a trained form was chosen with an eye on them.
An answer is right when it is a meaning of the slang (exact, or chrF 80).

Prints a Markdown table, the worst form first.

Run as: OPENBLAS_NUM_THREADS=1 python benchmarks/forms.py --model gemma-3-270m \\
            --adapter-path adapters/demo --data data/demo
"""

import sys
from dataclasses import replace
from pathlib import Path

from sacrebleu.metrics import CHRF

sys.path.insert(0, str(Path(__file__).parent.parent))
import adapter

from slang.dictionary import normalized
from slang.evaluate import measure, quiz, scoring
from slang.evaluate.tokens import prompt_tokens, text_of
from slang.models import find
from slang.prompt import Messages

FRESH = (
    'Mi suegra tica dice mucho "{slang}".',
    '¿Cómo se diría "{slang}" con otras palabras?',
    "vieras que no sé qué es eso de {slang}",
    'Explicale "{slang}" a alguien que no es de acá.',
    '¿Por qué en {region} dicen "{slang}"?',
    "Hay algo que no conozco de {region}: {slang}",
    "cómo le digo a un turista qué es {slang}",
    "Me contaron que por ahí se oye {slang}. ¿Y eso?",
)


def right_answers(models: scoring.Models, items: list[quiz.Item], chats: list[Messages]) -> int:
    """How many of the adapted model's answers are a meaning of the slang that they were asked."""
    prompts = prompt_tokens(models.tokenizer, chats)
    questions = [scoring.Question(start, [], generate=True) for start in prompts]
    replies = scoring.ask(models.adapted, models.tokenizer, questions)
    texts = [text_of(models.tokenizer, reply.generated) for reply in replies]
    chrf = CHRF()
    answers = [
        measure.judge_answer(item, text, False, {}, {}, chrf)
        for item, text in zip(items, texts, strict=True)
    ]
    return sum(answer.right for answer in answers)


def main(argv: list[str] | None = None) -> int:
    p = adapter.parser(__doc__)
    p.add_argument("--sample", type=int, help="ask so many slangs; all where it is left out")
    args = p.parse_args(argv)
    its_prompt, items = adapter.items(args)
    some = quiz.sample((normalized(item.slang) for item in items), args.sample, 42)
    items = [replace(item, quizzes={}) for item in items if normalized(item.slang) in some]
    models = scoring.load_models(str(find.find(args.model)), args.adapter_path)

    forms = [(form, "held out") for form in its_prompt.held_out_questions]
    forms += [(form.replace("{region}", its_prompt.region), "fresh") for form in FRESH]
    found = []
    for form, kind in forms:
        chats = [its_prompt.chat(form.replace("{slang}", item.slang)) for item in items]
        right = right_answers(models, items, chats)
        found.append((right, kind, form))
        print(f"{right} of {len(items)}: {form}", file=sys.stderr, flush=True)

    print("| question | | right |\n| --- | --- | ---: |")
    for right, kind, form in sorted(found):
        print(f"| {form} | {kind} | {right / len(items):.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
