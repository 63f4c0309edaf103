"""Is a model there and whole, and does an adapter fit it? Checked before minutes are spent.

A model is a folder, a .gguf file (which becomes a folder, once), gemma-3-270m (fetched once), or a
name on Hugging Face.

Reads config.json, adapter_config.json and the headers of safetensors files, not a single weight.
It imports no MLX, so that it takes a tenth of a second. What only the loaded model can tell is
checked in `slang.models.load`.

Run as: python -m slang.models models/tiny-gemma3
            prints what mlx_lm is to load, and the folder it is in
        python -m slang.models models/tiny-gemma3 adapters/demo
            and checks the adapter against it
"""

import argparse
import functools
import glob
import importlib.util
import re
import sys
from contextlib import suppress
from pathlib import Path

from slang import files
from slang.errors import UserError
from slang.models.formats import (
    AdapterConfig,
    GemmaConfig,
    Index,
    ModelConfig,
    Origin,
    Shapes,
    Source,
    header,
    read_json,
    weight_shapes,
)
from slang.models.layout import expected_shapes, misfit

CACHE = Path(".cache")
TINY = "MODEL=models/tiny-gemma3"
AGAIN = "copy or download the model again"
ANOTHER = "take an instruction-tuned model, such as gemma-3-1b-it"
TRAIN_AGAIN = "run ./train.sh again"
NOT_WHOLE = f"{TRAIN_AGAIN}: the adapter's folder is not whole"
FUSED = "fused.json"  # fuse.sh writes it into the folder of a fused model
SOURCE = "source.json"  # in a folder that was made of a GGUF file: which file
ORIGIN = "origin.json"  # and what that says of itself; a model fused from this one keeps it

# --------------------------------------------------------------------------------------- the model


def local(model: str, cache: Path) -> Path | None:
    """The folder of a model that is no name on Hugging Face, or None.

    It is made now of a .gguf file or of gemma-3-270m, where it is not there yet.
    """
    if model == "gemma-3-270m" and not Path(model).exists():
        from slang.models import gemma_270m

        return gemma_270m.folder(cache)
    if Path(model).is_file():
        from slang.models import from_gguf

        return from_gguf.folder_of(Path(model), cache)
    return Path(model) if Path(model).exists() else None


def typed(folder: str | Path) -> str:
    """What a person calls the model in a folder: the .gguf file it was made of, or the folder."""
    about = Path(folder) / SOURCE
    return read_json(about, Source, AGAIN).model if about.is_file() else str(folder)


def find(model: str, cache: Path = CACHE) -> Path:
    """The folder that a model is in; of one on Hugging Face, with its config.json at least."""
    return local(model, cache) or on_hugging_face(model)


def on_hugging_face(model: str) -> Path:
    """The folder of a model in Hugging Face's cache.

    Raises UserError where it is not there and can't be had.
    """
    named = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", model, re.ASCII)
    if not named or model.startswith("models/") or model.endswith(".gguf"):
        raise UserError(f"{model}: no such file or folder; check the name, or try {TINY}")
    from huggingface_hub import constants, model_info, snapshot_download
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, logging

    logging.set_verbosity_error()
    disable_progress_bars()  # of config.json; that of the weights is wanted
    try:
        with suppress(Exception):  # not in the cache, in whatever words
            config = snapshot_download(model, allow_patterns=["config.json"], local_files_only=True)
            if is_downloaded(Path(config)):
                return Path(config)
        if not constants.HF_HUB_OFFLINE:
            model_info(model)  # asks the hub; a download is content with what is in the cache
            return Path(snapshot_download(model, allow_patterns=["config.json"]))
        why, remedy = "HF_HUB_OFFLINE forbids it", "unset that"
    except Exception as error:
        kind = type(error).__name__  # the text is of several lines
        why, remedy = f"Hugging Face did not give it ({kind})", "check the name and the connection"
        if kind == "GatedRepoError":
            remedy = "accept its licence on huggingface.co and run hf auth login"
    finally:
        enable_progress_bars()
    problem = f"{model}: no folder here, not downloaded yet, and {why}"
    raise UserError(f"{problem}; {remedy}, or try {TINY}")


def weight_files(folder: Path) -> list[Path]:
    """model*.safetensors, and those that the index names, there or not."""
    index = folder / "model.safetensors.index.json"
    named = read_json(index, Index, AGAIN).weight_map.values() if index.is_file() else []
    return sorted({*folder.glob("model*.safetensors"), *(folder / name for name in named)})


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model"))


