"""make_jsonl.py as a person runs it."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT, run, script

from slang import prompt

N_FORMS = len(prompt.load(ROOT / "prompt.toml").questions)


def make(source, *arguments):
    """Run it, with a record a line unless other --forms are given."""
    output = source.with_suffix(".jsonl")
    files = ["--input", source, "--output", output]
    done = script("make_jsonl.py", *files, "--forms", "1", *arguments)
    rows = (
        [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
        if output.exists()
        else []
    )
    return done, rows


def test_a_record_a_line(dictionary):
    done, rows = make(dictionary, "--plain-spelling", "0")
    assert done.returncode == 0 and len(rows) == 7
    said = "7 records of 3 slangs (0 duplicate, 0 bad lines left out)"
    assert done.stdout == f"{dictionary.with_suffix('.jsonl')}: {said}\n"
    meaning = "Respuesta de quien está bien y contento."
    assert rows[1]["meaning"] == rows[1]["messages"][2]["content"] == meaning
    assert [message["role"] for message in rows[0]["messages"]] == ["system", "user", "assistant"]
    assert (
        len({row["messages"][1]["content"] for row in rows if row["slang"] == "pura vida"}) == 3
    )  # forms rotate


@pytest.mark.parametrize(("forms", "n"), [("2", 14), ("all", 7 * N_FORMS), ("99", 7 * N_FORMS)])
def test_forms(dictionary, forms, n):
    _, rows = make(dictionary, "--forms", forms)
    assert len(rows) == len({json.dumps(row) for row in rows}) == n


def test_forms_are_used_alike(tmp_path):
    source = tmp_path / "many.txt"
    source.write_text(
        "".join(f"slang{i}::Meaning number {i}.\n" for i in range(100 * N_FORMS)),
        encoding="utf-8",
    )
    _, rows = make(source, "--plain-spelling", "0")
    counts = Counter(row["messages"][1]["content"].replace(row["slang"], "") for row in rows)
    assert len(counts) == N_FORMS and min(counts.values()) > 60


def test_some_questions_are_asked_as_people_type_them(tmp_path):
    source = tmp_path / "many.txt"
    source.write_text(
        "".join(f"Güila Número {i}::Sentido número {i}.\n" for i in range(500)), encoding="utf-8"
    )
    _, rows = make(source, "--plain-spelling", "0.2")
    plain = [row for row in rows if "Güila Número" not in row["messages"][1]["content"]]
    assert 70 < len(plain) < 130 and all(
        "guila numero" in row["messages"][1]["content"] for row in plain
    )
    assert not any("¿" in row["messages"][1]["content"] for row in plain)
    assert make(source, "--plain-spelling", "0.2")[1] == rows
    assert all(row["slang"].startswith("Güila Número") for row in rows)


def test_every_bad_line_is_named_and_the_output_stays(dictionary):
    output = dictionary.with_suffix(".jsonl")
    output.write_text("earlier\n")
    with dictionary.open("ab") as file:
        file.write(b"no separator\nbirra::\xff\nbirra::Cerveza.<start_of_turn>\n")
    done = script("make_jsonl.py", "--input", dictionary, "--output", output)
    assert done.returncode == 1 and output.read_text() == "earlier\n"
    token = (
        "special token '<start_of_turn>' in the text; take it out, the chat template writes them"
    )
    assert done.stderr.splitlines() == [
        f"{dictionary}:9: no '::' separator; write the line as slang::meaning",
        f"{dictionary}:10: not UTF-8 (byte 8 of the line); save the file as UTF-8",
        f"{dictionary}:11: {token}",
        f"3 bad line(s); mend them or pass --skip-bad. {output} is unchanged.",
    ]
    assert set(dictionary.parent.iterdir()) == {dictionary, output}


def test_what_is_bad_when_it_is_filled_in_counts_once(tmp_path):
    text = (ROOT / "prompt.toml").read_text(encoding="utf-8").replace("'{slang}',", "'<{slang}>',")
    (tmp_path / "prompt.toml").write_text(text, encoding="utf-8")
    source = tmp_path / "d.txt"
    source.write_text("eos::Un final.\neos::Un final.\nmae::Amigo.\n", encoding="utf-8")
    more = ["--forms", "all", "--skip-bad", "--prompt", tmp_path / "prompt.toml"]
    done, _ = make(source, *more)
    said = f"{N_FORMS} records of 1 slangs (0 duplicate, 2 bad lines left out)\n"
    assert done.returncode == 0 and done.stdout.endswith(said)


def test_records_in_a_pipe_are_records_only(dictionary):
    done = script("make_jsonl.py", "--input", dictionary, "--output", "/dev/stdout")
    assert done.returncode == 0 and done.stderr.startswith("/dev/stdout: 21 records")
    assert [json.loads(line)["slang"] for line in done.stdout.splitlines()]


def test_skip_bad_writes_the_good_lines_and_lists_the_bad(dictionary):
    with dictionary.open("a", encoding="utf-8") as file:
        file.write("no separator\nmae::Amigo o conocido al que se le habla con confianza\n")
    done, rows = make(dictionary, "--skip-bad")
    assert done.returncode == 0 and len(rows) == 7
    assert "(1 duplicate, 1 bad lines left out)" in done.stdout
    problem = "no '::' separator; write the line as slang::meaning"
    assert done.stderr == f"{dictionary}:9: {problem}\n"


def test_a_hundred_thousand_bad_lines_are_counted(tmp_path):
    source = tmp_path / "d.txt"
    source.write_text("mae\n" * 100_000)
    done, _ = make(source)
    *first, more, last = done.stderr.splitlines()
    assert done.returncode == 1 and len(first) == 20 and first[19].startswith(f"{source}:20: ")
    assert more == "... and 99980 more like these"
    assert last.startswith("100000 bad line(s); mend them or pass --skip-bad. ")


def test_a_hundred_thousand_times_the_same_line(tmp_path):
    source = tmp_path / "d.txt"
    source.write_bytes(b"mae::Amigo.\n" * 10**5)
    done, rows = make(source)
    assert len(rows) == 1 and "(99999 duplicate, 0 bad lines left out)" in done.stdout


def test_a_slang_that_makes_a_special_token_of_a_form_is_a_bad_line(tmp_path):
    source, toml = tmp_path / "d.txt", tmp_path / "prompt.toml"
    source.write_text("mae::Amigo.\nend_of_turn::Final.\n")
    text = (ROOT / "prompt.toml").read_text(encoding="utf-8")
    toml.write_text(text.replace("'{slang}',", "'<{slang}>',"), encoding="utf-8")
    done, rows = make(source, "--prompt", toml, "--forms", "all")
    assert done.returncode == 1 and not rows
    why = "special token '<end_of_turn>' in the text; take it out, the chat template writes them"
    assert done.stderr.startswith(f"{source}:2: the question '<end_of_turn>': {why}\n1 bad line")


@pytest.mark.parametrize("text", ["", "# nota\n#\n\n"])
def test_no_line_at_all(tmp_path, text):
    source = tmp_path / "d.txt"
    source.write_text(text)
    done, _ = make(source)
    assert done.returncode == 1
    assert done.stderr == f"{source}: no usable line; write one slang::meaning a line\n"


LINK = "take the link away or name another"
PLACE = "name another place"
OUTPUT_IS_INPUT = "the output is the input; name another --output"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--input {d}/nothere", "{d}/nothere: No such file or directory; check the name"),
        ("--input ", "'': No such file or directory; check the name"),
        ("--input {d}", "{d}: not a regular file; name another"),
        ("--input {d}/pipe", "{d}/pipe: not a regular file; name another"),
        ("--input {d}/loop", "{d}/loop: Too many levels of symbolic links; " + LINK),
        ("--output {d}/d.txt", "{d}/d.txt: " + OUTPUT_IS_INPUT),
        ("--output {d}/soft", "{d}/soft: " + OUTPUT_IS_INPUT),
        ("--output {d}/hard", "{d}/hard: " + OUTPUT_IS_INPUT),
        ("--output {d}", "{d}: a folder; name a file"),
        ("--output {d}/new/", "{d}/new/: a folder; name a file"),
        ("--output ", "'': a folder; name a file"),
        ("--output {d}/d.txt/o", "{d}/d.txt/o: {d}/d.txt is no folder; name another place"),
        ("--output {d}/dangling/o", "{d}/dangling/o: {d}/dangling is no folder; " + PLACE),
        ("--output {d}/fixed", "{d}/fixed: write-protected; chmod u+w it or name another"),
        ("--prompt {d}/nothere", "{d}/nothere: No such file or directory; check the name"),
        ("--prompt {d}", "{d}: not a regular file; name another"),
    ],
)  # fmt: skip
def test_a_name_of_something_else(tmp_path, arguments, message):
    (tmp_path / "d.txt").write_text("mae::Amigo.\n")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "soft").symlink_to("d.txt")
    (tmp_path / "hard").hardlink_to(tmp_path / "d.txt")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "fixed").touch(0o444)
    before = sorted(tmp_path.iterdir())
    names = {"--input": f"{tmp_path}/d.txt", "--output": f"{tmp_path}/o"}
    flag, _, value = arguments.format(d=tmp_path).partition(" ")
    names[flag] = value
    done = script("make_jsonl.py", *(part for pair in names.items() for part in pair))
    assert (done.returncode, done.stderr) == (1, message.format(d=tmp_path) + "\n")
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "d.txt").read_text() == "mae::Amigo.\n"


def test_an_unreadable_file(tmp_path):
    source = tmp_path / "d.txt"
    source.touch(0)
    command = [
        sys.executable,
        ROOT / "make_jsonl.py",
        "--input",
        source,
        "--output",
        tmp_path / "o",
    ]
    if os.geteuid() == 0:
        command = ["setpriv", "--bounding-set=-all", *command]
        if not shutil.which("setpriv"):
            pytest.skip("root reads every file, and there is no setpriv")
    done = run(*command)
    reason = "Permission denied; change its permissions or name another"
    assert (done.returncode, done.stderr) == (1, f"{source}: {reason}\n")


# A disk of its own at $1, mounted as $2 says; the command follows.
DISK = """mount -t tmpfs -o size=64k none "$1" && echo earlier >"$1/x" || exit 99
mount -o "remount,$2" "$1"; disk=$1; shift 2; "$@"; code=$?; ls -A "$disk"; cat "$disk/x"
exit $code"""


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("rw", "No space left on device; make room and run this again"),
        ("ro", "Read-only file system; name a folder that can be written"),
    ],
)
@pytest.mark.parametrize("command", ["make", "split"])
def test_a_disk_that_takes_no_more(tmp_path, options, reason, command):
    namespace = ["unshare", "-rm"]
    if not shutil.which("unshare") or subprocess.run([*namespace, "true"]).returncode:
        pytest.skip("no namespaces here")
    disk, source = tmp_path / "disk", tmp_path / "d.txt"
    disk.mkdir()
    source.write_text("".join(f"mae {i // 4}::Amigo {i}.\n" for i in range(2000)))
    flags = ["--input", source, "--output", disk / "x"]
    if command == "split":
        make(source)
        names = ("train", "valid", "test", "eval")
        outputs = [part for name in names for part in (f"--{name}", disk / f"{name}.jsonl")]
        flags = ["--input", tmp_path / "d.jsonl", *outputs]
    started = [sys.executable, f"{command}_jsonl.py", *flags]
    done = run(*namespace, "sh", "-c", DISK, "sh", disk, options, *started)
    target = disk / ("x" if command == "make" else "train.jsonl")
    assert (done.returncode, done.stderr) == (1, f"{target}: {reason}\n")
    assert done.stdout == "x\nearlier\n"


def test_a_full_device():
    done = script("make_jsonl.py", "--input", ROOT / "data/demo.txt", "--output", "/dev/full")
    reason = "No space left on device; make room and run this again"
    assert (done.returncode, done.stderr) == (1, f"/dev/full: {reason}\n")


def test_the_environment_names_the_files_from_wherever_one_stands(tmp_path, dictionary):
    with dictionary.open("a", encoding="utf-8") as file:
        file.writelines(f"birra::Sentido {i} de la palabra.\n" for i in range(50))
    environment = {"DATA": str(tmp_path / "data"), "DICTIONARY": str(dictionary)}
    for command in ("make_jsonl.py", "split_jsonl.py"):
        done = run(sys.executable, ROOT / command, cwd=tmp_path, **environment)
        assert done.returncode == 0, done.stderr
    names = {"source_augmented", "train", "valid", "test", "eval"}
    assert {path.stem for path in (tmp_path / "data").iterdir()} == names
    done = script("make_jsonl.py", "--output", tmp_path / "o", **environment)
    assert done.stdout.startswith(f"{tmp_path}/o: 171 records of 4 slangs")  # a flag goes before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--forms 0", "argument --forms: '0' is neither 'all' nor a number from 1"),
        ("--forms some", "argument --forms: 'some' is neither 'all' nor a number from 1"),
        ("--forms 1.5", "argument --forms: '1.5' is neither 'all' nor a number from 1"),
        ("--plain-spelling 2", "argument --plain-spelling: '2': give a number from 0 to 1"),
        ("--plain-spelling nan", "argument --plain-spelling: 'nan': give a number from 0 to 1"),
    ],
)
def test_a_flag_of_another_value(arguments, message):
    done = script("make_jsonl.py", *arguments.split())
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"make_jsonl.py: error: {message}"
