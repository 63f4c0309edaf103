"""What a run knows, and how it is kept.

resume.safetensors is the state, from which all other files of the folder follow. It is written
first; a run that was killed before the others were written writes them again with --resume.
"""

import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import msgspec
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.cli_ui import rprint

from slang import files
from slang.errors import UserError
from slang.train import curve
from slang.train.settings import Settings

# Settings that may change between a run and its --resume; with any other the result would be
# another one.
MAY_CHANGE = {
    "adapter_path", "clear_cache_threshold", "config", "data", "early_stop", "engine", "epochs",
    "everyday", "everyday_share", "grad_checkpoint", "iters", "keep", "model", "project_name",
    "prompt", "report_to", "resume", "resume_adapter_file", "save_every", "steps_per_eval",
    "steps_per_report", "stock_loss", "test", "test_batches", "train", "trust_remote_code",
}  # fmt: skip
STATE = "resume.safetensors"
ADAPTER = "adapters.safetensors"
BEST = "adapters_best.safetensors"
LAST = "adapters_last.safetensors"
BEGUN_WITH = "adapter to begin with"  # in a run's identity
Parts = dict[str, dict[str, mx.array]]  # adapter, best, optimizer, gradient, random: their arrays


def everywhere(content: bytes | None) -> bytes | None:
    """What the first machine has, on all machines of the run."""
    world = mx.distributed.init()
    if world.size() == 1:
        return content
    if world.rank() > 0:
        content = None
    size = 0 if content is None else 1 + len(content)
    size = mx.distributed.all_sum(mx.array(size), stream=mx.cpu).item()
    if size == 0:
        return None
    data = np.zeros(size, np.uint8)
    if content is not None:
        data[1:] = np.frombuffer(content, np.uint8)
    summed = mx.distributed.all_sum(mx.array(data), stream=mx.cpu)
    return bytes(memoryview(summed))[1:]


@dataclass
class Window:
    """What was trained since the last report."""

    loss: float = 0.0  # in nats, summed over answer tokens
    answers: int = 0
    seconds: float = 0.0
    steps: int = 0


class Numbers(msgspec.Struct):
    """What of a run is a number; see Run."""

    iteration: Annotated[int, msgspec.Meta(ge=0)]
    validated: int
    best_iteration: int
    best_loss: float
    valid_loss: float
    train_loss: float
    seconds: float
    tokens: int
    finished: bool
    replaced: bool


class State(msgspec.Struct):
    """What resume.safetensors says beside its arrays; see Run."""

    identity: dict[str, Any]
    iters: int
    numbers: Numbers
    log: list[dict[str, int | float]]
    window: Window = msgspec.field(default_factory=Window)


def goes_on(settings: Settings) -> bool:
    """Whether a run begins with a saved state."""
    return bool(settings.resume) and (Path(settings.adapter_path) / STATE).is_file()


def foreign(path: Path) -> UserError:
    """The error of a state that can't be gone on from."""
    remedy = "leave --resume out to begin anew"
    return UserError(f"{path}: cut off, or not written by this program; {remedy}")


def read_state(path: Path, content: bytes) -> tuple[Parts, State]:
    """The arrays and the rest of a resume.safetensors. Raises UserError unless it is whole."""
    parts: Parts = {"adapter": {}, "best": {}, "optimizer": {}, "gradient": {}, "random": {}}
    try:
        # Through a file: MLX reads with threads of its own, and one that ends late with a Python
        # object in its hands aborts the process.
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
            file.write(content)
            file.flush()
            arrays, about = mx.load(file.name, return_metadata=True)
            mx.eval(arrays)
        state = msgspec.convert({name: json.loads(text) for name, text in about.items()}, State)
        for name, array in arrays.items():
            part, name = name.split("/", 1)
            parts[part][name] = array
    except (RuntimeError, ValueError, KeyError, RecursionError):
        raise foreign(path) from None
    return parts, state


