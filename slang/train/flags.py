"""The flags of `python -m slang.train`: those of mlx_lm.lora and this project's own."""

import argparse
import decimal

from mlx_lm import lora as mlx_lm_lora

from slang.train.settings import OURS, Settings, flag, from_yaml, merged


def build_parser() -> argparse.ArgumentParser:
    p = mlx_lm_lora.build_parser()
    p.prog = "python -m slang.train"
    p.usage = "%(prog)s [flags]; --help lists them"
    p.description = "LoRA finetuning as mlx_lm.lora does it. Flags and YAML are its own, and:"
    p.allow_abbrev = False
    p.add_argument(
        "--engine",
        choices=["slang", "mlx_lm"],
        help="Train with mlx_lm.lora itself, to compare.",
    )
    p.add_argument(
        "--resume",
        action="store_true",
        help="Go on from the state saved in --adapter-path.",
    )
    p.add_argument(
        "--keep",
        choices=["best", "last"],
        help="What adapters.safetensors holds: the last (default), or the best by validation loss.",
    )
    p.add_argument(
        "--epochs",
        type=float,
        metavar="N",
        help="Passes over the training rows; --iters counts steps and wins.",
    )
    p.add_argument(
        "--decay",
        action=argparse.BooleanOptionalAction,
        help="Let the learning rate rise over a twentieth of the steps, then fall along a cosine.",
    )
    p.add_argument(
        "--bias-correction",
        action=argparse.BooleanOptionalAction,
        help="Adam as it was published, with its bias corrected; MLX leaves that out, and its "
        "first hundred steps are 3 to 6.5 times as large.",
    )
    p.add_argument(
        "--everyday",
        metavar="FILE",
        help="Chat rows that are trained too, lest the model forget the rest of its language.",
    )
    p.add_argument(
        "--everyday-share",
        type=float,
        metavar="X",
        help="Everyday rows for each row of the training set (0.1); a short file is repeated.",
    )
    p.add_argument(
        "--early-stop",
        type=float,
        metavar="LOSS",
        help="Stop once the mean training loss since the last report is below LOSS nats.",
    )
    p.add_argument(
        "--stock-loss",
        action="store_true",
        help="Report mlx_lm.lora's number too, which counts a pad token as a target of every row.",
    )
    p.add_argument(
        "--prompt",
        metavar="FILE",
        help="The prompt.toml that the data was made with; a copy goes to the adapter.",
    )
    p.add_argument(
        "--typed",
        action="store_true",
        help="Flags before this one are a wrapper's defaults, which the YAML file of -c replaces; "
        "flags after it are not.",
    )
    for action in p._actions:
        if action.dest == "clear_cache_threshold":
            action.type = size
        action.default = argparse.SUPPRESS  # so that what was not given can be told
    return p


def size(text: str) -> int:
    """1000, 500MB or 2GB in bytes."""
    try:
        return mlx_lm_lora._parse_size(text)
    except (decimal.InvalidOperation, KeyError):
        raise argparse.ArgumentTypeError(f"{text!r}: give a size such as 2GB") from None


def parse(argv: list[str]) -> Settings:
    """The settings of a command line. Leaves with 2 where a flag is wrong.

    Raises UserError where the YAML file is.
    """
    parser = build_parser()
    wrapper: dict = {}
    if "--typed" in argv:
        at = argv.index("--typed")
        wrapper = vars(parser.parse_args(argv[:at]))
        argv = argv[at + 1 :]
    typed = vars(parser.parse_args(argv))
    if "typed" in typed:
        parser.error("--typed: train.sh gives it; leave it out")
    file = {**wrapper, **typed}.get("config")
    in_file = {}
    if file:
        print("Loading configuration file", file)
        in_file = from_yaml(file, mlx_lm_lora.yaml_loader)
    try:
        settings = merged(wrapper, in_file, typed)
    except ValueError as error:
        parser.error(str(error))
    if settings.engine == "mlx_lm":
        given = (OURS - {"engine", "prompt"}) & (wrapper.keys() | in_file.keys() | typed.keys())
        if given:
            remedy = "leave out the flag, or ENGINE=mlx_lm"
            parser.error(f"{flag(min(given))}: mlx_lm.lora has no such setting; {remedy}")
    return settings
