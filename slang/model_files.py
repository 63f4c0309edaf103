"""Is a model there and whole, and does an adapter fit it? Asked by the wrappers before minutes are spent.

A model is a folder, a .gguf file (which becomes a folder, once), gemma-3-270m (fetched once), or a name on Hugging Face.

Reads config.json, adapter_config.json and the headers of safetensors files, not a single weight, and imports no MLX, so that it
takes a tenth of a second; huggingface_hub and gguf are imported where they are needed.

Run as: python -m slang.model_files models/tiny-gemma3                 prints what mlx_lm is to load, and the folder it is in
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

from slang.errors import UserError, told

TINY = "MODEL=models/tiny-gemma3"
AGAIN = "copy or download the model again"
Unusable = UserError  # as slang.lora calls it


def read_object(path: Path, remedy: str) -> dict:
    """A JSON object. Raises UserError where the file is missing or something else."""
    try:
        value = orjson.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: not there; {remedy}") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; {remedy}")
    return value


def header(path: Path, remedy: str) -> tuple[dict[str, dict], int]:
    """What a safetensors file says of each tensor ("dtype", "shape", "data_offsets"), and the byte from which these count.

    Format: huggingface.co/docs/safetensors. Raises UserError unless the file is whole.
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
        raise UserError(f"{path}: not there; {remedy}") from None
    except json.JSONDecodeError:
        raise UserError(f"{path}: not a whole safetensors file (its header is no JSON); {remedy}") from None
    except (ValueError, AttributeError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); {remedy}") from None


def local(model: str, cache: Path) -> Path | None:
    """The folder of a model that is no name on Hugging Face, or None; made now of a .gguf file or of gemma-3-270m."""
    if model == "gemma-3-270m" and not Path(model).exists():
        from slang.models import gemma_270m

        return gemma_270m.folder(cache)
    if Path(model).is_file():
        from slang.models import from_gguf

        return from_gguf.folder_of(Path(model), cache)
    return Path(model) if Path(model).exists() else None


def typed(folder: str | Path) -> str:
    """What a person calls the model in a folder: the .gguf file that it was made of, or the folder."""
    about = Path(folder) / "source.json"
    return str(read_object(about, AGAIN).get("model", folder)) if about.is_file() else str(folder)


def find(model: str, cache: Path = Path(".cache")) -> Path:
    """The folder that a model is in; of one on Hugging Face, the folder in its cache, which has config.json at least."""
    return local(model, cache) or on_hugging_face(model)


def on_hugging_face(model: str) -> Path:
    """The folder of a model in Hugging Face's cache. Raises UserError where it is not there and can't be had."""
    if model.startswith("models/") or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", model, re.ASCII):
        raise UserError(f"{model}: no such folder; {TINY} is the one in this repository")
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
        raise UserError(f"{where} HF_HUB_OFFLINE forbids it; unset that, or try {TINY}")
    try:
        model_info(model)  # asks the hub; a download alone is content with half a model in the cache
        return Path(snapshot_download(model, allow_patterns=["config.json"]))
    except Exception as error:
        remedy = {"GatedRepoError": "accept its licence on huggingface.co and run hf auth login"}
        remedy = remedy.get(type(error).__name__, "check the name and the connection")
        raise UserError(f"{where} Hugging Face did not give it ({type(error).__name__}); {remedy}, or try {TINY}") from None


def check_model(folder: Path) -> dict:
    """A model's config.json. Raises UserError where a file is missing or cut off, or code of the model's own would be run."""
    config = read_object(folder / "config.json", "MODEL has to name a model's folder")
    if "model_file" in config:
        raise UserError(f"{folder / 'config.json'}: the model wants code of its own run, which is never done; take another")
    weights = sorted(folder.glob("model*.safetensors"))
    if not weights:
        raise UserError(f"{folder}: no model*.safetensors; the folder holds no weights, {AGAIN}")
    for path in weights:
        header(path, AGAIN)
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError(f"{folder / 'tokenizer.json'}: not there; {AGAIN}")
    apart = any((folder / f"chat_template.{kind}").exists() for kind in ("jinja", "json"))
    if not apart and not read_object(folder / "tokenizer_config.json", AGAIN).get("chat_template"):
        raise UserError(f"{folder}: no chat template; take an instruction-tuned model, such as gemma-3-1b-it")
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
    """Raises UserError where an adapter's files are missing or cut off, or the shapes are those of another model.

    Known from config.json alone, so for a model that is still to be downloaded and for a quantised one too.
    """
    path = adapter / "adapters.safetensors"
    about = read_object(adapter / "adapter_config.json", "run ./train.sh again: the adapter's folder is not whole")
    if not {"num_layers", "lora_parameters"} <= set(about):
        raise UserError(f"{adapter / 'adapter_config.json'}: no num_layers or lora_parameters in it; run ./train.sh again")
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
            raise UserError(f"{path}: trained on another model than {model} ({what}); set MODEL{named}")


def need_files(adapter: Path) -> None:
    """Raises UserError unless the three files that make an adapter are there."""
    for name, remedy in {
        "adapters.safetensors": "run ./train.sh first, or set ADAPTER_PATH to an adapter's folder",
        "adapter_config.json": "run ./train.sh again: the adapter's folder is not whole",
        "prompt.toml": "copy the prompt.toml that the adapter was trained with into its folder",
    }.items():
        if not (adapter / name).is_file():
            raise UserError(f"{adapter / name}: not there; {remedy}")


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m slang.model_files", description=__doc__.split("\n")[0])
    p.add_argument("model", help="a model's folder, a .gguf file, gemma-3-270m, or a name on Hugging Face")
    p.add_argument("adapter", nargs="?", help="the folder of an adapter for it")
    p.add_argument("--cache", type=Path, default=".cache", help="where folders made of .gguf files are kept")
    args = p.parse_args(argv)
    try:
        if args.adapter is not None:
            need_files(Path(args.adapter))  # before the network is asked for a model
        here = local(args.model, args.cache)
        folder = here or on_hugging_face(args.model)
        downloaded = here or any(folder.glob("model*.safetensors"))
        config = check_model(folder) if downloaded else read_object(folder / "config.json", AGAIN)
        if args.adapter is not None:
            check_adapter(Path(args.adapter), args.model, config)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(told(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped; nothing was changed", file=sys.stderr)
        return 130
    print(here or args.model, folder, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
