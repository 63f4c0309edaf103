"""make_jsonl.py as a person runs it."""

import json
from collections import Counter

import pytest
from conftest import script


def make(source, *arguments):
    output = source.with_suffix(".jsonl")
    done = script("make_jsonl.py", "--input", source, "--output", output, *arguments)
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()] if output.exists() else []
    return done, rows


def test_a_record_a_line(dictionary):
    done, rows = make(dictionary, "--plain-spelling", "0")
    assert done.returncode == 0 and len(rows) == 7
    assert done.stdout == f"{dictionary.with_suffix('.jsonl')}: 7 records of 3 slangs (0 duplicate, 0 bad lines left out)\n"
    assert rows[1]["meaning"] == rows[1]["messages"][2]["content"] == "Respuesta de quien está bien y contento."
    assert [message["role"] for message in rows[0]["messages"]] == ["system", "user", "assistant"]
    assert len({row["messages"][1]["content"] for row in rows if row["slang"] == "pura vida"}) == 3  # forms rotate


@pytest.mark.parametrize(("forms", "n"), [("2", 14), ("all", 56), ("99", 56)])
def test_forms(dictionary, forms, n):
    _, rows = make(dictionary, "--forms", forms)
    assert len(rows) == len({json.dumps(row) for row in rows}) == n


def test_forms_are_used_alike(tmp_path):
    source = tmp_path / "many.txt"
    source.write_text("".join(f"slang{i}::Meaning number {i}.\n" for i in range(800)), encoding="utf-8")
    _, rows = make(source, "--plain-spelling", "0")
    counts = Counter(row["messages"][1]["content"].replace(row["slang"], "") for row in rows)
    assert len(counts) == 8 and min(counts.values()) > 60


def test_some_questions_are_asked_as_people_type_them(tmp_path):
    source = tmp_path / "many.txt"
    source.write_text("".join(f"Güila Número {i}::Sentido número {i}.\n" for i in range(500)), encoding="utf-8")
    _, rows = make(source, "--plain-spelling", "0.2")
    plain = [row for row in rows if "Güila Número" not in row["messages"][1]["content"]]
    assert 70 < len(plain) < 130 and all("guila numero" in row["messages"][1]["content"] for row in plain)
    assert not any("¿" in row["messages"][1]["content"] for row in plain)
    assert make(source, "--plain-spelling", "0.2")[1] == rows
    assert all(row["slang"].startswith("Güila Número") for row in rows)


def test_every_bad_line_is_told_and_the_output_stays(dictionary):
    output = dictionary.with_suffix(".jsonl")
    output.write_text("earlier\n")
    with dictionary.open("ab") as file:
        file.write(b"no separator\nbirra::\xff\nbirra::Cerveza.<start_of_turn>\n")
    done = script("make_jsonl.py", "--input", dictionary, "--output", output)
    assert done.returncode == 1 and output.read_text() == "earlier\n"
    assert done.stderr.splitlines() == [
        f"{dictionary}:9: no '::' separator; write the line as slang::meaning",
        f"{dictionary}:10: not UTF-8 (byte 8 of the line); save the file as UTF-8",
        f"{dictionary}:11: special token '<start_of_turn>' in the text; take it out",
        f"3 bad line(s); mend them or pass --skip-bad. {output} is unchanged.",
    ]
    assert set(dictionary.parent.iterdir()) == {dictionary, output}


def test_skip_bad_writes_the_good_lines_and_lists_the_bad(dictionary):
    with dictionary.open("a", encoding="utf-8") as file:
        file.write("no separator\nmae::Amigo o conocido al que se le habla con confianza\n")
    done, rows = make(dictionary, "--skip-bad")
    assert done.returncode == 0 and len(rows) == 7 and "(1 duplicate, 1 bad lines left out)" in done.stdout
    assert done.stderr == f"{dictionary}:9: no '::' separator; write the line as slang::meaning\n"
