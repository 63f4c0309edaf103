"""What MLX says in float32 about some chats and texts, with which a GGUF file is compared."""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from tqdm import tqdm

from slang import files, jsonl, prompt
from slang.errors import UserError
from slang.evaluate.tokens import answer_tokens, end_of_turn, prompt_tokens
from slang.export.folder import load_prompt
from slang.export.llama import MAX_TOKENS
from slang.models.load import load

MOST_TEXTS = 1000  # meanings that the long texts are made of
# The last tokens of each long text that llama.cpp has to expect. One token says little of a rounded
# file: 59 of 60 lost 0.0 to 0.6 nats as Q4_K_M, and the one at the end of a text 1.4.
POSITIONS = 12


@dataclass
class Scored:
    """An answer behind a chat, as tokens."""

    chat: list[int]
    answer: list[int]


class Embedding(nn.Module):
    """Token embeddings as llama.cpp scales them: by sqrt(hidden size).

    mlx_lm rounds that to bf16 (1B: 33.94 to 34, tiny: 16). Without this class a 1B model differs
    by the rounding alone, and a mistake of the export as large would go unseen.
    """

    def __init__(self, embedding: nn.Embedding, factor: float):
        super().__init__()
        self.embedding = embedding
        self.factor = factor
        self.as_linear = embedding.as_linear

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.embedding(tokens) * self.factor


def scale_as_llama_cpp(net: nn.Module) -> None:
    """Let a model multiply its embeddings by what llama.cpp multiplies them by."""
    factor = net.args.hidden_size**0.5
    rounded = mx.array(factor, mx.bfloat16).item()
    net.model.embed_tokens = Embedding(net.model.embed_tokens, factor / rounded)


def logits_from(net: nn.Module, rows: mx.array, start: int) -> mx.array:
    """Logits at the positions from `start` on, (rows, positions, vocabulary).

    At all of them they would take gigabytes.
    """
    hidden = net.model(rows)[:, start:]
    if net.tie_word_embeddings:
        return net.model.embed_tokens.as_linear(hidden)
    return net.lm_head(hidden)


def next_logprobs(net: nn.Module, tokens: list[int], positions: int = 1) -> np.ndarray:
    """Log-probabilities of what follows each of the last tokens, (positions, vocabulary)."""
    logits = logits_from(net, mx.array([tokens]), len(tokens) - positions)[0]
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def read_answers(data: Path) -> dict[str, list[str]]:
    """The slangs of train.jsonl, each with the answers that it was trained on."""
    path = data / "train.jsonl"
    files.need(path, "the check's questions come from it: set DATA to what was trained on")
    answers: dict[str, list[str]] = {}
    for record in jsonl.read(path):
        known = answers.setdefault(jsonl.slang(record), [])
        if jsonl.answer(record) not in known:
            known.append(jsonl.answer(record))
    return answers


class Reference:
    """Worked out once, then compared with any number of files."""

    def __init__(
        self,
        folder: Path,
        answers: dict[str, list[str]],
        n_questions: int,
        n_answers: int,
    ):
        self.prompt = load_prompt(folder)
        self.net, self.tokenizer = load(str(folder))
        self.net.set_dtype(mx.float32)
        scale_as_llama_cpp(self.net)

        random = np.random.default_rng(42)
        slangs = sorted(answers)
        forms = [*self.prompt.questions, *self.prompt.held_out_questions]
        drawn = random.permutation(len(slangs) * len(forms))[:n_questions]
        names = [slangs[n // len(forms)] for n in drawn]
        self.questions = [
            forms[n % len(forms)].replace("{slang}", name)
            for n, name in zip(drawn, names, strict=True)
        ]
        chats = [self.prompt.chat(question) for question in self.questions]
        self.chats = prompt_tokens(self.tokenizer, chats)
        self.texts = self.long_texts([text for slang in slangs for text in answers[slang]])

        # The first of the questions are answered too.
        self.answered = self.questions[:n_answers]
        read = [(tokens, 1) for tokens in self.chats[:n_answers]]
        read += [(tokens, POSITIONS) for tokens in self.texts]
        self.continued: list[list[int]] = []
        self.logprobs: list[np.ndarray] = []
        for tokens, last in tqdm(read, "MLX, next token", leave=False, disable=None):
            self.continued += [tokens[: len(tokens) - n] for n in reversed(range(last))]
            self.logprobs += list(next_logprobs(self.net, tokens, last))
        self.answers, self.stopped = self.answer(self.chats[:n_answers])

        expected = [str(random.choice(answers[name])) for name in names[:n_answers]]
        self.scored = self.to_score(expected)
        self.scores = np.array([self.score(pair) for pair in self.scored])

    @property
    def window(self) -> int:
        return self.net.args.sliding_window

    @property
    def special(self) -> dict[str, int]:
        """The ids of the tokens with a task, by their GGUF names."""
        return {
            "bos": self.tokenizer.bos_token_id,
            "eos": self.tokenizer.eos_token_id,
            "eot": end_of_turn(self.tokenizer),
            "unknown": self.tokenizer.unk_token_id,
            "padding": self.tokenizer.pad_token_id,
        }

    def render(self, messages: prompt.Messages) -> str:
        """The chat as text, up to where the model's turn begins.

        Without <bos>, which both add as a token.
        """
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return text.removeprefix(self.tokenizer.bos_token)

    def answer(self, chats: list[list[int]]) -> tuple[list[str], list[bool]]:
        """The greedy answer to each chat, and whether it stopped by itself."""
        reply = mlx_lm.batch_generate(
            self.net, self.tokenizer, chats, max_tokens=MAX_TOKENS, return_token_ids=True
        )
        texts = [
            self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in reply.token_ids
        ]
        return texts, [len(tokens) < MAX_TOKENS for tokens in reply.token_ids]

    def to_score(self, expected: list[str]) -> list[Scored]:
        """The answered chats, each with an answer that was trained and the end of its turn."""
        scored = []
        for question, start, text in zip(self.answered, self.chats, expected, strict=False):
            (answer,) = answer_tokens(self.tokenizer, self.prompt.chat(question), [text])
            # llama.cpp's server gives no probability for a part of a character, which a byte token
            # is.
            pieces = self.tokenizer.convert_ids_to_tokens(answer)
            if not any(piece.startswith("<0x") for piece in pieces):
                scored.append(Scored(start, answer))
        if not scored:
            what = "each answer has a character that the tokenizer cuts into bytes"
            raise UserError(f"{what}; name other data with --data")
        return scored

    def long_texts(self, texts: list[str]) -> list[list[int]]:
        """Running text of lengths around the sliding window and far beyond it."""
        # Text by text: a single one of more tokens than the model's context makes transformers
        # warn.
        tokens = [
            token
            for text in texts[:MOST_TEXTS]
            for token in self.tokenizer.encode(f" {text}", add_special_tokens=False)
        ]
        tokens *= 1 + 8 * self.window // len(tokens)
        lengths = [self.window + n for n in (-1, 0, 1, self.window // 2, self.window)]
        start = self.tokenizer.bos_token_id
        return [[start, *tokens[9 * n : 9 * n + length - 1]] for n, length in enumerate(lengths)]

    def score(self, pair: Scored) -> float:
        """Mean log-probability per token of an answer."""
        row = mx.array([pair.chat + pair.answer[:-1]])
        logits = logits_from(self.net, row, len(pair.chat) - 1)
        losses = nn.losses.cross_entropy(logits[0], mx.array(pair.answer))
        return -losses.mean().item()
