"""`python -m slang.train`: read the data and the model, train, save, say what came out.

Reads   a model, and train.jsonl, valid.jsonl and test.jsonl of --data
Writes  into --adapter-path what mlx_lm.lora writes (adapters.safetensors, adapter_config.json,
        numbered checkpoints), and prompt.toml, resume.safetensors, log.jsonl, loss.svg, and the
        other of best and last adapter

Run as: python -m slang.train --train --model models/tiny-gemma3 --data data --mask-prompt
"""

import hashlib
import json
import math
import os
import sys
import types
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.cli_ui import make_console, print_lora_run_header, rprint
from mlx_lm.tuner.callbacks import get_reporting_callbacks
from mlx_lm.tuner.datasets import ChatDataset
from mlx_lm.tuner.trainer import grad_checkpoint
from mlx_lm.tuner.utils import print_trainable_parameters

from slang import files, jsonl, numpy_gemma, prompt
from slang.errors import UserError
from slang.jsonl import Record
from slang.models.load import load
from slang.train import mlx_lm_engine
from slang.train.batches import Rows, prefix_before_answers, steps_per_epoch
from slang.train.checkpoint import ADAPTER, BEGUN_WITH, MAY_CHANGE, Run, everywhere, goes_on
from slang.train.flags import build_parser, parse
from slang.train.loop import evaluate, train
from slang.train.model import add_adapter, fingerprint, make_optimizer, perplexity
from slang.train.network import Network, PlainNetwork
from slang.train.numpy_network import network_of
from slang.train.settings import Settings

Pairs = list[tuple[list[int], int]]  # (tokens, where the answer starts) of each row


def main(argv: list[str] | None = None) -> int:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    settings = parse(sys.argv[1:] if argv is None else argv)
    if not (settings.train or settings.test):
        build_parser().error("give --train, --test or both")
    console = make_console()  # the one that all of mlx_lm prints to
    if not console.is_terminal:
        console._color_system = None  # mlx_lm would write its colours to a pipe or file too
    leader = mx.distributed.init().rank() == 0
    lock: AbstractContextManager[None] = nullcontext()
    if settings.train and leader:
        lock = files.locked(Path(settings.adapter_path), "training")
    with lock:
        if settings.engine == "mlx_lm":
            mlx_lm_engine.run(settings)
        else:
            run(settings)
    return 0


def run(settings: Settings) -> None:
    chats = {name: chats_of(settings, f"{name}.jsonl") for name in ("train", "valid", "test")}
    everyday = everyday_chats(settings)
    rprint("Loading pretrained model")
    to_test_only = not settings.train and settings.adapter_path
    model, tokenizer = load(settings.model, settings.adapter_path if to_test_only else None)
    rprint("Loading datasets")
    pairs = {name: tokenised(settings, some, tokenizer) for name, some in chats.items()}
    if settings.train:
        everyday_pairs = tokenised(settings, everyday, tokenizer)
        train_model(settings, model, pairs["train"], pairs["valid"], everyday_pairs)
    if mx.default_device() == mx.cpu:
        numpy_gemma.to_float32(model)
    if settings.test:
        rprint("Testing")
        test_model(settings, model, pairs["test"])


# -------------------------------------------------------------------------------------------- data


def chats_of(settings: Settings, name: str) -> list[Record]:
    """The records of a file of --data, of those that this run needs."""
    folder = Path(settings.data)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name one with train.jsonl in it")
    path = folder / name
    needed = settings.test if name == "test.jsonl" else settings.train
    if not needed or (name == "valid.jsonl" and not path.exists()):
        return []
    return jsonl.read(path)


def everyday_chats(settings: Settings) -> list[Record]:
    """The chats of --everyday, with the system prompt that the other rows have: it shall not stand
    for slang alone."""
    if not settings.everyday or not settings.train:
        return []
    system: prompt.Messages = []
    if settings.prompt:
        system = [{"role": "system", "content": prompt.load(settings.prompt).system}]
    chats: list[Record] = []
    for chat in jsonl.read(settings.everyday):
        messages = [message for message in chat["messages"] if message["role"] != "system"]
        chats.append({"messages": system + messages})
    return chats


def tokenised(settings: Settings, chats: list[Record], tokenizer) -> Pairs:
    """Through the model's chat template, as mlx_lm does it."""
    dataset = ChatDataset(chats, tokenizer, mask_prompt=settings.mask_prompt)
    return [dataset.process(chat) for chat in chats]