def is_downloaded(folder: Path) -> bool:
    """Whether nothing is left to fetch. A download that was stopped leaves some of the files."""
    weights = weight_files(folder)
    return bool(weights) and all(path.exists() for path in weights) and has_tokenizer(folder)


def is_known(model_type: str) -> bool:
    """Whether mlx_lm has such a model. Its folder is looked at: the import would take 2 s."""
    package = importlib.util.find_spec("mlx_lm")
    if package is None or not package.submodule_search_locations:
        raise UserError("mlx_lm: not installed; delete .venv and run this again")
    folder = Path(package.submodule_search_locations[0]) / "models"
    if model_type.isidentifier() and (folder / f"{model_type}.py").is_file():
        return True
    from mlx_lm.utils import MODEL_REMAPPING

    return model_type in MODEL_REMAPPING


def check_config(path: Path) -> ModelConfig:
    """A model's config.json.

    Raises UserError where mlx_lm does not know the model, or its own code would have to be run.
    """
    config = read_json(path, ModelConfig, "MODEL has to name a model's folder")
    if config.model_file is not None:
        raise UserError(f"{path}: it wants code of its own run, which is never done; {ANOTHER}")
    if not is_known(config.model_type):
        raise UserError(f"{path}: mlx_lm knows no model_type {config.model_type!r}; {ANOTHER}")
    if config.model_type == "gemma3_text":
        return read_json(path, GemmaConfig, AGAIN)
    return config


def check_name(path: Path, remedy: str) -> None:
    """Raises UserError for a name that mlx_lm takes for a pattern of names."""
    if glob.escape(str(path)) != str(path):
        raise UserError(f"{path}: mlx_lm reads no path with [, * or ? in it; {remedy}")


def check_model(folder: Path) -> ModelConfig:
    """A model's config.json. Raises UserError where a file of the model is missing or cut off."""
    config = check_config(folder / "config.json")
    check_name(folder, "rename the folder")
    weights = weight_files(folder)
    if not weights:
        raise UserError(f"{folder}: no model*.safetensors, so no weights; {AGAIN}")
    for path in weights:
        header(path, AGAIN)
    if not has_tokenizer(folder):
        files.need(folder / "tokenizer.json", AGAIN)
    apart = any((folder / f"chat_template.{kind}").exists() for kind in ("jinja", "json"))
    about = folder / "tokenizer_config.json"
    if not apart and not read_json(about, dict, AGAIN).get("chat_template"):
        raise UserError(f"{folder}: no chat template; {ANOTHER}")
    return config


# ------------------------------------------------------------------------------------- the adapter


def expected_adapter(about: AdapterConfig, config: ModelConfig) -> Shapes | None:
    """The tensors of an adapter as its adapter_config.json has it.

    None where config.json does not tell: another model than Gemma 3, or other matrices than those
    of its layers.
    """
    lora = about.lora_parameters
    if not isinstance(config, GemmaConfig) or lora is None or about.fine_tune_type == "full":
        return None
    n_layers = config.num_hidden_layers
    adapted = range(n_layers)[-max(about.num_layers, 0) :]
    expected: dict[str, tuple[int, ...]] = {}
    keys = set()
    for tensor, shape in expected_shapes(config).items():
        found = re.fullmatch(r"(model\.layers\.(\d+)\.(.+_proj))\.weight", tensor)
        if not found:
            continue
        name, n, key = found.groups()
        keys.add(key)
        if int(n) in adapted and (lora.keys is None or key in lora.keys):
            n_out, n_in = shape
            expected[f"{name}.lora_a"] = (n_in, lora.rank)
            expected[f"{name}.lora_b"] = (lora.rank, n_out)
            if about.fine_tune_type == "dora":
                expected[f"{name}.m"] = (n_out,)
    return expected if keys.issuperset(lora.keys or []) else None


