"""llama.cpp's own server with one GGUF file, on loopback, through the xllamacpp package."""

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from slang import files
from slang.errors import UserError

MAX_TOKENS = 64  # of an answer
CONTEXT = 4096  # tokens of question and answer; llama.cpp takes fewer where the model can't
SLOTS = 4  # requests that llama.cpp works on at a time
SMALL = 1 << 26  # bytes of a file whose model spends its time waiting for the other threads
# No proxy: the server is on this machine, and the chats stay there.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def need_gguf(path: Path) -> None:
    """Raises UserError unless a file is there and begins as a GGUF file does."""
    if path.is_dir():
        raise UserError(f"{path}: a folder; name one of the .gguf files in it")
    files.need(path, "run ./fuse.sh, which writes it")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path}: not a GGUF file; name one that ./fuse.sh wrote")


class LlamaCpp:
    """A running server. `exact` computes in float32 throughout, whatever it costs."""

    def __init__(
        self,
        path: Path,
        n_ctx: int = CONTEXT,
        slots: int = 1,
        gpu: bool = True,
        exact: bool = False,
    ):
        import xllamacpp

        need_gguf(path)
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel = n_ctx * slots, slots
        params.verbosity, params.warmup = -1, False
        params.n_gpu_layers = -1 if gpu else 0
        if exact:  # nothing is rounded to f16 on the way
            f32 = xllamacpp.ggml_type.GGML_TYPE_F32
            params.cache_type_k = params.cache_type_v = f32
            off = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.flash_attn_type = off
        if path.stat().st_size < SMALL:
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        try:
            self.server = xllamacpp.Server(params)
        except RuntimeError:
            what = "llama.cpp can't load it; it is cut off, or of a model that it does not know"
            raise UserError(f"{path}: {what}; export it again with ./fuse.sh") from None
        # A server that is torn down before its queue runs hangs. /slots is answered by the queue.
        DIRECT.open(self.server.listening_address + "/slots").close()

    def request(self, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One request and its answer; a GET where there is no body."""
        request = urllib.request.Request(
            self.server.listening_address + route,
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with DIRECT.open(request) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise UserError(f"llama.cpp refused {route}: {reason(error.read())}") from None

    def requests(self, route: str, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Many requests, SLOTS at a time; the answers in the same order."""
        with ThreadPoolExecutor(SLOTS) as pool:
            replies = pool.map(lambda body: self.request(route, body), bodies)
            name = f"llama.cpp {route}"
            return list(tqdm(replies, name, len(bodies), leave=False, disable=None))

    def room(self) -> int:
        """How many tokens a question and its answer may have together."""
        (model,) = self.request("/v1/models")["data"]
        return model["meta"]["n_ctx"]


def reason(reply: bytes) -> str:
    """What llama.cpp's JSON says of an error, or the reply itself."""
    try:
        return str(json.loads(reply)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return reply.decode(errors="replace")[:200]


def greedy_chat(question: str) -> dict[str, Any]:
    """A chat of one question, answered by the likeliest token each time."""
    messages = [{"role": "user", "content": question}]
    return {"messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}
