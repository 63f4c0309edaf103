"""The settings of a training, and where each comes from.

A setting is a flag, or a line of the YAML file that -c names. The later ones win:

    mlx_lm.lora's defaults, a wrapper's defaults, the YAML file, flags that a person typed

Whatever they come from, they are checked once, as one `Settings`.
"""

import difflib
import importlib.util
import re
import types
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NoReturn,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import msgspec
import yaml
from msgspec import UNSET, Meta, UnsetType

from slang import files
from slang.errors import UserError

LARGEST = 3.4e38  # of float32
Switch = Annotated[bool, Meta(description="true or false")]
Text = Annotated[str, Meta(description="a text")]
Whole = Annotated[int, Meta(ge=1, le=2**31 - 1, description="a whole number from 1 to 2147483647")]
WholeOrAll = Annotated[
    int, Meta(ge=-1, le=2**31 - 1, description="a whole number from 1, or -1 for all")
]
FromZero = Annotated[int, Meta(ge=0, le=2**63 - 1, description="a whole number from 0")]
Number = Annotated[float, Meta(ge=-LARGEST, le=LARGEST, description="a number")]
Loss = Annotated[float, Meta(ge=0, le=LARGEST, description="a loss in nats, or 0 for never")]
Positive = Annotated[float, Meta(gt=0, le=LARGEST, description="a number above 0, such as 1e-4")]
Share = Annotated[float, Meta(ge=0, le=100, description="a number from 0 to 100, such as 0.25")]
Passes = Annotated[float, Meta(gt=0, le=1e5, description="a number above 0, up to 100000")]
Rank = Annotated[int, Meta(ge=1, le=4096, description="a whole number from 1 to 4096")]
Dropout = Annotated[float, Meta(ge=0, lt=1, description="a number from 0, below 1")]
Numbers = Annotated[list[Number], Meta(min_length=1, description="a list of numbers")]
Pair = Annotated[
    list[Number], Meta(min_length=2, max_length=2, description="a list of two numbers")
]
Names = Annotated[list[str], Meta(description="a list of names, such as [self_attn.q_proj]")]
Services = Annotated[
    str,
    Meta(pattern=r"^((wandb|swanlab)(,(wandb|swanlab))?)?$", description="wandb or swanlab"),
]