def check_tensors(path: Path, model: str, about: AdapterConfig, expected: Shapes) -> None:
    """Raises UserError unless an adapter's file holds what its adapter_config.json says."""
    found = weight_shapes(path, f"copy one of the numbered checkpoints over it, or {TRAIN_AGAIN}")
    for name in sorted(expected.keys() | found.keys()):
        have, want = found.get(name), expected.get(name)
        if have == want:
            continue
        what = f"does not fit {model} and its adapter_config.json"
        remedy = f"set MODEL to the one it was trained on, or {TRAIN_AGAIN}"
        side = 0 if name.endswith("lora_a") else -1  # the other one is the rank
        other_size = have and want and len(have) == len(want) and have[side] != want[side]
        if other_size and about.model not in (None, model):
            what = f"trained on another model than {model}"
            remedy = f"set MODEL={about.model}, as its adapter_config.json says"
        raise UserError(f"{path}: {what} ({misfit(name, have, want)}); {remedy}")


def read_adapter_config(adapter: Path) -> AdapterConfig:
    """An adapter's adapter_config.json. Raises UserError where it can't be one."""
    path = adapter / "adapter_config.json"
    about = read_json(path, AdapterConfig, NOT_WHOLE)
    if about.lora_parameters is None and about.fine_tune_type != "full":
        raise UserError(f"{path}: no lora_parameters in it; {NOT_WHOLE}")
    return about


def is_fused(folder: Path) -> bool:
    """Whether fuse.sh made the model in a folder, or the GGUF file that the folder was made of."""
    origin = folder / ORIGIN
    made_here = origin.is_file() and read_json(origin, Origin, AGAIN).finetune == "slang"
    return made_here or (folder / FUSED).is_file()


@functools.cache
def tell_once(message: str) -> None:
    """On stderr; an adapter is checked before a download and again when it is loaded."""
    print(message, file=sys.stderr)


def check_adapter(
    adapter: Path, model: str, config: ModelConfig, folder: Path | None = None
) -> None:
    """Raises UserError where an adapter's files are missing or cut off, or it does not fit.

    Another model of the same shapes, such as the 4-bit one, is used and told. `model` is what the
    person calls it, `folder` where it is if that is another place. What is known from config.json
    is checked here, so before a model is downloaded too.
    """
    about = read_adapter_config(adapter)
    folder = folder or Path(model)
    # One that was trained on the fused model itself is not the one that is in it.
    trained_on_it = about.model and Path(about.model).resolve() == folder.resolve()
    if is_fused(folder) and not trained_on_it:
        raise UserError(f"{model}: has its adapter in it already; set ADAPTER_PATH= for it")
    path = adapter / "adapters.safetensors"
    expected = expected_adapter(about, config)
    if expected is None:
        weight_shapes(path, TRAIN_AGAIN)
    else:
        check_tensors(path, model, about, expected)
    if about.model and Path(about.model).name not in (Path(model).name, folder.name):
        remedy = f"set MODEL={about.model}, unless that is meant"
        tell_once(f"{adapter}: trained on {about.model}, and used with {model}; {remedy}")


def need_files(adapter: Path) -> None:
    """Raises UserError unless the three files that make an adapter are there."""
    for name, remedy in {
        "adapters.safetensors": "run ./train.sh first, or set ADAPTER_PATH to an adapter's folder",
        "adapter_config.json": NOT_WHOLE,
        "prompt.toml": "copy the prompt.toml that the adapter was trained with into its folder",
    }.items():
        files.need(adapter / name, remedy)


def check(model: str, adapter: str | None, cache: Path = CACHE) -> tuple[str, Path]:
    """What mlx_lm is to load, and the folder that it is in.

    They differ for a name on Hugging Face, of which the folder may still lack the weights.
    Raises UserError where the model or the adapter can't be used.
    """
    here = local(model, cache)
    folder = here or on_hugging_face(model)
    if here or is_downloaded(folder):
        config = check_model(folder)
    else:
        config = check_config(folder / "config.json")
    if adapter is not None:
        check_adapter(Path(adapter), model, config, folder)
    return str(here or model), folder


# ------------------------------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m slang.models", description=__doc__.split("\n")[0])
    p.add_argument("model", help="a folder, a .gguf file, gemma-3-270m, or a name on Hugging Face")
    p.add_argument("adapter", nargs="?", help="the folder of an adapter for it")
    p.add_argument(
        "--cache", type=Path, default=CACHE, help="where folders made of .gguf files are kept"
    )
    args = p.parse_args(argv)
    if args.adapter is not None:
        need_files(Path(args.adapter))  # before the network is asked for a model
    print(*check(args.model, args.adapter, args.cache), sep="\n")
    return 0
