"""Training by mlx_lm.lora itself, to compare; its files take the place of an earlier run's."""

import json
import os
import shutil
import tempfile
import types
from pathlib import Path

import mlx.core as mx
from mlx_lm import lora as mlx_lm_lora

from slang import jsonl
from slang.errors import UserError
from slang.models.load import check_finite
from slang.train.checkpoint import ADAPTER, BEST, LAST, STATE, set_aside
from slang.train.settings import OURS, Settings

LEFTOVERS = (STATE, BEST, LAST, "log.jsonl", "loss.svg")  # of an earlier run of this package


def run(settings: Settings) -> None:
    """mlx_lm.lora with these settings, in a folder of its own within --adapter-path.

    What it wrote is moved up when it ends or is stopped. A run that saved nothing changes nothing.
    """
    folder = Path(settings.adapter_path)
    values = {k: v for k, v in settings.builtins().items() if k not in OURS}
    if values["iters"] is None:
        values["iters"] = mlx_lm_lora.CONFIG_DEFAULTS["iters"]
    if not settings.train:
        mlx_lm_lora.run(types.SimpleNamespace(**values))
        return
    for name in ("train.jsonl", "valid.jsonl"):
        path = Path(settings.data) / name
        n_rows = len(jsonl.read(path)) if path.exists() else settings.batch_size
        if n_rows < settings.batch_size:
            what = f"{n_rows} records, fewer than --batch-size {settings.batch_size}"
            raise UserError(f"{path}: {what}; mlx_lm.lora wants a whole batch, give a smaller one")
    folder.mkdir(parents=True, exist_ok=True)  # the lock makes it on the first machine only
    part = Path(tempfile.mkdtemp(dir=folder, prefix=".mlx_lm."))
    try:
        mlx_lm_lora.run(types.SimpleNamespace(**values | {"adapter_path": str(part)}))
    finally:
        try:
            if (part / ADAPTER).exists():
                move(part, folder, settings)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def move(part: Path, folder: Path, settings: Settings) -> None:
    """Take the place of what an earlier run left. Raises UserError for NaN, which never does."""
    remedy = "the adapter there is as it was; give a lower --learning-rate"
    check_finite(mx.load(str(part / ADAPTER)), str(folder), remedy)
    config = json.loads((part / "adapter_config.json").read_text(encoding="utf-8"))
    config["adapter_path"] = str(folder)
    text = json.dumps(config, indent=4)
    (part / "adapter_config.json").write_text(text, encoding="utf-8")
    if settings.prompt:
        shutil.copyfile(settings.prompt, part / "prompt.toml")
    set_aside(folder)
    for name in LEFTOVERS:
        (folder / name).unlink(missing_ok=True)
    for path in part.iterdir():
        if path.is_file():
            os.replace(path, folder / path.name)
        else:  # of --report-to
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
    print(f"{folder / ADAPTER} holds the last one")