# ---------------------------------------------------------------------------------------- training


def all_positions_because(settings: Settings, model: nn.Module) -> str | None:
    """Why every position has to be computed, or None."""
    if settings.fine_tune_type == "full":
        return "with --fine-tune-type full"
    if not settings.mask_prompt:
        return "without --mask-prompt, every token is a target"
    if model.model_type not in ("gemma3_text", "gemma3"):
        return f"{model.model_type} is not Gemma 3"
    return None


def make_network(settings: Settings, model: nn.Module, sets: Sequence[Rows]) -> PlainNetwork:
    """What computes the loss of these rows."""
    if all_positions_because(settings, model):
        return PlainNetwork(model)
    return network_of(model, prefix_before_answers(sets), settings.grad_checkpoint)


def frozen_output_fits(network: Network, sets: list[Rows], iters: int, batch_size: int) -> bool:
    """Whether the frozen layers' output is worth keeping (it is used twice at least) and takes an
    eighth of memory at most."""
    if not network.start or iters * batch_size < 2 * len(sets[0]):
        return False
    tokens = sum(len(t) - len(network.prefix) for rows in sets for t in rows.tokens)
    needed = 4 * tokens * network.body.args.hidden_size
    return needed <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 8


def need_same_rows(settings: Settings, digests: list[str]) -> None:
    """Raises UserError on all machines where one has other rows than the first."""
    mine = " ".join(digests).encode()
    differ = mx.array(everywhere(mine) != mine)
    if mx.distributed.all_sum(differ, stream=mx.cpu).item():
        remedy = "copy the folder to each"
        raise UserError(f"{settings.data}: the machines have different rows there; {remedy}")


def identity_of(
    settings: Settings, iters: int, model_weights: str, rows: Rows, valid: Rows | None
) -> dict:
    """All that the result of a run depends on, by names that a person reads."""
    identity: dict[str, Any] = {
        "model": model_weights,
        "train rows": rows.digest(),
        "valid rows": valid.digest() if valid else None,
        "prompt": prompt.load(settings.prompt).hash()[:16] if settings.prompt else None,
    }
    flags = settings.builtins()
    identity |= {name: value for name, value in flags.items() if name not in MAY_CHANGE}
    if settings.resume_adapter_file and not goes_on(settings):
        content = Path(settings.resume_adapter_file).read_bytes()
        identity[BEGUN_WITH] = hashlib.sha256(content).hexdigest()[:16]
    if settings.decay and not settings.lr_schedule:
        identity["decay over steps"] = iters
    return json.loads(json.dumps(identity))


def count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def steps_of(settings: Settings, rows: Rows) -> int:
    """How many steps --iters or --epochs make of the rows. Raises UserError where that is no
    update."""
    iters = settings.iters or 1000
    if settings.epochs:
        iters = max(1, math.ceil(settings.epochs * steps_per_epoch(rows, settings.batch_size)))
    if settings.grad_accumulation_steps > iters:
        flag = f"--grad-accumulation-steps {settings.grad_accumulation_steps}"
        raise UserError(f"{flag}: more than the {count(iters, 'step')}, so none would be taken")
    return iters


