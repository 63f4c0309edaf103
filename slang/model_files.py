"""Is a model there and whole, and does an adapter fit it? Asked by the wrappers before minutes are spent.

Reads config.json, adapter_config.json and the headers of safetensors files, not a single weight, and imports no MLX, so that it
takes a tenth of a second; huggingface_hub is imported where the model is no folder here.

Run as: python -m slang.model_files models/tiny-gemma3                 prints the folder that the model is in
        python -m slang.model_files models/tiny-gemma3 adapters/demo   and checks the adapter against it
"""

import argparse
import json
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

import orjson

from slang.dictionary import told

TINY = "MODEL=models/tiny-gemma3"
AGAIN = "copy or download the model again"


class Unusable(Exception):
    """A file that can't be used; the message names it, what is wrong and what to do."""


def read_object(path: Path, remedy: str) -> dict:
    """A JSON object. Raises Unusable where the file is missing or something else."""
    try:
        value = orjson.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise Unusable(f"{path}: not there; {remedy}") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise Unusable(f"{path}: not a JSON object; {remedy}")
    return value


def header(path: Path, remedy: str) -> tuple[dict[str, dict], int]:
    """What a safetensors file says of each tensor ("dtype", "shape", "data_offsets"), and the byte from which these count.

    Format: huggingface.co/docs/safetensors. Raises Unusable unless the file is whole.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            if start > size:
                raise ValueError("it ends too early")
            entries = json.loads(file.read(start - 8))
        entries.pop("__metadata__", None)
        for entry in entries.values():
            if start + entry["data_offsets"][1] > size:
                raise ValueError("it ends too early")
            entry["shape"] = tuple(entry["shape"])
        return entries, start
    except FileNotFoundError:
        raise Unusable(f"{path}: not there; {remedy}") from None
    except json.JSONDecodeError:
        raise Unusable(f"{path}: not a whole safetensors file (its header is no JSON); {remedy}") from None
    except (ValueError, AttributeError, KeyError, IndexError, TypeError) as error:
        raise Unusable(f"{path}: not a whole safetensors file ({error}); {remedy}") from None


def find(model: str) -> Path:
    """The folder that a model is in: itself, or the one in Hugging Face's cache, which has config.json at least."""
    if Path(model).exists():
        return Path(model)
    if model.startswith("models/") or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", model, re.ASCII):
        raise Unusable(f"{model}: no such folder; {TINY} is the one in this repository")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from huggingface_hub import constants, model_info, snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    with suppress(Exception):  # not in the cache, in whatever words
        folder = Path(snapshot_download(model, allow_patterns=["config.json"], local_files_only=True))
        if any(folder.glob("model*.safetensors")):
            return folder
    where = f"{model}: no folder here, not downloaded yet, and"
    if constants.HF_HUB_OFFLINE:
        raise Unusable(f"{where} HF_HUB_OFFLINE forbids it; unset that, or try {TINY}")
    try:
        model_info(model)  # asks the hub; a download alone is content with half a model in the cache
        return Path(snapshot_download(model, allow_patterns=["config.json"]))
    except Exception as error:
        remedy = {"GatedRepoError": "accept its licence on huggingface.co and run hf auth login"}
        remedy = remedy.get(type(error).__name__, "check the name and the connection")
        raise Unusable(f"{where} Hugging Face did not give it ({type(error).__name__}); {remedy}, or try {TINY}") from None


