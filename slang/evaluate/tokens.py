"""Chats as tokens: a prompt, which ends where the model's turn begins, and answers. No MLX."""

from collections.abc import Sequence

import numpy as np

from slang.errors import UserError
from slang.prompt import Messages

END_OF_TURN = "<end_of_turn>"  # Gemma's; the chat template writes it behind every turn


def end_of_turn(tokenizer) -> int:
    """The token that ends an answer. Raises UserError where there is none: not Gemma's."""
    token = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    if token in (None, tokenizer.unk_token_id):
        raise UserError(f"the tokenizer has no {END_OF_TURN}; set MODEL to a Gemma 3 model")
    return token


def stop_tokens(tokenizer) -> set[int]:
    """The tokens at which a greedy answer stops."""
    return {end_of_turn(tokenizer), *tokenizer.eos_token_ids}


def prompt_tokens(tokenizer, chats: list[Messages]) -> list[list[int]]:
    """The tokens of each chat, up to where the model's turn begins."""
    if not chats:
        return []
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)


def tokens_behind(tokenizer, chats: list[Messages], prompts: list[list[int]]) -> list[list[int]]:
    """What follows its prompt in each chat that ends with an answer.

    That is the answer, <end_of_turn> and what the template puts after it.
    """
    whole = tokenizer.apply_chat_template(chats, return_dict=False)
    return [tokens[len(start) :] for tokens, start in zip(whole, prompts, strict=True)]


def answer_tokens(tokenizer, chat: Messages, answers: Sequence[str]) -> list[list[int]]:
    """The tokens of each answer to the chat, <end_of_turn> being the last."""
    if not answers:
        return []
    (start,) = prompt_tokens(tokenizer, [chat])
    chats: list[Messages] = [
        [*chat, {"role": "assistant", "content": answer}] for answer in answers
    ]
    end = end_of_turn(tokenizer)
    behind = tokens_behind(tokenizer, chats, [start] * len(chats))
    return [tokens[: tokens.index(end) + 1] for tokens in behind]


def text_of(tokenizer, tokens: list[int]) -> str:
    """An answer's tokens as text, without special tokens and without blanks around it."""
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()


def padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """The rows as one array, (rows, longest row), with 0 beyond a row's end."""
    array = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for line, row in zip(array, rows, strict=True):
        line[: len(row)] = row
    return array