def train_model(
    settings: Settings, model: nn.Module, pairs: Pairs, valid_pairs: Pairs, everyday_pairs: Pairs
) -> None:
    """Train, save and say what came out; the model then has the adapter of adapters.safetensors."""
    weights = fingerprint(model)
    dtypes = add_adapter(settings, model)
    if mx.default_device() == mx.cpu:
        numpy_gemma.to_float32(model)  # MLX multiplies bf16 matrices 18 times slower on a CPU

    length, batch_size = settings.max_seq_length, settings.batch_size
    rows = Rows(pairs, length, "train.jsonl")
    valid = Rows(valid_pairs, length, "valid.jsonl") if valid_pairs else None
    everyday = Rows(everyday_pairs, length, settings.everyday or "")
    n_everyday = math.ceil(len(rows) * settings.everyday_share) if len(everyday) else 0
    rows.add(everyday, n_everyday, settings.seed)
    sets = [rows, valid] if valid else [rows]
    if not all(len(some) for some in sets):
        raise UserError(f"{settings.data}: no row has an answer within --max-seq-length {length}")
    iters = steps_of(settings, rows)
    need_same_rows(settings, [some.digest() for some in sets])
    network = make_network(settings, model, sets)
    identity = identity_of(settings, iters, weights, rows, valid)
    optimizer = make_optimizer(settings, model, iters)
    run = Run(settings, iters, model, optimizer, dtypes, identity)
    leader = mx.distributed.init().rank() == 0
    resumed = settings.resume and run.restore()
    config = {**settings.builtins(), "iters": iters}
    if leader:
        header = config | {"lora_parameters": config["lora_parameters"] or {}}
        print_lora_run_header(make_console(), types.SimpleNamespace(**header))
    print_trainable_parameters(model)
    if isinstance(network, Network):
        announce(settings, iters, rows, everyday, n_everyday, len(network.prefix))
    else:
        rprint(f"Computing all positions: {all_positions_because(settings, model)}")
        if settings.grad_checkpoint:
            grad_checkpoint(model.layers[0])
    if not valid:
        rprint("No validation set: the last adapter is kept, and whether it is good is not known")
    if resumed:
        rprint(f"Going on from iteration {run.iteration} of {iters}")
        if leader and run.replaced:
            run.write_files()  # which a run that was killed may not have come to
    if isinstance(network, Network) and frozen_output_fits(network, sets, iters, batch_size):
        rprint(f"Keeping the output of {network.start} frozen layers for every row")
        for some in sets:
            network.keep_frozen(some, batch_size)

    validation = {"val_loss": valid} if valid else {}
    if valid and settings.stock_loss:
        validation["stock_val_loss"] = Rows(valid_pairs, length, "valid.jsonl", pad=True)
    folder = settings.adapter_path
    callback = get_reporting_callbacks(settings.report_to, settings.project_name, folder, config)
    train(run, network, rows, validation, callback)
    if settings.keep == "best":
        model.load_weights(list(run.best.items()), strict=False)
    if leader:
        print(summary(run))


def announce(
    settings: Settings, iters: int, rows: Rows, everyday: Rows, n_everyday: int, prefix: int
) -> None:
    """Print what is gone through, and what is computed once for all rows."""
    batch_size = min(settings.batch_size, len(rows))
    steps = f"{count(iters, 'step')} of {count(batch_size, 'row')}"
    epochs = iters / steps_per_epoch(rows, settings.batch_size)
    more = f", {n_everyday} of them everyday language" if n_everyday else ""
    if n_everyday > len(everyday):
        more += f" (the {len(everyday)} rows of {settings.everyday}, again and again)"
    rprint(f"{steps}: {epochs:.1f} epochs of the {len(rows)} rows{more}")
    shared = f"their first {prefix} tokens, which are computed once per batch"
    rprint(f"{len(rows)} rows share {shared}")
    if settings.lora_parameters and settings.lora_parameters.dropout:
        same = "with the same gradient on average"
        rprint(f"Dropout: a batch's rows share its noise on the common prefix, {same}")


def summary(run: Run) -> str:
    """What came out of a run, in one line."""
    keep = run.settings.keep if run.best else "last"
    speed = f"{run.tokens / max(run.seconds, 1e-9):,.0f} tokens/s"
    parts = [
        f"last {run.iteration}" + (f" ({run.valid_loss:.3f})" if run.best else ""),
        f"{run.folder / ADAPTER} holds the {keep} one",
        f"{run.seconds:.1f} s, {speed}, {run.folder / 'loss.svg'}",
    ]
    best = ""
    if run.best:
        best = f"Best iteration {run.best_iteration} (valid loss {run.best_loss:.3f}), "
    return best + "; ".join(parts)


def test_model(settings: Settings, model: nn.Module, pairs: Pairs) -> None:
    """As mlx_lm.lora.evaluate_model over --test-batches batches, but no pad token counted."""
    for pad in (False, True) if settings.stock_loss else (False,):
        rows = Rows(pairs, settings.max_seq_length, "test.jsonl", pad)
        if not len(rows):
            length = f"--max-seq-length {settings.max_seq_length}"
            raise UserError(f"{settings.data}/test.jsonl: no row has an answer within {length}")
        network = make_network(settings, model, [rows])
        loss = evaluate(network, rows, settings.batch_size, settings.test_batches)
        note = " (a pad token counted in each row)" if pad else ""
        rprint(f"Test loss {loss:.3f}, Test ppl {perplexity(loss):.3f}.{note}")
