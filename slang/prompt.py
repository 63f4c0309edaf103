"""prompt.toml -> chat messages: the one place that decides what the model is told and asked.

No MLX, so that the wrappers' checks start in a tenth of a second. Turn markers are the chat template's business, never
written here.

Run as: python -m slang.prompt system prompt.toml               the system prompt
        python -m slang.prompt question prompt.toml "pura vida" what chat.sh asks: a bare slang becomes a question
        python -m slang.prompt check prompt.toml data/train.jsonl ...   was this data made with this prompt?
"""

import argparse
import hashlib
import json
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from slang import jsonl
from slang.dictionary import Problem, key, special_token, told

Messages = list[dict[str, str]]


class PromptError(ValueError):
    """prompt.toml can't be used; the message names the file and the remedy."""


@dataclass(frozen=True)
class Prompt:
    """`questions` are asked in training, `held_out_questions` by evaluation alone; `answer` holds `{meaning}`."""

    region: str
    system: str
    questions: tuple[str, ...]
    held_out_questions: tuple[str, ...]
    answer: str

    def chat(self, question: str) -> Messages:
        """System and user message for a question that is asked as it stands."""
        return [{"role": "system", "content": self.system}, {"role": "user", "content": question}]

    def ask(self, slang: str, form: int = 0, held_out: bool = False) -> Messages:
        """System and user message that ask for a slang in one question form."""
        forms = self.held_out_questions if held_out else self.questions
        return self.chat(forms[form].replace("{slang}", slang))

    def train(self, slang: str, meaning: str, form: int) -> Messages:
        """System, user and assistant message: one training row."""
        messages = self.ask(slang, form)
        messages.append({"role": "assistant", "content": self.answer.replace("{meaning}", meaning)})
        return messages

    def hash(self) -> str:
        """SHA-256 of what the prompt says: comments and layout of prompt.toml don't count."""
        fields = [self.region, self.system, self.questions, self.held_out_questions, self.answer]
        return hashlib.sha256(json.dumps(fields, ensure_ascii=False).encode()).hexdigest()


def _text(path: str | Path, table: dict, name: str) -> str:
    value = table.get(name)
    if not isinstance(value, str) or not value.strip():
        raise PromptError(f"{path}: no text for '{name}'; write {name} = \"…\"")
    return value


def _forms(path: str | Path, table: dict, name: str, least: int) -> tuple[str, ...]:
    forms = table.get(name)
    if not isinstance(forms, list) or len(forms) < least or not all(isinstance(form, str) for form in forms):
        raise PromptError(f"{path}: '{name}' needs a list of at least {least} question form(s)")
    for form in forms:
        _fields(path, name, form, {"slang", "region"}, "slang")
    return tuple(forms)


def _fields(path: str | Path, name: str, text: str, allowed: set[str], needed: str | None) -> None:
    if token := special_token(text):
        raise PromptError(f"{path}: {name}: special token {token!r} in {text!r}; take it out, the chat template writes them")
    found = set(re.findall(r"\{(\w+)\}", text))
    if unknown := found - allowed:
        raise PromptError(f"{path}: {name}: unknown {{{sorted(unknown)[0]}}} in {text!r}; known: {sorted(allowed)}")
    if needed and needed not in found:
        raise PromptError(f"{path}: {name}: no {{{needed}}} in {text!r}; write it where the text belongs")


def load(path: str | Path = "prompt.toml") -> Prompt:
    """Read and check a prompt.toml. Raises PromptError with the remedy; OSError when it can't be opened."""
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PromptError(f"{path}: not valid TOML: {error}") from None
    region, system, answer = (_text(path, table, name) for name in ("region", "system", "answer"))
    _fields(path, "system", system, {"region"}, None)
    _fields(path, "answer", answer, {"meaning"}, "meaning")
    forms = {name: _forms(path, table, name, 1) for name in ("questions", "held_out_questions")}
    if both := set(forms["questions"]) & set(forms["held_out_questions"]):
        raise PromptError(f"{path}: {both.pop()!r} is both a question and a held-out question; keep it in one of them")
    fill = {name: tuple(form.replace("{region}", region) for form in value) for name, value in forms.items()}
    # Without the break that ends a text in triple quotes: the shell drops it, and chat.sh has to ask as training did.
    system = system.replace("{region}", region).strip()
    return Prompt(region, system, fill["questions"], fill["held_out_questions"], answer)


def question(asked: Prompt, text: str) -> str:
    """The text itself when it is a question (?, ¿ or a quotation in it), else the first question form about it."""
    if re.search(r"[?¿\"“”«»]", text):
        return text
    return asked.ask(text)[-1]["content"]


def differs(asked: Prompt, record: dict) -> str | None:
    """What in a record was not made with this prompt, or None. Of the question only its spelling may vary."""
    system, user, answer = ([None, None, None, *(m["content"] for m in record["messages"])])[-3:]
    if system != asked.system:
        return "another system prompt"
    if not {"slang", "meaning"} <= set(record):
        return None  # made elsewhere: its question and answer are its own
    if answer != asked.train(record["slang"], record["meaning"], 0)[-1]["content"]:
        return "another answer form"
    forms = range(len(asked.questions))
    if key(user) not in {key(asked.ask(record["slang"], form)[-1]["content"]) for form in forms}:
        return "another question form"
    return None


def check(path: str, data: list[str]) -> int:
    """0 when every record of the files was made with the prompt, else 1 and the first that was not."""
    asked = load(path)
    for file in data:
        item = None
        for item in jsonl.records(file):
            if isinstance(item, Problem):
                problem = item
            elif what := differs(asked, item[3]):
                remedy = "run make_jsonl.py and split_jsonl.py again"
                problem = Problem(file, item[0], f"made with {what} than {path} has; {remedy}")
            else:
                continue
            print(problem, file=sys.stderr)
            return 1
        if item is None:
            print(f"{file}: no record in it; run make_jsonl.py and split_jsonl.py first", file=sys.stderr)
            return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description="Show or check what prompt.toml says.")
    p.add_argument("action", choices=("system", "question", "check"))
    p.add_argument("prompt", help="a prompt.toml")
    p.add_argument("rest", nargs="*", help="the text to ask, or the JSONL files to check")
    args = p.parse_args(argv)
    try:
        if args.action == "check":
            return check(args.prompt, args.rest)
        asked = load(args.prompt)
        print(asked.system if args.action == "system" else question(asked, " ".join(args.rest)))
        return 0
    except PromptError as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(told(error), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
