"""slang/evaluate/quiz.py: what is asked, and which meanings stand beside one another."""

from collections import Counter

import pytest
from conftest import ROOT
from evaluated import PROMPT, rows

from slang import jsonl
from slang.dictionary import Entry, entries, fold, normalized
from slang.errors import UserError
from slang.evaluate import quiz


def test_unseen_slangs_are_judged_among_themselves_and_one_wording_is_enough():
    train = rows(*((f"t{i}", f"Trenado{i} conocido{i}.") for i in range(8)))
    unseen = rows(*((f"u{i}", f"Nuevo{i} desconocido{i}.") for i in range(6)))
    items = quiz.make_items(PROMPT, train, unseen, seed=3)
    assert [item.seen for item in items] == [True] * 8 + [False] * 6
    for item in items:
        begins = "Trenado" if item.seen else "Nuevo"
        trained, new = (quiz.TRAINED, quiz.TRAINED_CLOSE), (quiz.NEW, quiz.NEW_CLOSE)
        assert all(choice.startswith(begins) for choice in item.candidates())
        assert set(item.quizzes) == set(trained if item.seen else new)
        assert item.references == next(iter(item.quizzes.values()))[:1]


def test_a_slang_without_enough_others_is_not_asked():
    train = rows(*((f"t{i}", f"Trenado{i} conocido{i}.") for i in range(8)))
    unseen = rows(*((f"u{i}", f"Nuevo{i} desconocido{i}.") for i in range(3)))
    items = quiz.make_items(PROMPT, train, unseen, seed=3)
    assert [item.slang for item in items] == [f"t{i}" for i in range(8)]


def test_items_ask_held_out_forms_and_draw_no_meaning_that_is_alike():
    pairs = [(f"s{i}", f"Significado{i} especial{i} distinto{i}.") for i in range(30)]
    pairs += [("yy", "Cerveza helada de botella."), ("zz", "Cerveza helada en botella.")]
    items = quiz.make_items(PROMPT, rows(*pairs), [], seed=7)
    assert len(items) == 32
    assert all(len(set(item.quizzes[quiz.TRAINED])) == 4 for item in items)
    forms = {item.question.replace(item.slang, "{slang}") for item in items}
    assert forms == set(PROMPT.held_out_questions)
    beer = next(item for item in items if item.slang == "yy")
    choices = beer.quizzes[quiz.TRAINED]
    close = beer.quizzes[quiz.TRAINED_CLOSE]
    assert choices[0] == close[0] == "Cerveza helada de botella."
    assert "Cerveza helada en botella." not in choices
    assert "Cerveza helada en botella." in close
    assert quiz.make_items(PROMPT, rows(*pairs), [], seed=7) == items


def test_no_quiz_has_the_right_meaning_twice():
    """Also where two slangs share a wording that no group of synonyms names."""
    pairs = [(f"s{i}", f"Significado{i} especial{i} distinto{i}.") for i in range(8)]
    pairs += [
        ("yy", "Persona con la que uno tiene amistad."),
        ("zz", "persona con la que uno tiene amistad"),
    ]
    for item in quiz.make_items(PROMPT, rows(*pairs), [], seed=7):
        for choices in item.quizzes.values():
            right, *others = map(normalized, choices)
            assert right not in others


def test_slangs_of_one_group_are_no_distractors_of_each_other():
    """Bote, tabo and tarro are a jail; tarro is a face too. Nothing in these wordings is alike."""
    slangs = ["bote", "tabo", "tarro", "jáquima", "birra", "filo", "guaba", "yurro"]
    of = {slang: f"Significado{i} especial{i} distinto{i}." for i, slang in enumerate(slangs)}
    for seed in range(20):
        items = quiz.make_items(PROMPT, rows(*of.items()), [], seed)
        choices = {item.slang: set(item.candidates()) for item in items}
        assert of["tabo"] not in choices["bote"] and of["bote"] not in choices["tabo"], seed
        assert not choices["tarro"] & {of["bote"], of["tabo"], of["jáquima"]}, seed
        assert of["tarro"] not in choices["jáquima"], seed