def shapes(arrays: dict[str, mx.array]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


def set_aside(folder: Path) -> None:
    """Rename the state of an unfinished run, before a new run overwrites it."""
    path = folder / STATE
    if not path.is_file():
        return
    try:
        _, state = read_state(path, path.read_bytes())
    except UserError:
        return  # nothing can go on from it
    at = state.numbers.iteration
    if 0 < at < state.iters and not state.numbers.finished:
        number = 1
        while (aside := folder / f"resume_before_{number}.safetensors").exists():
            number += 1
        os.replace(path, aside)
        rprint(f"{path}: an unfinished run stood at iteration {at}; its state is now {aside.name}")


class Run:
    """The state of a training.

    iteration         steps done
    validated         iteration of the last validation
    best              the adapter with the lowest validation loss so far, in `best_iteration`
    train_loss        mean since the last report, as it was reported
    gradient          summed so far, between two updates with --grad-accumulation-steps
    finished          it came to its end
    replaced          the folder's adapter is this run's, and no longer that of an earlier one
    log               the rows of log.jsonl
    window            what the next report is about
    """

    def __init__(
        self,
        settings: Settings,
        iters: int,
        model: nn.Module,
        optimizer: optim.Optimizer,
        dtypes: dict[str, mx.Dtype],
        identity: dict,
    ):
        """
        dtypes    what each array of the adapter is saved as
        identity  all that the result depends on, by names that a person reads
        """
        self.settings, self.iters = settings, iters
        self.model, self.optimizer = model, optimizer
        self.dtypes, self.identity = dtypes, identity
        self.folder = Path(settings.adapter_path)
        self.iteration, self.validated = 0, -1
        self.best: dict[str, mx.array] = {}
        self.best_iteration = -1
        self.best_loss = self.valid_loss = self.train_loss = math.inf
        self.seconds, self.tokens = 0.0, 0
        self.gradient: dict[str, mx.array] | None = None
        self.finished = self.replaced = self.saved = False
        self.log: list[dict] = []
        self.window = Window()

    def count(self, loss: float, answers: int, seconds: float) -> None:
        """One more iteration: its mean loss, answer tokens and time."""
        self.iteration += 1
        self.seconds += seconds
        self.tokens += answers
        self.window.loss += loss * answers
        self.window.answers += answers
        self.window.seconds += seconds
        self.window.steps += 1

    def adapter(self) -> dict[str, mx.array]:
        return dict(tree_flatten(self.model.trainable_parameters()))

    def diverged(self, what: str, where: str) -> UserError:
        """The error of a loss or weight that is not a finite number."""
        if self.iteration == 0:
            remedy = "copy or download it again" + (
                ", or begin with another --resume-adapter-file"
                if self.settings.resume_adapter_file
                else ""
            )
            return UserError(f"{self.settings.model}: {what} before the first step; {remedy}")
        kept = "as it was saved before" if self.saved or self.replaced else "as it was"
        return UserError(
            f"{what} {where}: the training diverged, and {self.folder} is {kept}; "
            + (
                "soften the lr_schedule"
                if self.settings.lr_schedule
                else f"give a --learning-rate below {self.settings.learning_rate:g}"
            )
        )

    def save(self, stopped: bool = False) -> None:
        """Have the first machine write everything.

        stopped  before its end, maybe at once: an adapter of an earlier run then stays, until this
                 run saves as planned
        Raises UserError where a weight is not a finite number; the files are then as they were.
        """
        if self.iteration == 0:
            return  # nothing was trained
        finite = [mx.all(mx.isfinite(a)) for a in self.adapter().values()]
        if not mx.all(mx.stack(finite)).item():
            raise self.diverged("weights that are no numbers", f"at iteration {self.iteration}")
        leader = mx.distributed.init().rank() == 0
        if leader and not self.saved and not self.settings.resume:
            set_aside(self.folder)
        if not stopped or not (self.folder / ADAPTER).exists():
            self.replaced = True
        if leader:
            self.write()
        self.saved = True

    def write(self) -> None:
        """The state, then the files that follow from it."""
        parts = {
            "adapter": self.adapter(),
            "best": self.best,
            "optimizer": dict(tree_flatten(self.optimizer.state)),
            "gradient": self.gradient or {},
            "random": {"key": mx.random.state[0]},
        }
        arrays = {f"{part}/{n}": a for part, values in parts.items() for n, a in values.items()}
        about = {
            "numbers": {name: getattr(self, name) for name in Numbers.__struct_fields__},
            "identity": self.identity,
            "iters": self.iters,
            "log": self.log,
            "window": asdict(self.window),
        }
        about = {name: json.dumps(value) for name, value in about.items()}
        with files.replacing(self.folder / STATE) as (file,):
            mx.save_safetensors(file, arrays, about)
        if self.replaced:
            self.write_files()

    def checkpoint_name(self) -> str:
        return f"{self.iteration:07d}_adapters.safetensors"

    def write_files(self) -> None:
        """All that follows from the state: adapters, their settings and prompt, log and curve."""
        last, best = self.adapter(), self.best
        adapters = {ADAPTER: last}
        if best and self.settings.keep == "best":
            adapters = {ADAPTER: best, LAST: last}
        elif best:
            adapters = {ADAPTER: last, BEST: best}
        if self.iteration % self.settings.save_every == 0:
            adapters[self.checkpoint_name()] = last
        texts = {"adapter_config.json": self.config()}
        texts["log.jsonl"] = "".join(json.dumps(row) + "\n" for row in self.log)
        texts["loss.svg"] = curve.svg(self.log, self.best_iteration if best else None)
        contents = {name: text.encode() for name, text in texts.items()}
        if self.settings.prompt:
            contents["prompt.toml"] = Path(self.settings.prompt).read_bytes()
        paths = [self.folder / name for name in (*adapters, *contents)]
        with files.replacing(*paths) as opened:
            for file, weights in zip(opened, adapters.values(), strict=False):
                # In one order, from which a file's bytes follow; mx.load gives another.
                in_order = {name: weights[name].astype(d) for name, d in self.dtypes.items()}
                mx.save_safetensors(file, in_order)
            for file, content in zip(opened[len(adapters) :], contents.values(), strict=True):
                file.write(content)
        for stale in {LAST, BEST} - set(adapters):
            (self.folder / stale).unlink(missing_ok=True)

    def config(self) -> str:
        """adapter_config.json, as mlx_lm.utils.save_config writes it."""
        config = self.settings.builtins() | {"iters": self.iters}
        if self.settings.fine_tune_type == "full":
            config["lora_parameters"] = None
        return json.dumps(dict(sorted(config.items())), indent=4)

    def restore(self) -> bool:
        """Take up the saved state, on all machines that of the first; False where there is none.

        Raises UserError when it belongs to another run.
        """
        path = self.folder / STATE
        first = mx.distributed.init().rank() == 0
        content = everywhere(path.read_bytes() if first and path.is_file() else None)
        if content is None:
            rprint(f"{path}: not there, so this run begins at the beginning")
            return False
        parts, state = read_state(path, content)
        before = state.identity
        # The file that it began with is not looked at: the run may have replaced it since.
        now = self.identity | {k: v for k, v in before.items() if k == BEGUN_WITH}
        different = [k for k in {**before, **now} if before.get(k) != now.get(k)]
        if different:
            lines = [f"  {k}: {before.get(k)} then, {now.get(k)} now" for k in different]
            raise UserError(
                f"{path}: saved by a run with other settings, so it can't go on from there:\n"
                + "\n".join(lines)
                + "\nGive the same again, or leave --resume out to begin anew."
            )
        adapter, optimizer = self.adapter(), dict(tree_flatten(self.optimizer.state))
        needed = {"adapter": adapter, "optimizer": optimizer, "random": {"key": mx.random.state[0]}}
        if any(shapes(parts[name]) != shapes(some) for name, some in needed.items()):
            raise foreign(path)
        self.model.load_weights(list(parts["adapter"].items()), strict=False)
        self.best = parts["best"]
        self.optimizer.state = tree_unflatten(list(parts["optimizer"].items()))
        self.gradient = parts["gradient"] or None
        high, low = parts["random"]["key"].tolist()
        mx.random.seed(high << 32 | low)  # the state is the seed's two halves
        for name, value in msgspec.structs.asdict(state.numbers).items():
            setattr(self, name, value)
        self.identity = now
        self.log = state.log
        self.window = state.window
        self.finished, self.saved = False, True
        return True
