"""slang/jsonl.py: what may stand in a record, and whether the scripts write what mlx_lm reads."""

import json
from collections import Counter
from functools import cache
from itertools import zip_longest
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.tuner.datasets import create_dataset
from mlx_lm.utils import load_tokenizer

import make_jsonl
import split_jsonl
from slang import jsonl
from slang.dictionary import Entry, entries
from slang.errors import MOST_LISTED, Problem, UserError

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")
SPLITS = ("train", "valid", "test", "eval")
EXAMPLES = 400
many = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


def chat(*contents: object) -> list[dict]:
    roles = jsonl.ROLES[-1][-len(contents) :]
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]


def line(record: object) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode()


def said(*contents: object, **fields: object) -> bytes:
    return line({"messages": chat(*contents), **fields})


# ------------------------------------------------------------------------------ one record

ROLES = "they have to be user, assistant, with or without a system message before them"
CR = "a carriage return inside, at which mlx_lm would begin another line; take it out"
NO_UTF8 = "not UTF-8 (byte {} of the line); save the file as UTF-8"
NO_TEXT = "message has no text; write its content as a string"
HUMAN = [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}]
NO_TOOLS = (
    '"tools", or "prompt" and "completion", beside "messages", which mlx_lm would use as well'
)
TOKEN = "special token '<eos>' in the text; take it out, the chat template writes them"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'{"messages": "\xff"}', NO_UTF8.format(15)),
        (b'{"x": "\xff", "messages": []}', NO_UTF8.format(8)),
        (b'{"a":\r1}', CR),
        (said("a", "b", "c", tools=None), f"{NO_TOOLS}; take them out"),
        (said("a", "b", "c", prompt="a", completion="b"), f"{NO_TOOLS}; take them out"),
        (line({"messages": HUMAN}), f"roles are ['human', 'gpt']; {ROLES}"),
        (line({"messages": []}), f"roles are []; {ROLES}"),
        (said("a", "b", " "), f"the assistant {NO_TEXT}"),
        (said("a", "b", "..."), f"the assistant {NO_TEXT}"),
        (said("a", "", "c"), f"the user {NO_TEXT}"),
        (said("<eos>", "b", "c"), f"the system message: {TOKEN}"),
        (said("a", "b", "c<eos>"), f"the assistant message: {TOKEN}"),
        (said("a", "b\0", "c"), "the user message: control character U+0000; take it out"),
        (said("a", "b\x1b", "c"), "the user message: control character U+001B; take it out"),
        (
            said("a", "b", "\u200b"),
            "the assistant message: invisible character U+200B; take it out",
        ),
        (said("a", "b\u202e", "c"), "the user message: invisible character U+202E; take it out"),
        (said("a", "b", "c", slang="x<eos>"), f'"slang": {TOKEN}'),
        (said("a", "b", "c", slang="x\x1b"), '"slang": control character U+001B; take it out'),
        (said("a", "b", "c", slang="x\n"), '"slang": control character U+000A; take it out'),
        (said("a", "b", "c", meaning="<eos>"), f'"meaning": {TOKEN}'),
    ],
)
def test_what_can_not_be_used(text, problem):
    assert jsonl.parse(text) == problem


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (b"[1]", "array"),
        (b'{"message": []}', "`messages`"),
        (b'{"messages": ["a"]}', "`$.messages[0]`"),
        (said("a", 3, "c"), "`$.messages[1].content`"),
        (b'{"messages": [{"role": "user"}]}', "`content`"),
        (said("a", "b", "c", slang=3), "`$.slang`"),
    ],
)
def test_json_that_is_no_record(text, where):
    found = jsonl.parse(text)
    assert found.startswith("not a chat record (") and where in found
    assert found.endswith('); a record is {"messages": [system, user, assistant]}')


@pytest.mark.parametrize(
    "text",
    [
        b'{"messages": [',
        b"mae",
        b'{"messages": [], "x": NaN}',
        said("a", "?", "b").replace(b"?", b"\\ud83d"),
        b'{"messages": [], "x": "\\ud83d"}',
        b'{"messages": [], "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        said("a", "b", "c") + b" {}",
        b"\x0c" + said("a", "b", "c"),
    ],
)
def test_what_is_no_json(text):
    found = jsonl.parse(text)
    assert found.startswith("not valid JSON (")
    assert found.endswith("); mend it, or write the file again")