def test_another_place_has_synonyms_of_its_own(tmp_path):
    path = tmp_path / "synonyms.txt"
    path.write_text("s0 = s1 = s2\n", encoding="utf-8")
    of = {f"s{i}": f"Significado{i} especial{i} distinto{i}." for i in range(6)}
    for seed in range(20):
        items = quiz.make_items(PROMPT, rows(*of.items()), [], seed, path)
        assert not {of["s1"], of["s2"]} & set(items[0].candidates()), seed


def test_too_few_slangs():
    with pytest.raises(UserError, match="3 slangs are too few for 4 choices; add slangs"):
        quiz.make_items(PROMPT, rows(("a", "Uno."), ("b", "Dos."), ("c", "Tres.")), [], 1)


def test_a_sample_keeps_its_slangs_when_one_is_added():
    slangs = [f"s{i}" for i in range(50)]
    few = quiz.sample(slangs, 10, seed=1)
    assert len(few) == 10 and quiz.sample(slangs, None, seed=1) == set(slangs)
    assert len(few - quiz.sample([*slangs, "otro"], 10, seed=1)) <= 1


def test_neutral_questions_are_about_words_that_no_dictionary_line_has():
    text = normalized((ROOT / "data/source_augmented.txt").read_text(encoding="utf-8"))
    assert not [word for phrase in quiz.INVENTED for word in phrase.split()[-1:] if word in text]
    items = quiz.make_items(PROMPT, rows(*((f"s{i}", f"Palabra{i}.") for i in range(6))), [], 1)
    asked = [chat[-1]["content"] for chat in items[0].neutral]
    forms = [question.replace("{region}", PROMPT.region) for question in PROMPT.held_out_questions]
    assert len(set(asked)) == len(quiz.INVENTED) >= 2 * len(forms)
    for form in forms:
        begin = form.partition("{slang}")[0]
        assert any(question.startswith(begin) for question in asked)


def test_control_rows_are_everyday_spanish_without_slang():
    """Phrases only: slangs of one word (azul, gato) are everyday words in another sense too."""
    records = jsonl.read(ROOT / "data/control.jsonl")
    dictionary = entries(ROOT / "data/source_augmented.txt")
    slangs = {normalized(entry.slang) for entry in dictionary if isinstance(entry, Entry)}
    phrases = [f" {slang} " for slang in slangs if len(slang.split()) > 1 and len(slang) > 6]
    assert len(records) >= 60
    assert len({record["messages"][0]["content"] for record in records}) == len(records)
    for record in records:
        assert [message["role"] for message in record["messages"]] == ["user", "assistant"]
        words = normalized(" ".join(message["content"] for message in record["messages"]))
        assert not [phrase for phrase in phrases if phrase in f" {words} "], words


def test_everyday_rows_are_not_those_that_measure_the_damage():
    """No five words in a row of control.jsonl stand in everyday.jsonl, which is trained."""

    def runs(path):
        found = set()
        for record in jsonl.read(path):
            for message in record["messages"]:
                words = normalized(message["content"]).split()
                found |= {tuple(words[n : n + 5]) for n in range(len(words) - 4)}
        return found

    assert not runs(ROOT / "data/everyday.jsonl") & runs(ROOT / "data/control.jsonl")
    assert len(jsonl.read(ROOT / "data/everyday.jsonl")) == 300


def test_no_common_beginning_is_left_to_everyday_questions():
    """A word that begins one everyday question in twenty begins a trained form too."""

    def first_word(question):
        return fold(question).lstrip("¿¡").split()[0]

    everyday = jsonl.read(ROOT / "data/everyday.jsonl")
    begun = Counter(first_word(record["messages"][0]["content"]) for record in everyday)
    common = {word for word, count in begun.items() if count * 20 >= len(everyday)}
    assert common == {"que", "como"}
    assert common <= {first_word(question) for question in PROMPT.questions}
