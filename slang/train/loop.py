"""The training itself: steps, validations, reports, saves."""

import math
import time
from collections.abc import Callable

import mlx.core as mx
from mlx.nn.utils import average_gradients
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.cli_ui import TrainUI, rprint
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.utils import maybe_set_recommended_wired_limit
from rich.progress import TextColumn, TimeRemainingColumn

from slang.errors import Stopped
from slang.train.batches import Rows, fixed_batches, training_batches
from slang.train.checkpoint import Run, Window
from slang.train.network import Network, PlainNetwork
from slang.train.shapes import Work, plan, survey
from slang.train.stopping import Interrupt


class UI(TrainUI):
    """mlx_lm's, and the time left."""

    def __init__(self, iters: int, done: int, rank: int):
        super().__init__(iters, rank)
        left = TextColumn("[ui.muted]· left[/ui.muted]"), TimeRemainingColumn(compact=True)
        self._progress.columns = (*self._progress.columns, *left)
        self._progress.update(self._task, completed=done)


def evaluate(
    network: PlainNetwork, rows: Rows, batch_size: int, n_batches: int, advance=None, check=None
) -> float:
    """Mean cross entropy in nats of all answer tokens of n batches, -1 for every row."""
    network.model.eval()
    total, tokens = mx.array(0.0), 0
    for indices in fixed_batches(rows, batch_size, n_batches):
        count = rows.answer_tokens(indices)
        total += network.loss(network.batch(rows, indices[own_share()], count)) * count
        tokens += count
        mx.eval(total)
        if advance:
            advance()
        if check:
            check()
    network.model.train()
    return mx.distributed.all_sum(total, stream=mx.cpu).item() / tokens


def compiles() -> bool:
    """Whether steps are compiled. On a CPU, mx.compile has g++ build every fused kernel, 40 s
    before the first step, and then gains nothing."""
    return mx.default_device() != mx.cpu


def step_of(run: Run, network: PlainNetwork) -> Callable:
    """A function of (batch, gradient summed so far, whether to update the adapter with it), which
    gives (loss of this machine's share, gradient summed so far)."""
    loss_and_gradient = network.value_and_grad()
    n_machines = mx.distributed.init().size()
    n_summed = run.settings.grad_accumulation_steps

    def step(batch, gradient, update):
        loss, new = loss_and_gradient(batch)
        # Each machine has its share of one mean: the sum over them is the whole gradient.
        new = {name: g * n_machines for name, g in tree_flatten(average_gradients(new))}
        if gradient is None:
            gradient = new
        else:
            gradient = {name: g + gradient[name] for name, g in new.items()}
        if update:
            mean = [(name, g / n_summed) for name, g in gradient.items()]
            run.optimizer.update(run.model, tree_unflatten(mean))
            gradient = None
        return loss, gradient

    if compiles():
        state = [run.model.state, run.optimizer.state, mx.random.state]
        return mx.compile(step, inputs=state, outputs=state)
    return step


def train(
    run: Run,
    network: PlainNetwork,
    rows: Rows,
    valid: dict[str, Rows],
    callback: TrainingCallback | None = None,
) -> None:
    """Train from run.iteration to run.iters, saving on the way.

    valid  the rows of each validation loss: "val_loss", and "stock_val_loss" with --stock-loss
    Raises Stopped when a signal came, with everything saved; UserError when the loss is no number.

    The order within an iteration is: validation of what was saved, step, report, save. So a run
    which goes on from a save does what the uninterrupted one did.
    """
    settings = run.settings
    maybe_set_recommended_wired_limit()
    world = mx.distributed.init()
    step = step_of(run, network)
    if compiles() and isinstance(network, Network):
        prefix = len(network.prefix)
        drawn = rows, prefix, settings.batch_size, settings.seed, run.iters
        network.shapes = plan(survey(*drawn, own_share()), prefix, Work.of(run.model))

    run.model.train()
    batches = training_batches(rows, settings.batch_size, settings.seed, run.iteration)
    with Interrupt() as interrupt, UI(run.iters, run.iteration, world.rank()) as ui:
        try:
            while True:
                ended = has_ended(run)
                due = run.iteration % settings.steps_per_eval == 0 or ended
                if valid and due and run.validated < run.iteration:
                    validate(run, network, valid, ui, interrupt.check, callback)
                if ended:
                    break
                take_step(step, run, network, rows, next(batches))
                ui.advance()
                if run.iteration % settings.steps_per_report == 0 or run.iteration == run.iters:
                    report(run, ui, callback)
                if run.iteration % settings.save_every == 0:
                    run.save()
                    ui.report_save(run.folder / run.checkpoint_name())
                interrupt.check()
        except Stopped as stopped:
            run.save(stopped=True)
            raise Stopped(farewell(run, str(stopped))) from None
        run.finished = True
        run.save()


