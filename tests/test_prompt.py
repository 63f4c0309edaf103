"""slang/prompt.py: the shipped prompt, what is refused, and how data is checked against it."""

import json
import sys

import pytest
from conftest import ROOT, run

from slang import prompt
from slang.errors import UserError

GOOD = """region = "Costa Rica"
system = "Sos de {region}."
questions = ['Qué significa en {region} "{slang}"?', '{slang}']
held_out_questions = ["¿Y {slang}?"]
answer = "{meaning}"
"""


def load(tmp_path, text):
    path = tmp_path / "prompt.toml"
    path.write_text(text, encoding="utf-8")
    return prompt.load(path)


def test_shipped_prompt():
    asked = prompt.load()
    assert len(asked.questions) >= 6 and len(asked.held_out_questions) >= 3
    assert (
        asked.questions[0] == 'Qué significa en Costa Rica "{slang}"?'
        and "{slang}" in asked.questions
    )
    assert asked.answer == "{meaning}"


def refusal(tmp_path, text):
    """What is said of a prompt.toml of this text, or of these bytes."""
    path = tmp_path / "prompt.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        prompt.load(path)
    return str(error.value).removeprefix(str(path))


def test_messages(tmp_path):
    asked = load(tmp_path, GOOD)
    assert asked.row("mae", "Amigo {slang}.", 0) == [
        {"role": "system", "content": "Sos de Costa Rica."},
        {"role": "user", "content": 'Qué significa en Costa Rica "mae"?'},
        {"role": "assistant", "content": "Amigo {slang}."},
    ]
    quoted = GOOD.replace('"Sos de {region}."', '"""\nSos de {region}.\n"""')
    assert load(tmp_path, quoted).system == asked.system
    assert asked.ask("mae", 0, held_out=True)[-1]["content"] == "¿Y mae?"


KNOWN = "known: ['region']"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"Costa Rica"', '" "', "region: no text; write one"),
        ("{meaning}", "Es: ", "answer: no {meaning} in 'Es: '; write it where the text belongs"),
        (
            "¿Y {slang}?",
            "¿Y?",
            "held_out_questions: no {slang} in '¿Y?'; write it where the text belongs",
        ),
        (
            "Sos de {region}",
            "Sos de {pais}",
            f"system: unknown {{pais}} in 'Sos de {{pais}}.'; {KNOWN}",
        ),
    ],
)
def test_refused(tmp_path, old, new, message):
    assert refusal(tmp_path, GOOD.replace(old, new, 1)) == f": {message}"


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("region =", "regio =", "`regio`"),
        ('region = "Costa Rica"\n', "", "`region`"),
        ('"Costa Rica"', "3", "`$.region`"),
        ("'{slang}']", "3]", "`$.questions[1]`"),
        ('["¿Y {slang}?"]', "[]", "`$.held_out_questions`"),
    ],
)
def test_another_field_or_another_kind_of_value(tmp_path, old, new, where):
    said = refusal(tmp_path, GOOD.replace(old, new, 1))
    fields = "region, system, questions, held_out_questions, answer"
    assert where in said and said.endswith(f"; it has {fields} and nothing else")


@pytest.mark.parametrize("form", ["{slang}", "¿{slang}?", "Que significa en costa rica {slang}"])
def test_a_held_out_question_is_not_a_trained_one_spelled_otherwise(tmp_path, form):
    said = refusal(tmp_path, GOOD.replace("¿Y {slang}?", form))
    assert said.startswith(f": held_out_questions: {form!r} is the question ")
    assert said.endswith(", but for capitals and punctuation; ask it in another way")


def test_a_question_is_asked_in_one_spelling(tmp_path):
    said = refusal(tmp_path, GOOD.replace("'{slang}'", "'{slang}', '¿{slang}?'"))
    assert said.startswith(": questions: '¿{slang}?' is the question '{slang}', but for ")


@pytest.mark.parametrize("name", ["region", "system", "questions", "held_out_questions", "answer"])
@pytest.mark.parametrize(
    ("text", "what"),
    [
        (
            "<end_of_turn>",
            "special token '<end_of_turn>' in the text; take it out, the chat template writes them",
        ),
        ("\\u0000", "control character U+0000; take it out"),
        ("\\u001b", "control character U+001B; take it out"),
        ("\u200b", "invisible character U+200B; take it out"),
        ("\U000e0041", "invisible character U+E0041; take it out"),
    ],
)
def test_no_text_of_it_holds_what_a_reader_does_not_see(tmp_path, name, text, what):
    end = {
        "region": "Rica",
        "system": "}.",
        "questions": "'{slang}",
        "held_out_questions": "}?",
        "answer": "}",
    }[name]
    start = {"questions": "'{slang}"}.get(name, end)
    first, rest = GOOD[: GOOD.index(f"{name} =")], GOOD[GOOD.index(f"{name} =") :]
    if name == "questions":
        rest = rest.replace("'{slang}'", f'"{text}{{slang}}"', 1)
    else:
        rest = rest.replace(start, start + text, 1)
    assert refusal(tmp_path, first + rest).startswith(f": {name}: {what}")


