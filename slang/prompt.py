"""prompt.toml -> chat messages: the one place that decides what the model is told and asked.

Turn markers are the chat template's business, never written here.

Run as: python -m slang.prompt prompt.toml data/train.jsonl data/valid.jsonl
            can mlx_lm read these files, and were they made with this prompt?
"""

if __name__ == "__main__":
    from slang.errors import program

    program("slang.prompt")

import argparse
import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import msgspec

from slang import files, jsonl
from slang.dictionary import normalized
from slang.errors import Problem, UserError, first_line, listed
from slang.text import checked, unusable

Messages = list[jsonl.Message]
Forms = Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]


class Prompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What prompt.toml says, with `{region}` filled in.

    `questions` are asked in training, `held_out_questions` by evaluation alone; both hold
    `{slang}`, and `answer` holds `{meaning}`.
    """

    region: str
    system: str
    questions: Forms
    held_out_questions: Forms
    answer: str

    def chat(self, question: str) -> Messages:
        """System and user message for a question that is asked as it stands.

        Raises UserError for one that must not reach the chat template.
        """
        # Looked at once it is filled in: "<{slang}>" becomes a special token by some slangs.
        return [
            {"role": "system", "content": self.system},
            {"role": "user", "content": checked(question, f"the question {question!r}")},
        ]

    def ask(self, slang: str, form: int = 0, held_out: bool = False) -> Messages:
        """System and user message that ask for a slang in one question form."""
        forms = self.held_out_questions if held_out else self.questions
        return self.chat(forms[form].replace("{slang}", slang))

    def row(self, slang: str, meaning: str, form: int) -> Messages:
        """System, user and assistant message: one training row."""
        answer = self.answer.replace("{meaning}", meaning)
        checked(answer, f"the answer {answer!r}")
        return [*self.ask(slang, form), {"role": "assistant", "content": answer}]

    def hash(self) -> str:
        """SHA-256 of what the prompt says: comments and layout of prompt.toml don't count."""
        fields = [self.region, self.system, self.questions, self.held_out_questions, self.answer]
        return hashlib.sha256(json.dumps(fields, ensure_ascii=False).encode()).hexdigest()


def load(path: str | Path = "prompt.toml") -> Prompt:
    """Read and check a prompt.toml. Raises UserError with the remedy, OSError when it can't be."""
    text = files.text_of(files.read(path), path)
    try:
        prompt = msgspec.toml.decode(text, type=Prompt)
    except msgspec.ValidationError as error:
        remedy = f"it has {', '.join(Prompt.__struct_fields__)} and nothing else"
        raise UserError(f"{path}: {error}; {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML: {first_line(error)}") from None
    for name, text, fields, needed in _texts(prompt):
        if why := _wrong_fields(text, fields, needed):
            raise UserError(f"{path}: {name}: {why}")
    prompt = _filled(prompt)
    for name, text, *_ in _texts(prompt):
        if why := unusable(text, breaks=name == "system"):
            raise UserError(f"{path}: {name}: {why} ({text!r})")
    known: dict[str, str] = {}
    for name in ("questions", "held_out_questions"):
        for form in getattr(prompt, name):
            if same := known.get(normalized(form)):
                what = f"{form!r} is the question {same!r}, but for capitals and punctuation"
                raise UserError(f"{path}: {name}: {what}; ask it in another way")
            known[normalized(form)] = form
    return prompt


def _texts(prompt: Prompt) -> list[tuple[str, str, set[str], str]]:
    """Each text with its name, the fields that may stand in it, and the one that has to."""
    texts = [("region", prompt.region, set(), ""), ("system", prompt.system, {"region"}, "")]
    for name in ("questions", "held_out_questions"):
        texts += [(name, form, {"slang", "region"}, "slang") for form in getattr(prompt, name)]
    return [*texts, ("answer", prompt.answer, {"meaning"}, "meaning")]


def _wrong_fields(text: str, fields: set[str], needed: str) -> str | None:
    if not text.strip():
        return "no text; write one"
    found = set(re.findall(r"\{(\w+)\}", text))
    if unknown := sorted(found - fields):
        return f"unknown {{{unknown[0]}}} in {text!r}; known: {sorted(fields)}"
    if needed and needed not in found:
        return f"no {{{needed}}} in {text!r}; write it where the text belongs"
    return None


def _filled(prompt: Prompt) -> Prompt:
    """With the region in the place of `{region}`.

    The system prompt loses the line break that ends a text in triple quotes.
    """
    return msgspec.structs.replace(
        prompt,
        system=prompt.system.replace("{region}", prompt.region).strip(),
        questions=tuple(q.replace("{region}", prompt.region) for q in prompt.questions),
        held_out_questions=tuple(
            q.replace("{region}", prompt.region) for q in prompt.held_out_questions
        ),
    )


def _asks(form: str, text: str) -> bool:
    """Whether a text is this form about some slang, but for its spelling."""
    some_slang = "someslang"
    before, *_, after = normalized(form.replace("{slang}", some_slang)).split(some_slang)
    asked = normalized(text)
    return bool(before or after) and asked.startswith(before) and asked.endswith(after)


def question(prompt: Prompt, text: str) -> str:
    """A question as it stands, else the first form about the slang.

    A question has ?, ¿ or quotes, or is in a form of prompt.toml: "qué es tuanis".
    """
    forms = (*prompt.questions, *prompt.held_out_questions)
    is_question = re.search(r"[?¿\"“”«»]", text) or any(_asks(form, text) for form in forms)
    messages = prompt.chat(text) if is_question else prompt.ask(text)
    return messages[-1]["content"]


@lru_cache(maxsize=1000)
def _trained_questions(prompt: Prompt, slang: str) -> set[str]:
    return {normalized(form.replace("{slang}", slang)) for form in prompt.questions}


def differs(prompt: Prompt, record: jsonl.Record) -> str | None:
    """What in a record was not made with this prompt, or None.

    Of the question only its spelling may vary.
    """
    system, user, answer = ([None, *(m["content"] for m in record["messages"])])[-3:]
    if system != prompt.system:
        return "another system prompt"
    if "slang" not in record or "meaning" not in record:
        return None  # made elsewhere: its question and answer are its own
    if answer != prompt.answer.replace("{meaning}", record["meaning"]):
        return "another answer form"
    if normalized(user) not in _trained_questions(prompt, record["slang"]):
        return "another question form"
    return None


def check(path: str, paths: list[str]) -> None:
    """Raise UserError naming lines that mlx_lm can't read, or that another prompt made."""
    prompt = load(path)
    problems = []
    for rows in jsonl.check(paths):
        found = [(row, what) for row in rows if (what := differs(prompt, row.record))]
        if found:
            row, what = found[0]
            more = f" (and {len(found) - 1} more lines)" if len(found) > 1 else ""
            what = f"made with {what} than {path} has{more}"
            remedy = "run make_jsonl.py and split_jsonl.py again"
            problems.append(Problem(row.path, row.line, f"{what}; {remedy}"))
    if problems:
        raise UserError(listed(problems))


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m slang.prompt", description="Were these files made with this prompt?"
    )
    p.add_argument("prompt", help="a prompt.toml")
    p.add_argument("files", nargs="+", help="JSONL files")
    args = p.parse_args(argv)
    check(args.prompt, args.files)
    return 0