def test_what_may_stand_in_a_record():
    """Line breaks in a text, fields that nobody reads, no system message, halves of an emoji."""
    row = {"messages": chat("a\n\tb", "c\nd"), "slang": "e", "source": {"x": [1]}}
    assert jsonl.parse(line(row)) == {"messages": row["messages"], "slang": "e"}
    assert jsonl.answer(jsonl.parse(b" " + said("a", "b", "c"))) == "c"
    assert jsonl.slang({"messages": chat("a", "b", "c")}) == "b"
    halves = said("a", "b", "c?").replace(b"?", b"\\ud83d\\ude00")
    assert jsonl.answer(jsonl.parse(halves)) == "c😀"


def test_another_encoding_is_told_once(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"messages": []}\n' * 9, encoding="utf-16-le")
    assert [*map(str, jsonl.records(path))] == [
        f"{path}:1: UTF-16, not UTF-8; save the file as UTF-8"
    ]


def test_all_files_are_read_before_the_problems_are_told(tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_bytes(said("a", "b", "c") + b"\r\n")
    bad.write_bytes(b"\xef\xbb\xbf" + said("a", "b", "c") + b"\n\n" + b"mae\n" * 1000)
    assert [row["messages"][2]["content"] for row in jsonl.read(good)] == ["c"]
    assert [row.line for rows in jsonl.check([good]) for row in rows] == [1]
    for function, first in (
        (lambda: jsonl.read(bad), 3),
        (lambda: jsonl.check([good, bad, good]), 1),
    ):
        with pytest.raises(UserError) as error:
            function()
        lines = str(error.value).splitlines()
        assert lines[0].startswith(f"{bad}:{first}: ") and len(lines) == MOST_LISTED + 1


# ------------------------------------------------------------------------------------ fuzz

# Text in which what has a meaning to the parser, to JSON or to a tokenizer turns up often.
TOKENS = ["<end_of_turn>", "<bos>", "<start_of_image>", "<unused7>", "[multimodal]"]
SIGNS = [
    "::",
    ":",
    "<",
    ">",
    "#",
    "start_of_turn",
    "\\",
    '"',
    "{",
    "$(x)",
    "e\u0301",
    "ñ",
    "ß",
    "…",
]
CONTROLS = ["\n", "\r", "\t", "\0", "user\n", "\u200b", "\ufeff", "\u2028", "\ud800"]
text = st.sampled_from(TOKENS + SIGNS + CONTROLS) | st.text(max_size=4)
text = st.lists(text, max_size=6).map("".join)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
role = st.sampled_from(["user", "assistant", "system", "model"])
messages = st.lists(st.fixed_dictionaries({"role": role, "content": text | junk}), max_size=4)

legible = st.text(st.characters(categories=("L", "N", "P", "Sm", "Sc", "Zs")), max_size=4)
harmless = st.sampled_from([*SIGNS, "[multimodal", "\u2581", " ", "🇨🇷"]) | legible
harmless = st.lists(harmless, max_size=6).map("".join)
harmless = st.builds("{}{}".format, st.sampled_from("aÉñ3"), harmless)
fair_chats = st.builds(chat, harmless, harmless) | st.builds(chat, harmless, harmless, harmless)
fair = st.fixed_dictionaries({"messages": fair_chats}, optional={"slang": harmless})
chats = st.builds(chat, text, text) | st.builds(chat, text, text, text)
more = {"slang": text | junk, "meaning": text, "tools": junk}
rows = st.fixed_dictionaries({"messages": chats | messages | junk}, optional=more)
GOOD = [{"slang": f"s{i % 9}", "messages": chat(f"¿s{i % 9}?", f"Uso {i}.")} for i in range(40)]
TURNS = {"<bos>": 1, "<start_of_turn>": 2, "<end_of_turn>": 2}


def encoded(line: str) -> bytes:
    return line.encode("utf-8", "surrogatepass")


@cache
def tokenizer():
    return load_tokenizer(ROOT / TINY)


def as_trained(record: dict) -> str:
    """What mlx_lm makes of a record, in text, with what it looks for in a row to know its kind."""
    dataset = create_dataset([record], tokenizer(), SimpleNamespace(mask_prompt=True))
    tokens, offset = dataset.process(dataset[0])
    assert 0 < offset < len(tokens)
    ids = {token: tokenizer().convert_tokens_to_ids(token) for token in TURNS}
    assert {token: tokens.count(ids[token]) for token in TURNS} == TURNS
    return tokenizer().decode(tokens)


@pytest.mark.slow
def test_any_json_is_told_of_or_split_into_what_mlx_lm_reads(tmp_path, record_property):
    """Nothing else is written than what was read, and its turns are those of the template."""
    source, outputs = tmp_path / "all.jsonl", [tmp_path / f"{split}.jsonl" for split in SPLITS]
    flags = [
        part
        for split, path in zip(SPLITS, outputs, strict=True)
        for part in (f"--{split}", str(path))
    ]
    counts = Counter()

    @many
    @given(
        st.lists(fair.map(json.dumps), max_size=4)
        | st.lists((fair | rows | junk).map(json.dumps) | text, max_size=4)
    )
    def check(lines):
        counts["all"] += 1
        good = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in GOOD)
        source.write_bytes(good.encode() + encoded("\n".join(lines)))
        found = list(jsonl.records(source))
        bad = [item for item in found if isinstance(item, Problem)]
        for path in outputs:
            path.unlink(missing_ok=True)
        if bad:
            with pytest.raises(UserError):
                split_jsonl.main(["--input", str(source), *flags])
        else:
            assert split_jsonl.main(["--input", str(source), *flags]) == 0
        assert set(tmp_path.iterdir()) == {source, *(() if bad else outputs)}
        if bad:
            return
        written = []
        for path in outputs[:3]:
            with open(path, encoding="utf-8") as file:  # line by line as mlx_lm reads it
                written += [json.loads(line) for line in file]
        assert sorted(map(repr, written)) == sorted(repr(json.loads(item.text)) for item in found)
        for record in [row for row in written if row not in GOOD]:
            counts["other rows"] += 1
            said = [message["content"].strip() for message in record["messages"]]
            if "\u2581" in "".join(said):
                continue  # Gemma's sign for a space: the tokenizer gives a space back
            system = record["messages"][0]["content"] + "\n\n" if len(said) == 3 else ""
            user = f"<bos><start_of_turn>user\n{system}{said[-2]}<end_of_turn>\n"
            assert as_trained(record) == user + f"<start_of_turn>model\n{said[-1]}<end_of_turn>\n"

    check()
    record_property("fuzz examples", counts["all"])
    assert counts["other rows"] > EXAMPLES / 4


