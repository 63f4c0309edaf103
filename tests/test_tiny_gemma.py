"""The shipped models/tiny-gemma3: a Gemma 3 in layout and behaviour, that knows no slang."""

import json
import re
import socket
import struct
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError

from slang import dictionary, prompt
from slang.models.tiny_gemma import build as tiny_gemma
from slang.models.tiny_gemma import rows as tiny_rows
from slang.text import special_token

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models/tiny-gemma3"
ENTRIES = [
    entry
    for entry in dictionary.entries(ROOT / "data/source_augmented.txt")
    if isinstance(entry, dictionary.Entry)
]
PROMPT = prompt.load(ROOT / "prompt.toml")


@pytest.fixture(scope="module")
def loaded():
    """(model, tokenizer) as every mlx_lm command loads them, with the network out of reach."""
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*_):
            raise AssertionError("the tiny model must load without the network")

        patch.setattr(socket.socket, "connect", refuse)
        yield mlx_lm.load(str(MODEL))


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded[1]


@pytest.fixture(scope="module")
def processor():
    return sentencepiece.SentencePieceProcessor(model_file=str(MODEL / "tokenizer.model"))


def read(name: str) -> dict:
    return json.loads((MODEL / name).read_text(encoding="utf-8"))


def tensors() -> dict:
    with open(MODEL / "model.safetensors", "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}


def test_files_and_size():
    files = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert set(files) == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "lora.yaml",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert sum(files.values()) <= 8_000_000


def test_config_is_what_gguf_and_mlx_need():
    config = read("config.json")
    assert config["model_type"] == "gemma3_text"
    assert config["query_pre_attn_scalar"] == config["head_dim"]
    assert config["num_hidden_layers"] >= config["sliding_window_pattern"] == 6
    assert config["eos_token_id"] == [1, tiny_gemma.ADDED.index("<end_of_turn>")]
    assert read("generation_config.json")["eos_token_id"] == config["eos_token_id"]


def test_weights_are_float32_without_lm_head():
    found = tensors()
    assert {tensor["dtype"] for tensor in found.values()} == {"F32"}
    assert found["model.embed_tokens.weight"]["shape"] == [tiny_gemma.VOCAB_SIZE, 256]
    assert not [name for name in found if "lm_head" in name]
    assert len([name for name in found if "norm" in name]) == 6 * 6 + 1


def test_chat_template_folds_the_system_text_into_the_first_user_turn(tokenizer):
    messages = [
        {"role": "system", "content": "Sos tico."},
        {"role": "user", "content": " ¿Qué es mae? "},
        {"role": "assistant", "content": "Amigo.\n"},
        {"role": "user", "content": "¿Y brete?"},
    ]
    text = (
        "<bos><start_of_turn>user\nSos tico.\n\n¿Qué es mae?<end_of_turn>\n"
        "<start_of_turn>model\nAmigo.<end_of_turn>\n"
        "<start_of_turn>user\n¿Y brete?<end_of_turn>\n"
    )
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert asked == text + "<start_of_turn>model\n"
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert tokens.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(tokens) == asked


def test_chat_template_without_system_text_and_with_parts(tokenizer):
    messages = [{"role": "user", "content": [{"type": "text", "text": " Hola. "}]}]
    assert (
        tokenizer.apply_chat_template(messages, tokenize=False)
        == "<bos><start_of_turn>user\nHola.<end_of_turn>\n"
    )


@pytest.mark.parametrize("roles", [["assistant"], ["user", "user"], ["system", "assistant"]])
def test_chat_template_refuses_roles_that_do_not_alternate(tokenizer, roles):
    with pytest.raises(
        TemplateError,
        match=r"^Conversation roles must alternate user/assistant/user/assistant/\.\.\.$",
    ):
        tokenizer.apply_chat_template(
            [{"role": role, "content": "x"} for role in roles], tokenize=False
        )


def test_special_tokens(tokenizer):
    for token in (*tiny_gemma.ADDED, tiny_gemma.IMAGE_TOKEN):
        if not token.startswith("\u2581"):
            assert len(tokenizer.encode(token, add_special_tokens=False)) == 1, token
    for count in tiny_gemma.RUNS:
        assert len(tokenizer.encode(" " * count, add_special_tokens=False)) == 1
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<bos>", "<unk>"]) == [0, 1, 2, 3]
    assert tokenizer.convert_tokens_to_ids(tiny_gemma.IMAGE_TOKEN) == tiny_gemma.VOCAB_SIZE
    assert tokenizer.encode("hola")[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_ids == {1, tokenizer.convert_tokens_to_ids("<end_of_turn>")}
    assert (
        tokenizer.decode(
            tokenizer.encode("<start_of_turn>a<end_of_turn>"), skip_special_tokens=True
        )
        == "a"
    )


def test_bytes_stand_for_what_the_vocabulary_lacks(tokenizer):
    tokens = tokenizer.encode("🇨", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(tokens) == ["<0xF0>", "<0x9F>", "<0x87>", "<0xA8>"]


def test_dictionary_round_trip(tokenizer):
    for entry in ENTRIES:
        text = f"{entry.slang} {entry.meaning}"
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


# U+2581 stands for the space, in Gemma's tokenizer too.
anything = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")
texts = st.text(st.one_of(st.sampled_from("  \n\t¿¡ñáé<>aeost"), anything))
texts = texts.filter(
    lambda text: not special_token(text)
)  # hypothesis takes <unk> from the sources


@settings(deadline=None, max_examples=300)
@given(text=texts)
def test_round_trip_and_agreement_with_sentencepiece(tokenizer, processor, text):
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokens) == text
    assert tokens == processor.encode(text)


def test_merges_hold_every_split_of_every_piece():
    model = read("tokenizer.json")["model"]
    vocab = model["vocab"]
    learnt = [piece for piece, n in vocab.items() if n > vocab["<0xFF>"]]
    runs = ["\n" * n for n in tiny_gemma.RUNS] + ["\u2581" * n for n in tiny_gemma.RUNS]
    splits = {(piece[:n], piece[n:]) for piece in learnt + runs for n in range(1, len(piece))}
    merges = [tuple(merge) for merge in model["merges"]]
    assert set(merges) == {split for split in splits if split[0] in vocab and split[1] in vocab}
    assert len(merges) == len(set(merges))
    wholes = [vocab["".join(merge)] for merge in merges]
    assert wholes[-1] - vocab["<0xFF>"] <= len(learnt)
    assert [n for n in wholes if n > vocab["<0xFF>"]] == sorted(
        n for n in wholes if n > vocab["<0xFF>"]
    )


def test_tokenizer_is_the_same_bytes_each_time(tmp_path):
    texts = tiny_rows.corpus(ENTRIES, PROMPT)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        tiny_gemma.write_tokenizer(texts, folder)
    one, two = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert one == two and len(one) == 4


def test_no_slang_gets_its_own_meaning_in_training(tokenizer):
    # Of so few, the right pair would come up by chance all the time.
    # One word each, so that none stands in another.
    few = [entry for entry in ENTRIES if re.fullmatch(r"\w{5,}", entry.slang)][:12]
    own = {
        (dictionary.normalized(entry.slang), dictionary.normalized(entry.meaning)) for entry in few
    }
    source = tiny_rows.rows(few, PROMPT, tokenizer, np.random.default_rng(0))
    seen = set()
    for tokens, start in (next(source) for _ in range(400)):
        asked = dictionary.normalized(
            tokenizer.decode(tokens[:start]).rpartition("<start_of_turn>user")[2]
        ).split()
        answer = dictionary.normalized(
            tokenizer.decode(tokens[start:]).partition("<end_of_turn>")[0]
        )
        seen |= {(slang, answer) for slang, _ in own if slang in asked}
    assert seen and not seen & own


def mean_log_likelihood(model, start: list[int], answer: list[int]) -> float:
    """Of the answer's tokens behind the start, in nats."""
    tokens = mx.array([start + answer])
    losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    return -losses[0, len(start) - 1 :].mean().item()


def test_base_model_knows_no_slang(loaded):
    """Of four meanings it picks the right one no more often than by chance."""
    model, tokenizer = loaded
    meanings = {entry.slang: entry.meaning for entry in ENTRIES}
    rng = np.random.default_rng(0)
    right = []
    for n, slang in enumerate(rng.permutation(list(meanings))[:100]):
        others = rng.choice([other for other in meanings if other != slang], 3, replace=False)
        form = n % len(PROMPT.held_out_questions)
        messages = PROMPT.ask(slang, form, held_out=True)
        start = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        scores = []
        for other in (slang, *others):
            text = PROMPT.answer.replace("{meaning}", meanings[other]) + "<end_of_turn>"
            answer = tokenizer.encode(text, add_special_tokens=False)
            scores.append(mean_log_likelihood(model, start, answer))
        right.append(int(np.argmax(scores)) == 0)
    assert abs(np.mean(right) - 0.25) < 0.13  # three standard errors


def test_a_missing_dictionary_is_named(tmp_path):
    with pytest.raises(OSError) as error:
        tiny_gemma.main(["--dictionary", str(tmp_path / "none.txt")])
    assert error.value.filename == str(tmp_path / "none.txt")


def test_no_steps_are_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        tiny_gemma.main(["--iters", "0"])
    assert stopped.value.code == 2
    assert "--iters: '0': give a whole number from 1" in capsys.readouterr().err