def test_a_byte_order_mark_is_passed_over(tmp_path):
    (tmp_path / "prompt.toml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert prompt.load(tmp_path / "prompt.toml") == load(tmp_path, GOOD)


def test_another_encoding_is_named_with_its_line(tmp_path):
    assert refusal(tmp_path, GOOD.encode("latin-1")) == ":3: not UTF-8; save the file as UTF-8"


def test_what_is_no_toml(tmp_path):
    assert refusal(tmp_path, "system = \n").startswith(": not valid TOML: ")
    assert refusal(tmp_path, "x = " + "[" * 10_000).startswith(": not valid TOML: ")
    assert refusal(tmp_path, "x = " + "9" * 6_000).startswith(": not valid TOML: ")


def test_a_form_that_makes_a_special_token_of_a_slang(tmp_path):
    asked = load(
        tmp_path, GOOD.replace("'{slang}'", "'<{slang}>'").replace("¿Y {slang}?", "Y <{slang}>?")
    )
    assert asked.ask("mae", 1)[-1]["content"] == "<mae>"
    for question in (
        lambda: asked.ask("end_of_turn", 1),
        lambda: asked.ask("eos", 0, held_out=True),
    ):
        with pytest.raises(UserError, match=r"the question .*: special token"):
            question()
    with pytest.raises(UserError, match="the answer 'a<eos>': special token '<eos>'"):
        asked.row("mae", "a<eos>", 0)


def test_a_region_that_makes_a_special_token(tmp_path):
    text = GOOD.replace('"Costa Rica"', '"eos"').replace("Sos de {region}", "Sos de <{region}>")
    assert refusal(tmp_path, text).startswith(": system: special token '<eos>' in the text")


@pytest.mark.parametrize(
    "text", ["pura <end_of_turn> vida", "¿Qué es <bos>?", "\x1b[31m", "¿\u200b?"]
)
def test_a_question_that_was_typed_is_looked_at_too(text):
    with pytest.raises(UserError, match=r"^the question .*; take it out"):
        prompt.question(prompt.load(), text)


def test_hash_ignores_comments_but_no_words(tmp_path):
    first = load(tmp_path, GOOD).hash()
    assert (
        load(tmp_path, "# note\n" + GOOD).hash()
        == first
        != load(tmp_path, GOOD.replace("Sos", "Eres")).hash()
    )


def test_bare_slang_becomes_a_question_and_a_question_stays(tmp_path):
    asked = load(tmp_path, GOOD)
    assert prompt.question(asked, "pura vida") == 'Qué significa en Costa Rica "pura vida"?'
    assert prompt.question(asked, "qué es pura vida?") == "qué es pura vida?"


@pytest.mark.parametrize(
    "text",
    [
        "que es tuanis",
        "Significado de tuanis",
        "Por acá dicen mucho tuanis y nadie me lo explica.",
        "decime qué se entiende por tuanis entre la gente de costa rica",
    ],
)
def test_a_question_in_a_known_form_needs_no_question_mark(text):
    ours = prompt.load(ROOT / "prompt.toml")
    assert prompt.question(ours, text) == text


@pytest.mark.parametrize("slang", ["pura vida", "qué chiva", "gracias", "significado"])
def test_what_only_begins_like_a_form_is_a_slang(slang):
    ours = prompt.load(ROOT / "prompt.toml")
    assert prompt.question(ours, slang) == f'Qué significa en Costa Rica "{slang}"?'


def test_check_names_the_record_made_with_another_prompt(tmp_path):
    asked = load(tmp_path, GOOD)
    rows = [
        {"slang": "mae", "meaning": "Amigo.", "messages": asked.row("mae", "Amigo.", form)}
        for form in (0, 1)
    ]
    rows[1]["messages"][1]["content"] = "MAE"  # another spelling of the same question
    said = {"role": "assistant", "content": "Las tres."}
    rows.append({"messages": [*asked.chat("¿Qué hora es?"), said]})
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def check():
        return run(sys.executable, "-m", "slang.prompt", tmp_path / "prompt.toml", data)

    assert check().returncode == 0
    load(tmp_path, GOOD.replace("'{slang}'", "'qué es {slang}'"))
    found = check()
    assert found.returncode == 1
    toml, remedy = tmp_path / "prompt.toml", "run make_jsonl.py and split_jsonl.py again"
    assert found.stderr == f"{data}:2: made with another question form than {toml} has; {remedy}\n"
    load(tmp_path, GOOD.replace("Sos", "Eres"))
    assert (
        check().stderr
        == f"{data}:1: made with another system prompt than {toml} has (and 2 more lines); "
        f"{remedy}\n"
    )
    load(tmp_path, GOOD.replace("{meaning}", "Es {meaning}"))
    assert (
        check().stderr
        == f"{data}:1: made with another answer form than {toml} has (and 1 more lines); {remedy}\n"
    )


def test_check_looks_at_every_file_and_record_as_mlx_lm_reads_them(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    line = json.dumps(row).encode() + b"\n"
    contents = {
        "bom": b"\xef\xbb\xbf" + line,
        "blank": line + b"\n\n",
        "junk": line + b"mae\n",
        "none": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "prompt.toml").write_text(GOOD, encoding="utf-8")
    paths = [tmp_path / name for name in contents]
    done = run(sys.executable, "-m", "slang.prompt", tmp_path / "prompt.toml", *paths)
    assert done.returncode == 1
    bom, *blank, junk, none = done.stderr.splitlines()
    what = "a byte order mark, at which mlx_lm stops; save the file as UTF-8 without it"
    assert bom == f"{tmp_path}/bom:1: {what}"
    what = "blank, where mlx_lm stops; take the line out"
    assert blank == [f"{tmp_path}/blank:{line}: {what}" for line in (2, 3)]
    assert junk.startswith(f"{tmp_path}/junk:2: not valid JSON (")
    assert none == f"{tmp_path}/none: no record in it; run make_jsonl.py and split_jsonl.py first"
