"""Does a GGUF file answer in llama.cpp as its model does in MLX? A table of what was compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import TokenType

from slang.errors import UserError
from slang.export.llama import MAX_TOKENS, SLOTS, LlamaCpp, greedy_chat, need_gguf
from slang.export.reference import Reference, Scored
from slang.export.weights import TYPES
from slang.jsonl import Message
from slang.prompt import Messages

N_PROBS = 256  # likeliest next tokens compared; the others count as one in the KL
# Between float32 and float32. The smallest mistake tried, a wrong rope base in a short chat, makes
# 0.8. What is left is llama.cpp's GELU, a table of f16 values: in a float64 reference that table
# alone moved the logits of two adapters by 0.003 and 0.005; llama.cpp was as far off, MLX 0.00002.
# Its defaults round more, cache and flash attention, to 0.007 and 0.014.
LOGIT_LIMIT = 0.02
# A context counts as this many nats at most: of 25 in long texts, one or two lose 3 by rounding to
# 4 or 5 bits, and make half of the mean. What is wrong shows in many.
MOST_LOST = 1.0
# Of the mean over the contexts: in chats, and in long texts. 1.6 to 8 times what an adapter of
# Gemma 3 270M lost (benchmarks/export.md); another one lost half as much in chats.
KL_LIMIT = {
    "f32": (1e-4, 1e-4),
    "f16": (1e-3, 1e-3),
    "bf16": (1e-3, 1e-3),
    "q8_0": (0.03, 0.05),
    "q6_k": (0.06, 0.1),
    "q5_k_m": (0.25, 0.25),
    "q4_k_m": (0.4, 0.4),
    "q4_0": (0.85, 0.85),
}
# Of the mean log-probability of an answer's token.
SCORE_LIMIT = {
    "f32": 0.01,
    "f16": 0.05,
    "bf16": 0.05,
    "q8_0": 0.1,
    "q6_k": 0.1,
    "q5_k_m": 0.2,
    "q4_k_m": 0.4,
    "q4_0": 0.6,
}
EQUAL_ANSWERS = 0.95  # of an f32 file
STOPPED_ANSWERS = 0.9  # of those that stop in MLX


@dataclass
class Comparison:
    """A line of the table."""

    figure: str
    mlx: str
    llama_cpp: str
    ok: bool
    limit: str = ""


@dataclass
class Likeliest:
    """llama.cpp's likeliest next tokens and their log-probabilities, (N_PROBS,) each."""

    ids: np.ndarray
    logprobs: np.ndarray


def read_fields(path: Path) -> tuple[str, dict[str, gguf.ReaderField]]:
    """A file's type, one of TYPES, and its metadata.

    Raises UserError for another file, and for one that is cut off.
    """
    need_gguf(path)
    try:
        fields = gguf.GGUFReader(path).fields
        number = fields["general.file_type"].contents()
        kind = next(kind for kind, (file_type, _) in TYPES.items() if file_type == number)
    except Exception:  # the reader has no error of its own: what it trips over depends on the byte
        what = f"not a whole GGUF file of type {', '.join(TYPES)}"
        raise UserError(f"{path}: {what}; export it again with ./fuse.sh") from None
    return kind, fields


def equal_row(figure: str, equal: int, of: int) -> Comparison:
    return Comparison(figure, str(of), str(equal), equal == of, "all")


def next_tokens(llama_cpp: LlamaCpp, contexts: list[list[int]], n_probs: int) -> list[Likeliest]:
    """What llama.cpp expects behind each context."""
    body = {"n_predict": 1, "temperature": 0, "n_probs": n_probs}
    bodies = [{"prompt": tokens, **body} for tokens in contexts]
    found = []
    for reply in llama_cpp.requests("/completion", bodies):
        top = reply["completion_probabilities"][0]["top_logprobs"]
        ids = np.array([token["id"] for token in top])
        found.append(Likeliest(ids, np.array([token["logprob"] for token in top])))
    return found