def own_share() -> slice:
    """Which of a batch's rows this machine computes."""
    world = mx.distributed.init()
    return slice(world.rank(), None, world.size())


def take_step(
    step: Callable, run: Run, network: PlainNetwork, rows: Rows, indices: list[int]
) -> None:
    """An iteration with these rows. Raises UserError when the loss is no number."""
    settings = run.settings
    start = time.perf_counter()
    count = rows.answer_tokens(indices)
    batch = network.batch(rows, indices[own_share()], count)
    update = (run.iteration + 1) % settings.grad_accumulation_steps == 0
    loss, run.gradient = step(batch, run.gradient, update)
    loss = mx.distributed.all_sum(loss, stream=mx.cpu)
    mx.eval(run.model.state, run.optimizer.state, mx.random.state, loss, run.gradient)
    if not math.isfinite(loss.item()):
        where = f"at iteration {run.iteration + 1}"
        raise run.diverged(f"a training loss of {loss.item()}", where)
    if mx.get_cache_memory() > settings.clear_cache_threshold:
        mx.clear_cache()
    run.count(loss.item(), count, time.perf_counter() - start)


def has_ended(run: Run) -> bool:
    return run.iteration >= run.iters or run.train_loss < run.settings.early_stop


def farewell(run: Run, by: str) -> str:
    """What is said when a run was stopped, behind "Stopped" or "Stopped by SIGTERM"."""
    if run.iteration == 0:
        return f"{by} before the first step; nothing was changed"
    said = f"{by}, and saved in {run.folder}; the same command with --resume goes on from there"
    if not run.replaced:
        said += f", and {run.folder / 'adapters.safetensors'} is still the earlier one"
    return said


def validate(
    run: Run,
    network: PlainNetwork,
    valid: dict[str, Rows],
    ui: UI,
    check: Callable,
    callback: TrainingCallback | None,
) -> None:
    """Score every row of the validation set, and keep the adapter when it is the best so far."""
    settings = run.settings
    start = time.perf_counter()
    losses: dict[str, float] = {}
    for name, rows in valid.items():
        total = len(fixed_batches(rows, settings.batch_size, settings.val_batches))
        with ui.val_task(total) as advance:
            losses[name] = evaluate(
                network, rows, settings.batch_size, settings.val_batches, advance, check
            )
    took = time.perf_counter() - start
    loss = losses["val_loss"]
    if not math.isfinite(loss):
        raise run.diverged(f"a validation loss of {loss}", f"at iteration {run.iteration}")
    run.validated, run.valid_loss = run.iteration, loss
    # Before the first step nothing was learnt, so there is nothing to keep.
    if run.iteration > 0 and loss < run.best_loss:
        run.best_loss, run.best_iteration, run.best = loss, run.iteration, run.adapter()
    ui.report_val(run.iteration, loss, took)
    if "stock_val_loss" in losses:
        counted = "with a pad token as a target of every row, as mlx_lm.lora counts"
        rprint(f"        {counted}: {losses['stock_val_loss']:.3f}")
    info = {"iteration": run.iteration, **losses, "val_time": round(took, 3)}
    run.log.append({**info, "seconds": round(run.seconds, 3)})
    if callback:
        callback.on_val_loss_report(info)


def report(run: Run, ui: UI, callback: TrainingCallback | None) -> None:
    """Print and log the mean training loss, and whether it is low enough to stop."""
    window, run.window = run.window, Window()
    loss = window.loss / window.answers
    speed = window.answers / window.seconds
    run.train_loss = loss
    ui.report_train(run.iteration, loss, speed, run.tokens)
    if loss < run.settings.early_stop and run.iteration < run.iters:
        limit = f"--early-stop {run.settings.early_stop:g}"
        rprint(f"Training loss {loss:.3f} is below {limit}: stopped at iteration {run.iteration}")
    info = {
        "iteration": run.iteration,
        "train_loss": loss,
        "learning_rate": run.optimizer.learning_rate.item(),
        "iterations_per_second": round(window.steps / window.seconds, 3),
        "tokens_per_second": round(speed, 3),
        "trained_tokens": run.tokens,
        "peak_memory": mx.get_peak_memory() / 1e9,
    }
    run.log.append({**info, "seconds": round(run.seconds, 3)})
    if callback:
        callback.on_train_loss_report(info)
