"""slang/prompt.py: the shipped prompt, what is refused, and how data is checked against it."""

import json

import pytest
from conftest import run

from slang import prompt

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
    assert asked.questions[0] == 'Qué significa en Costa Rica "{slang}"?' and "{slang}" in asked.questions
    assert asked.answer == "{meaning}"


def test_messages(tmp_path):
    asked = load(tmp_path, GOOD)
    assert asked.train("mae", "Amigo {slang}.", 0) == [
        {"role": "system", "content": "Sos de Costa Rica."},
        {"role": "user", "content": 'Qué significa en Costa Rica "mae"?'},
        {"role": "assistant", "content": "Amigo {slang}."},
    ]
    assert load(tmp_path, GOOD.replace('"Sos de {region}."', '"""\nSos de {region}.\n"""')).system == asked.system
    assert asked.ask("mae", 0, held_out=True)[-1]["content"] == "¿Y mae?"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("region =", "regio =", "no text for 'region'; write region = \"…\""),
        ("{meaning}", "Es: ", "answer: no {meaning} in 'Es: '; write it where the text belongs"),
        ("¿Y {slang}?", "¿Y?", "held_out_questions: no {slang} in '¿Y?'; write it where the text belongs"),
        ("¿Y {slang}?", "{slang}", "'{slang}' is both a question and a held-out question; keep it in one of them"),
        ("Sos de {region}", "Sos de {pais}", "system: unknown {pais} in 'Sos de {pais}.'; known: ['region']"),
        ("questions = [", "questions = 3 #", "'questions' needs a list of at least 1 question form(s)"),
    ],
)
def test_refused(tmp_path, old, new, message):
    with pytest.raises(prompt.PromptError) as error:
        load(tmp_path, GOOD.replace(old, new, 1))
    assert str(error.value) == f"{tmp_path / 'prompt.toml'}: {message}"


def test_hash_ignores_comments_but_no_words(tmp_path):
    first = load(tmp_path, GOOD).hash()
    assert load(tmp_path, "# note\n" + GOOD).hash() == first != load(tmp_path, GOOD.replace("Sos", "Eres")).hash()


def test_bare_slang_becomes_a_question_and_a_question_stays(tmp_path):
    asked = load(tmp_path, GOOD)
    assert prompt.question(asked, "pura vida") == 'Qué significa en Costa Rica "pura vida"?'
    assert prompt.question(asked, "qué es pura vida?") == "qué es pura vida?"


def test_check_names_the_record_made_with_another_prompt(tmp_path):
    asked = load(tmp_path, GOOD)
    rows = [{"slang": "mae", "meaning": "Amigo.", "messages": asked.train("mae", "Amigo.", form)} for form in (0, 1)]
    rows[1]["messages"][1]["content"] = "MAE"  # another spelling of the same question
    rows.append({"messages": [*asked.chat("¿Qué hora es?"), {"role": "assistant", "content": "Las tres."}]})
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def check():
        return run("python", "-m", "slang.prompt", "check", tmp_path / "prompt.toml", data)

    assert check().returncode == 0
    load(tmp_path, GOOD.replace("'{slang}'", "'qué es {slang}'"))
    found = check()
    assert found.returncode == 1
    assert found.stderr == (
        f"{data}:2: made with another question form than {tmp_path / 'prompt.toml'} has; "
        "run make_jsonl.py and split_jsonl.py again\n"
    )