def compare_next(theirs: list[Likeliest], ours: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Largest difference of a log-probability, and KL of our next token from theirs in nats.

    (contexts,) each. `ours` has the log-probability of every token of the vocabulary, `theirs` of
    the likeliest; the rest counts as one token.
    """
    differences, kls = [], []
    for likeliest, every in zip(theirs, ours, strict=True):
        mine = every[likeliest.ids].astype(np.float64)
        seen = (likeliest.logprobs > -60) & np.isfinite(mine)  # below it a float32 probability ends
        mine, logprobs = mine[seen], likeliest.logprobs[seen]
        p, q = np.exp(mine), np.exp(logprobs)
        rest_p = max(1 - p.sum(), 1e-12)
        rest_q = max(1 - q.sum(), 1e-12)
        differences.append(np.abs(mine - logprobs).max())
        kls.append(float((p * (mine - logprobs)).sum() + rest_p * np.log(rest_p / rest_q)))
    return np.array(differences), np.array(kls)


def scores(llama_cpp: LlamaCpp, pairs: list[Scored]) -> np.ndarray:
    """Mean log-probability per token of each answer in llama.cpp, (answers,).

    The server says how likely the token is that it chooses. A bias makes it choose the answer's,
    and is left out of what it says. A grammar would do too, but takes 0.3 s a token to look
    through 262,144 of them.
    """
    bodies = [
        {
            "prompt": pair.chat + pair.answer[:n],
            "logit_bias": [[token, 1000.0]],
            "n_predict": 1,
            "n_probs": 1,
            "temperature": 0,
        }
        for pair in pairs
        for n, token in enumerate(pair.answer)
    ]
    replies = llama_cpp.requests("/completion", bodies)
    logprobs = [reply["completion_probabilities"][0]["logprob"] for reply in replies]
    means = []
    for pair in pairs:
        means.append(np.mean(logprobs[: len(pair.answer)]))
        logprobs = logprobs[len(pair.answer) :]
    return np.array(means)


def special_tokens_row(stated: dict[str, gguf.ReaderField], reference: Reference) -> Comparison:
    types = stated["tokenizer.ggml.token_type"]
    equal = 0
    for name, token in reference.special.items():
        field = stated.get(f"tokenizer.ggml.{name}_token_id")
        if field is not None and field.contents() == token:
            equal += types.contents(token) == TokenType.CONTROL
    return equal_row("tokens that begin, stop and fill", equal, len(reference.special))


def tokens_row(llama_cpp: LlamaCpp, reference: Reference) -> Comparison:
    texts = [reference.render(reference.prompt.chat(q)) for q in reference.questions]
    flags = {"add_special": True, "parse_special": True}
    replies = llama_cpp.requests("/tokenize", [{"content": text, **flags} for text in texts])
    equal = sum(
        reply["tokens"] == tokens for reply, tokens in zip(replies, reference.chats, strict=True)
    )
    return equal_row("chats cut into the same tokens", equal, len(texts))


def system_prompt_row(llama_cpp: LlamaCpp, reference: Reference, path: Path) -> Comparison:
    """Chats rendered by llama.cpp as MLX was trained on them, and the Modelfile's SYSTEM."""
    chat, question = reference.prompt.chat, reference.questions[0]
    user: Message = {"role": "user", "content": question}
    turns: Messages = [
        {"role": "assistant", "content": "Sí."},
        {"role": "user", "content": "¿Y cómo se usa?"},
    ]
    other: Message = {"role": "system", "content": 'Sé "breve".'}
    pairs: list[tuple[Messages, Messages]] = [  # what is sent, what is meant
        ([{"role": "user", "content": q}], chat(q)) for q in reference.questions
    ]
    pairs += [
        ([user, *turns], [*chat(question), *turns]),
        (chat(question), chat(question)),
        ([other, user], [other, user]),
    ]
    replies = llama_cpp.requests("/apply-template", [{"messages": sent} for sent, _ in pairs])
    equal = [
        reply["prompt"] == reference.render(meant)
        for reply, (_, meant) in zip(replies, pairs, strict=True)
    ]
    beside = path.with_name("Modelfile")
    if beside.exists():
        system = f'SYSTEM """{reference.prompt.system}"""\n'
        equal.append(system in beside.read_text(encoding="utf-8"))
    return equal_row("chats with the trained system prompt", sum(equal), len(equal))


def next_token_rows(llama_cpp: LlamaCpp, reference: Reference, kind: str) -> list[Comparison]:
    exact = kind == "f32"
    n_probs = min(N_PROBS, len(reference.logprobs[0]))
    likeliest = next_tokens(llama_cpp, reference.continued, n_probs)
    differences, kls = compare_next(likeliest, reference.logprobs)
    kls = np.minimum(kls, MOST_LOST)
    beyond = np.array([len(tokens) > reference.window for tokens in reference.continued])
    rows = []
    for where, chosen in (("up to", ~beyond), ("beyond", beyond)):
        figure = f"next-token logprobs, {where} {reference.window} tokens ({chosen.sum()})"
        most = differences[chosen].max(initial=0)
        ok = not exact or most <= LOGIT_LIMIT
        rows.append(
            Comparison(figure, "", f"{most:.4f} off", ok, f"{LOGIT_LIMIT}" if exact else "")
        )
    # Apart: a window that is off by one shows in the long texts, and is lost in a mean over all.
    n_chats = len(reference.answered)
    groups = {"in chats": kls[:n_chats], "in long texts": kls[n_chats:][beyond[n_chats:]]}
    for (where, some), limit in zip(groups.items(), KL_LIMIT[kind], strict=True):
        figure = f"next-token KL, {where}, mean of {len(some)}"
        rows.append(Comparison(figure, "", f"{some.mean():.5f}", some.mean() <= limit, f"{limit}"))
    return rows


def answer_rows(llama_cpp: LlamaCpp, reference: Reference, kind: str) -> list[Comparison]:
    exact = kind == "f32"
    bodies = [greedy_chat(question) for question in reference.answered]
    replies = llama_cpp.requests("/v1/chat/completions", bodies)
    choices = [reply["choices"][0] for reply in replies]
    equal = [
        ours.strip() == choice["message"]["content"].strip()
        for ours, choice in zip(reference.answers, choices, strict=True)
    ]
    share = np.mean(equal)
    figure = f"equal greedy answers ({len(equal)})"
    limit = f"{EQUAL_ANSWERS}" if exact else ""
    first = Comparison(figure, "", f"{share:.3f}", not exact or share >= EQUAL_ANSWERS, limit)
    ours = sum(reference.stopped)
    stops = sum(choice["finish_reason"] == "stop" for choice in choices)
    figure, ok = "answers that stop by themselves", stops >= STOPPED_ANSWERS * ours
    return [first, Comparison(figure, str(ours), str(stops), ok, f"{STOPPED_ANSWERS} of MLX's")]


def score_row(llama_cpp: LlamaCpp, reference: Reference, kind: str) -> Comparison:
    theirs = scores(llama_cpp, reference.scored).mean()
    ours = reference.scores.mean()
    figure = f"log-probability of an answer's token ({len(reference.scored)})"
    limit = SCORE_LIMIT[kind]
    ok = bool(abs(theirs - ours) <= limit)
    return Comparison(figure, f"{ours:.3f}", f"{theirs:.3f}", ok, f"{limit} off")


def check(path: Path, reference: Reference) -> list[Comparison]:
    """Compare a GGUF file in llama.cpp with the model that it was made from in MLX."""
    kind, stated = read_fields(path)
    chats = [*reference.chats, *reference.texts]
    chats += [pair.chat + pair.answer for pair in reference.scored]
    n_ctx = max(map(len, chats)) + MAX_TOKENS + 32
    # With f16 and bf16 weights llama.cpp rounds the activations too.
    llama_cpp = LlamaCpp(path, n_ctx, SLOTS, gpu=False, exact=kind == "f32")
    return [
        special_tokens_row(stated, reference),
        tokens_row(llama_cpp, reference),
        system_prompt_row(llama_cpp, reference, path),
        *next_token_rows(llama_cpp, reference, kind),
        *answer_rows(llama_cpp, reference, kind),
        score_row(llama_cpp, reference, kind),
    ]


def table(shown: Path, rows: list[Comparison]) -> str:
    """The rows as text below the file's name."""
    lines = [f"{shown}", f"{'':46}{'MLX':>10}{'llama.cpp':>14}{'limit':>14}"]
    for row in rows:
        verdict = "ok" if row.ok else "FAILED"
        cells = f"{row.figure:46}{row.mlx:>10}{row.llama_cpp:>14}{row.limit:>14}"
        lines.append(f"{cells}  {verdict}")
    return "\n".join(lines)


def differing(
    paths: Sequence[Path], reference: Reference, shown_in: Path | None = None
) -> list[Path]:
    """The files that answer otherwise than MLX. Prints a table of each.

    shown_in  the folder that the files will be in, where they are still to be moved
    """
    found = []
    for path in paths:
        rows = check(path, reference)
        shown = shown_in / path.name if shown_in else path
        print(table(shown, rows), flush=True)
        if not all(row.ok for row in rows):
            found.append(path)
    return found