@pytest.mark.slow
def test_any_bytes_between_good_lines_lose_none_of_them(tmp_path, record_property):
    source, output = tmp_path / "d.txt", tmp_path / "d.jsonl"
    good = [(f"modismo {i}", f"Uso número {i} de la palabra.") for i in range(7)]
    counts = Counter()

    @many
    @given(
        st.lists(
            st.binary(max_size=30)
            | st.builds("{}::{}".format, harmless, harmless | text).map(encoded)
            | text.map(encoded),
            max_size=6,
        )
    )
    def check(lines):
        counts["all"] += 1
        parts = [
            part
            for pair, line in zip_longest(good, lines, fillvalue=b"")
            for part in ("::".join(pair).encode(), line)
        ]
        source.write_bytes(b"\n".join(parts))
        assert make_jsonl.main(["--input", str(source), "--output", str(output), "--skip-bad"]) == 0
        rows = [item.record for item in jsonl.records(output)]  # a Problem has none
        told = {(row["slang"], row["meaning"]) for row in rows}
        read = {(e.slang, e.meaning) for e in entries(source) if isinstance(e, Entry)}
        assert set(good) <= told == read
        for row in rows:
            if (row["slang"], row["meaning"]) not in good and "\u2581" not in row["meaning"]:
                counts["other rows"] += 1
                end = f"<start_of_turn>model\n{row['meaning']}<end_of_turn>\n"
                assert as_trained(row).endswith(end)

    check()
    record_property("fuzz examples", counts["all"])
    assert counts["other rows"] > EXAMPLES / 4
