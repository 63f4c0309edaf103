"""What answers a chat: a model in MLX, or an exported file in llama.cpp.

Both have `prompt`, the prompt.toml that they are asked with; `start`, the messages that every chat
begins with; and `answer(messages)`.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

from slang import prompt
from slang.errors import UserError
from slang.prompt import Messages, Prompt

PROMPT = Path("prompt.toml")


def first_prompt(paths: list[Path]) -> Prompt:
    """The first prompt.toml that is there."""
    there = [path for path in paths if path.is_file()]
    return prompt.load(there[0] if there else paths[-1])


def need_room(n_tokens: int, context: int) -> None:
    """Raises UserError unless the chat and a token of its answer fit into the model's context."""
    if n_tokens >= context:
        what = f"{n_tokens} tokens with the system prompt and what was said before"
        raise UserError(f"the question: {what}, and the model reads {context}; ask a shorter one")


class LoadedModel:
    """A model in MLX, with its adapter."""

    def __init__(self, args: argparse.Namespace):
        from slang.models import find

        adapter = None if args.baseline else args.adapter_path or None
        if adapter is not None:
            find.need_files(Path(adapter))
        source, folder = find.check(args.model, adapter, args.cache)
        places = [folder / PROMPT, PROMPT]
        if args.adapter_path:
            places.insert(0, Path(args.adapter_path) / PROMPT)
        self.prompt = first_prompt(places)
        self.start = self.prompt.chat("")[:1]  # the system prompt

        import mlx.core as mx
        from mlx_lm.sample_utils import make_sampler
        from transformers.utils import logging

        from slang.models.load import load

        logging.set_verbosity_error()  # a long question is refused below
        self.net, self.tokenizer = load(source, adapter)
        if mx.default_device() == mx.cpu:  # where products of bfloat16 take 18 times as long
            self.net.set_dtype(mx.float32)
        if args.seed is not None:
            mx.random.seed(args.seed)
        self.sampler = make_sampler(args.temp, args.top_p, args.min_p, top_k=args.top_k)
        self.max_tokens = args.max_tokens
        known = getattr(self.net.args, "max_position_embeddings", math.inf)
        self.context = min(known, self.tokenizer.model_max_length)  # tokens

    def answer(self, messages: Messages) -> Iterator[str]:
        """The answer to the last message, piece by piece. Raises UserError where it is too long."""
        from mlx_lm.generate import stream_generate

        tokens = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        need_room(len(tokens), self.context)
        max_tokens = min(self.max_tokens, self.context - len(tokens))
        for response in stream_generate(
            self.net, self.tokenizer, tokens, max_tokens=max_tokens, sampler=self.sampler
        ):
            yield response.text


class ExportedModel:
    """A .gguf file in llama.cpp. Its chat template has the system prompt in it."""

    def __init__(self, args: argparse.Namespace):
        from slang.export.llama import LlamaCpp, need_gguf

        path = Path(args.relative_to) / args.gguf
        need_gguf(path)
        self.prompt = first_prompt([path.parent / PROMPT, PROMPT])
        self.start: Messages = []
        self.server = LlamaCpp(path)
        self.context = self.server.room()  # tokens
        self.settings = {
            "max_tokens": args.max_tokens,
            "temperature": args.temp,
            "top_p": args.top_p,
            "min_p": args.min_p,
            "top_k": args.top_k,
            "seed": -1 if args.seed is None else args.seed,
        }

    def answer(self, messages: Messages) -> Iterator[str]:
        """The answer to the last message. Raises UserError where it is too long."""
        chat = {"messages": messages}
        text = self.server.request("/apply-template", chat)["prompt"]
        whole = {"content": text, "add_special": True, "parse_special": True}
        tokens = self.server.request("/tokenize", whole)
        need_room(len(tokens["tokens"]), self.context)
        reply = self.server.request("/v1/chat/completions", chat | self.settings)
        yield reply["choices"][0]["message"]["content"]


Model = LoadedModel | ExportedModel