def check_model(folder: Path) -> dict:
    """A model's config.json. Raises Unusable where a file is missing or cut off, or code of the model's own would be run."""
    config = read_object(folder / "config.json", "MODEL has to name a model's folder")
    if "model_file" in config:
        raise Unusable(f"{folder / 'config.json'}: the model wants code of its own run, which is never done; take another")
    weights = sorted(folder.glob("model*.safetensors"))
    if not weights:
        raise Unusable(f"{folder}: no model*.safetensors; the folder holds no weights, {AGAIN}")
    for path in weights:
        header(path, AGAIN)
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        raise Unusable(f"{folder / 'tokenizer.json'}: not there; {AGAIN}")
    apart = any((folder / f"chat_template.{kind}").exists() for kind in ("jinja", "json"))
    if not apart and not read_object(folder / "tokenizer_config.json", AGAIN).get("chat_template"):
        raise Unusable(f"{folder}: no chat template; take an instruction-tuned model, such as gemma-3-1b-it")
    return config


def linear_layers(config: dict) -> dict[str, tuple[int, int]]:
    """(values in, values out) of a Gemma 3 layer's products by their names; none for another kind of model."""
    if config.get("model_type") != "gemma3_text":
        return {}
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, key_heads = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    out = {"q_proj": heads, "k_proj": key_heads, "v_proj": key_heads}
    return {
        **{f"self_attn.{name}": (hidden, size) for name, size in out.items()},
        "self_attn.o_proj": (heads, hidden),
        **{f"mlp.{name}": (hidden, inner) for name in ("gate_proj", "up_proj")},
        "mlp.down_proj": (inner, hidden),
    }


def check_adapter(adapter: Path, model: str, config: dict) -> None:
    """Raises Unusable where an adapter's files are missing or cut off, or the shapes are those of another model.

    Known from config.json alone, so for a model that is still to be downloaded and for a quantised one too.
    """
    path = adapter / "adapters.safetensors"
    about = read_object(adapter / "adapter_config.json", "run ./train.sh again: the adapter's folder is not whole")
    if not {"num_layers", "lora_parameters"} <= set(about):
        raise Unusable(f"{adapter / 'adapter_config.json'}: no num_layers or lora_parameters in it; run ./train.sh again")
    there, _ = header(path, "copy one of the numbered checkpoints over it, or run ./train.sh again")
    before = about.get("model")
    named = f"={before}, as its adapter_config.json says" if before and before != model else " to the one it was trained on"
    try:
        layers, n_layers = linear_layers(config), config.get("num_hidden_layers", 0)
    except (KeyError, TypeError):
        return  # mlx_lm has values of its own for what is left out
    for name, shape in ((name, entry["shape"]) for name, entry in there.items() if layers):
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.lora_([ab])", name)
        if not found or found[2] not in layers or len(shape) != 2:
            continue
        side = "ab".index(found[3])
        if int(found[1]) >= n_layers or shape[-side] != layers[found[2]][side]:
            what = f"{name} is {shape[0]} x {shape[1]}"
            raise Unusable(f"{path}: trained on another model than {model} ({what}); set MODEL{named}")


def need_files(adapter: Path) -> None:
    """Raises Unusable unless the three files that make an adapter are there."""
    for name, remedy in {
        "adapters.safetensors": "run ./train.sh first, or set ADAPTER_PATH to an adapter's folder",
        "adapter_config.json": "run ./train.sh again: the adapter's folder is not whole",
        "prompt.toml": "copy the prompt.toml that the adapter was trained with into its folder",
    }.items():
        if not (adapter / name).is_file():
            raise Unusable(f"{adapter / name}: not there; {remedy}")


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m slang.model_files", description=__doc__.split("\n")[0])
    p.add_argument("model", help="a model's folder, or its name on Hugging Face")
    p.add_argument("adapter", nargs="?", help="the folder of an adapter for it")
    args = p.parse_args(argv)
    try:
        if args.adapter is not None:
            need_files(Path(args.adapter))  # before the network is asked for a model
        folder = find(args.model)
        downloaded = Path(args.model).exists() or any(folder.glob("model*.safetensors"))
        config = check_model(folder) if downloaded else read_object(folder / "config.json", AGAIN)
        if args.adapter is not None:
            check_adapter(Path(args.adapter), args.model, config)
    except Unusable as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(told(error), file=sys.stderr)
        return 1
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