class Strict(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A table of the YAML file in which every name has to be known."""


class Adam(Strict):
    betas: Pair | UnsetType = UNSET
    eps: Number | UnsetType = UNSET
    bias_correction: Switch | UnsetType = UNSET


class AdamW(Adam):
    weight_decay: Number | UnsetType = UNSET


class Muon(Strict):
    momentum: Number | UnsetType = UNSET
    weight_decay: Number | UnsetType = UNSET
    nesterov: Switch | UnsetType = UNSET
    ns_steps: Whole | UnsetType = UNSET


class SGD(Strict):
    momentum: Number | UnsetType = UNSET
    weight_decay: Number | UnsetType = UNSET
    dampening: Number | UnsetType = UNSET
    nesterov: Switch | UnsetType = UNSET


class Adafactor(Strict):
    eps: Pair | UnsetType = UNSET
    clip_threshold: Number | UnsetType = UNSET
    decay_rate: Number | UnsetType = UNSET
    beta_1: Number | UnsetType = UNSET
    weight_decay: Number | UnsetType = UNSET
    scale_parameter: Switch | UnsetType = UNSET
    relative_step: Switch | UnsetType = UNSET
    warmup_init: Switch | UnsetType = UNSET


class OptimizerConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Options of mlx.optimizers' classes, by --optimizer."""

    adam: Adam = msgspec.field(default_factory=Adam)
    adamw: AdamW = msgspec.field(default_factory=AdamW)
    muon: Muon = msgspec.field(default_factory=Muon)
    sgd: SGD = msgspec.field(default_factory=SGD)
    adafactor: Adafactor = msgspec.field(default_factory=Adafactor)


class LoraParameters(Strict):
    rank: Rank
    scale: Positive
    dropout: Dropout
    keys: Names | UnsetType = UNSET  # layers that get an adapter; all linear ones when left out


class Schedule(Strict):
    """mlx_lm's lr_schedule: a function of mlx.optimizers.schedulers and its arguments."""

    name: Literal["cosine_decay", "exponential_decay", "linear_schedule", "step_decay"]
    arguments: Numbers
    warmup: FromZero = 0
    warmup_init: Number = 0.0


class Settings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Every setting of mlx_lm.lora with its default there, then those of this project."""

    model: Text = "Qwen/Qwen3-0.6b"
    train: Switch = False
    fine_tune_type: Literal["lora", "dora", "full"] = "lora"
    optimizer: Literal["adam", "adamw", "muon", "sgd", "adafactor"] = "adam"
    optimizer_config: OptimizerConfig = msgspec.field(default_factory=OptimizerConfig)
    data: Text = "mlx-community/WikiSQL"
    seed: FromZero = 0
    num_layers: WholeOrAll = 16
    batch_size: Whole = 4
    iters: Whole | None = None  # 1000, or what --epochs makes of the rows
    val_batches: WholeOrAll = 25
    learning_rate: Positive = 1e-5
    steps_per_report: Whole = 10
    steps_per_eval: Whole = 200
    resume_adapter_file: Text | None = None
    adapter_path: Text = "adapters"
    save_every: Whole = 100
    test: Switch = False
    test_batches: WholeOrAll = 500
    max_seq_length: Whole = 2048
    config: Text | None = None
    grad_checkpoint: Switch = False
    grad_accumulation_steps: Whole = 1
    clear_cache_threshold: FromZero = 0
    lr_schedule: Schedule | None = None
    lora_parameters: LoraParameters | None = msgspec.field(
        default_factory=lambda: LoraParameters(rank=8, scale=20.0, dropout=0.0)
    )
    mask_prompt: Switch = False
    report_to: Services | None = None
    project_name: Text | None = None
    trust_remote_code: Switch = False

    engine: Literal["slang", "mlx_lm"] = "slang"
    resume: Switch = False
    keep: Literal["best", "last"] = "last"
    epochs: Passes | None = None
    decay: Switch = False
    bias_correction: Switch = False
    everyday: Text | None = None
    everyday_share: Share = 0.1
    early_stop: Loss = 0.0
    stock_loss: Switch = False
    prompt: Text | None = None

    def builtins(self) -> dict[str, Any]:
        """As JSON has it, in the way that mlx_lm expects its settings."""
        return msgspec.to_builtins(self)

    def optimizer_options(self) -> dict[str, Any]:
        """What the class of --optimizer is made with, but for the learning rate."""
        options = msgspec.to_builtins(getattr(self.optimizer_config, self.optimizer))
        return options | ({"bias_correction": True} if self.bias_correction else {})


OURS = set(Settings.__struct_fields__[Settings.__struct_fields__.index("engine") :])
# What owns a setting in train.sh, where a YAML file may not name it.
OWNERS = {
    "model": "MODEL",
    "data": "DATA",
    "adapter_path": "ADAPTER_PATH",
    "prompt": "prompt.toml",
    "engine": "ENGINE",
}


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def from_yaml(path: str, loader: type) -> dict[str, Any]:
    """The settings in a YAML file. Raises UserError where they can't be read."""
    text = files.text_of(Path(path).read_bytes(), path)  # of a pipe too
    try:
        found = yaml.load(text, loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise UserError(f"{path}:{line}: not valid YAML; mend the line") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: no settings in it; write one a line, such as iters: 100")
    return {str(name): value for name, value in found.items() if value is not None}


class Sources(NamedTuple):
    """Where settings come from, the later ones over the earlier.

    wrapper  flags that train.sh gives by itself
    in_file  of the YAML file, whose name is in `typed` or `wrapper` as "config"
    typed    flags that a person typed
    """

    wrapper: dict
    in_file: dict
    typed: dict

    @property
    def file(self) -> str | None:
        """The name of the YAML file."""
        return {**self.wrapper, **self.typed}.get("config")

    def values(self) -> dict[str, Any]:
        """All of them in one."""
        values: dict[str, Any] = {}
        for layer in self:
            # Steps win over passes, but only over those of the same source or an earlier one.
            if layer.get("iters") is not None:
                values.pop("epochs", None)
            elif layer.get("epochs") is not None:
                values.pop("iters", None)
            values.update(layer)
        if values.get("iters") is not None:
            values.pop("epochs", None)
        return values

    def refuse(self, name: str, problem: str) -> NoReturn:
        """Raises UserError where a setting stands in the file, ValueError where it is a flag."""
        top = name.split(".")[0]
        if top in self.in_file and top not in self.typed:
            raise UserError(f"{self.file}: {name}{problem}")
        raise ValueError(f"{flag(name)}{problem}")


def merged(wrapper: dict, in_file: dict, typed: dict) -> Settings:
    """The settings of three sources (see Sources), over mlx_lm's defaults.

    Raises UserError where one of the file can't be, ValueError where a flag can't be.
    """
    sources = Sources(wrapper, in_file, typed)
    need_right_source(sources)
    values = sources.values()
    try:
        settings = msgspec.convert(values, Settings)
    except msgspec.ValidationError as error:
        refuse_value(str(error), values, sources)
    need_sense(settings, sources)
    return settings


def need_right_source(sources: Sources) -> None:
    """Raises UserError where the file holds what is set elsewhere, ValueError where a flag does."""
    wrapper, in_file, typed = sources
    refused = {name: f"{owner} decides it" for name, owner in OWNERS.items() if name in wrapper}
    refused["config"] = "a file names no other"
    if wrapper.get("train") and in_file.get("train") is False:
        refused["train"] = "train.sh trains"
    for name, why in refused.items():
        if name in in_file:
            raise UserError(f"{sources.file}: {name}: take it out; {why}")
    for name in ("decay", "learning_rate"):
        if in_file.get("lr_schedule") and typed.get(name):
            problem = f"{sources.file} has an lr_schedule; leave one of them out"
            raise ValueError(f"{flag(name)}: {problem}")


def refuse_value(error: str, values: dict[str, Any], sources: Sources) -> NoReturn:
    """Says in our words what msgspec says of a value."""
    message, _, at = error.partition(" - at ")
    path = "".join(re.findall(r"\$\.?([^`\[]*)", at))
    if field := re.match(r"Object (contains unknown|missing required) field `(.*)`", message):
        where = f"{sources.file}: {path}: " if path else f"{sources.file}: "
        close = difflib.get_close_matches(field[2], fields_at(path), 1)
        problem = f"unknown setting {field[2]}; "
        problem += f"is it {close[0]}?" if close else "take it out"
        if field[1].startswith("missing"):
            problem = f"no {field[2]} in it; write it there"
        raise UserError(where + problem) from None
    value = value_at(values, path)
    if isinstance(value, str) and path.split(".")[0] not in sources.typed:
        value = repr(value)  # in a file, "7" is no number
    sources.refuse(path, f" {value}: give {allowed(path)}")


def need_sense(settings: Settings, sources: Sources) -> None:
    """Refuse what is no setting together with others, and settle who decides bias_correction."""
    refuse = sources.refuse
    for name in ("num_layers", "val_batches", "test_batches"):
        if getattr(settings, name) == 0:
            refuse(name, f" 0: give {allowed(name)}")
    if settings.optimizer in ("adam", "adamw") and settings.engine == "slang":
        options = getattr(settings.optimizer_config, settings.optimizer)
        if options.bias_correction is not UNSET and "bias_correction" not in sources.typed:
            settings.bias_correction = options.bias_correction  # the file's, over train.sh's
        options.bias_correction = UNSET
    elif settings.bias_correction and settings.engine == "slang":
        if "bias_correction" in {**sources.in_file, **sources.typed}:
            refuse("bias_correction", f": {settings.optimizer} has none; use adam or adamw")
        settings.bias_correction = False
    for service in (settings.report_to or "").split(","):
        if service and not importlib.util.find_spec(service):
            refuse("report_to", f" {service}: not installed; pip install {service}")
    if settings.trust_remote_code and settings.engine == "slang":
        refuse("trust_remote_code", ": code of a model's own is never run; take another model")
    lora = settings.lora_parameters
    if settings.grad_checkpoint and lora and lora.dropout and settings.engine == "slang":
        why = "what is computed again drops other inputs than the first time"
        refuse("grad_checkpoint", f": not with dropout, as {why}; leave one of them out")
    if settings.lora_parameters is None and settings.fine_tune_type != "full":
        refuse("lora_parameters", f": give {allowed('lora_parameters')}")


def value_at(values: Any, path: str) -> Any:
    for name in path.split("."):
        values = values.get(name) if isinstance(values, dict) else values
    return values


def kind_at(path: str) -> Any:
    """The type of a setting, such as `lora_parameters.rank`, without its `| None`."""
    kind: Any = Settings
    for name in filter(None, path.split(".")):
        kind = get_type_hints(kind, include_extras=True)[name]
        if get_origin(kind) in (Union, types.UnionType):
            kind = get_args(kind)[0]
    return kind


def fields_at(path: str) -> list[str]:
    return list(kind_at(path).__struct_fields__)


def allowed(path: str) -> str:
    """What a setting may be, in words."""
    kind = kind_at(path)
    if get_origin(kind) is Annotated:
        return get_args(kind)[1].description
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    return f"{', '.join(kind.__struct_fields__)}, each on a line below it"
