"""slang/train: where a setting comes from, and what is said of one that can't be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from mlx_lm.lora import CONFIG_DEFAULTS

from slang.errors import UserError
from slang.train.flags import parse
from slang.train.settings import OURS, Settings

pytestmark = pytest.mark.slow  # mlx_lm takes two seconds to import
RANK = "give a whole number from 1 to 4096"
WHOLE = "give a whole number from 1 to 2147483647"
ALL = "give a whole number from 1, or -1 for all"
RATE = "give a number above 0, such as 1e-4"


def test_the_defaults_are_those_of_mlx_lm():
    ours = {k: v for k, v in Settings().builtins().items() if k not in OURS}
    assert ours == CONFIG_DEFAULTS | {"iters": None}


def test_every_setting_of_mlx_lm_is_known():
    assert set(Settings.__struct_fields__) - OURS == set(CONFIG_DEFAULTS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch-size 0", f"--batch-size 0: {WHOLE}"),
        ("--iters 0", f"--iters 0: {WHOLE}"),
        ("--iters 99999999999999999999", f"--iters 99999999999999999999: {WHOLE}"),
        ("--grad-accumulation-steps 0", f"--grad-accumulation-steps 0: {WHOLE}"),
        ("--max-seq-length -5", f"--max-seq-length -5: {WHOLE}"),
        ("--save-every 0", f"--save-every 0: {WHOLE}"),
        ("--steps-per-eval 0", f"--steps-per-eval 0: {WHOLE}"),
        ("--steps-per-report 0", f"--steps-per-report 0: {WHOLE}"),
        ("--num-layers 0", f"--num-layers 0: {ALL}"),
        ("--num-layers -2", f"--num-layers -2: {ALL}"),
        ("--val-batches 0", f"--val-batches 0: {ALL}"),
        ("--test-batches 0", f"--test-batches 0: {ALL}"),
        ("--seed -1", "--seed -1: give a whole number from 0"),
        ("--iters 1e3", "argument --iters: invalid int value: '1e3'"),
        ("--learning-rate nan", f"--learning-rate nan: {RATE}"),
        ("--learning-rate inf", f"--learning-rate inf: {RATE}"),
        ("--learning-rate=-1e-4", f"--learning-rate -0.0001: {RATE}"),
        ("--epochs 0", "--epochs 0.0: give a number above 0, up to 100000"),
        ("--epochs nan", "--epochs nan: give a number above 0, up to 100000"),
        ("--epochs 1e300", "--epochs 1e+300: give a number above 0, up to 100000"),
        ("--early-stop -1", "--early-stop -1.0: give a loss in nats, or 0 for never"),
        ("--early-stop nan", "--early-stop nan: give a loss in nats, or 0 for never"),
        ("--everyday-share -1", "--everyday-share -1.0: give a number from 0 to 100, such as 0.25"),
        ("--report-to nowhere", "--report-to nowhere: give wandb or swanlab"),
        ("--report-to wandb", "--report-to wandb: not installed; pip install wandb"),
        ("--clear-cache-threshold much",
         "argument --clear-cache-threshold: 'much': give a size such "
         "as 2GB"),
        ("--bias-correction --optimizer sgd", "--bias-correction: sgd has none; use adam or adamw"),
        ("--engine mlx_lm --decay", "--decay: mlx_lm.lora has no such setting; leave out the flag, "
         "or ENGINE=mlx_lm"),
        ("--engine mlx_lm --resume", "--resume: mlx_lm.lora has no such setting; leave out the "
         "flag, or ENGINE=mlx_lm"),
        ("--res", "unrecognized arguments: --res"),
    ],
)  # fmt: skip
def test_a_flag_that_can_not_be(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["--train", *flags.split()])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"python -m slang.train: error: {message}"


OPTIMIZERS = "adam or adamw or muon or sgd or adafactor"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iters: 10\n\tbatch_size: 8", ":2: not valid YAML; mend the line"),
        ("a: &a [*a", ":1: not valid YAML; mend the line"),
        ("when: 2020-13-45", ":1: not valid YAML; mend the line"),
        ("[" * 3000, ":1: not valid YAML; mend the line"),
        ("- iters", ": no settings in it; write one a line, such as iters: 100"),
        ("", ": no settings in it; write one a line, such as iters: 100"),
        ("itres: 5", ": unknown setting itres; is it iters?"),
        ("hf_dataset: {path: x}", ": unknown setting hf_dataset; take it out"),
        ("5: 5", ": unknown setting 5; take it out"),
        ("iters: five", f": iters 'five': {WHOLE}"),
        ("iters: 1.5", f": iters 1.5: {WHOLE}"),
        ("iters: true", f": iters True: {WHOLE}"),
        ("seed: 1e5000", ": seed inf: give a whole number from 0"),
        ("test: 1", ": test 1: give true or false"),
        ("model: 5", ": model 5: give a text"),
        ("data: [a]", ": data ['a']: give a text"),
        ("fine_tune_type: magic", ": fine_tune_type 'magic': give lora or dora or full"),
        ("keep: maybe", ": keep 'maybe': give best or last"),
        ("optimizer: nope", f": optimizer 'nope': give {OPTIMIZERS}"),
        ("optimizer: [adam]", f": optimizer ['adam']: give {OPTIMIZERS}"),
        ("optimizer_config: 5",
         ": optimizer_config 5: give adam, adamw, muon, sgd, adafactor, each "
         "on a line below it"),
        ("optimizer_config: {adam: {beta: 5}}", ": optimizer_config.adam: unknown setting beta; is "
         "it betas?"),
        ("optimizer_config: {adam: {betas: 5}}", ": optimizer_config.adam.betas 5: give a list of "
         "two numbers"),
        ("optimizer_config: {adam: {eps: .nan}}", ": optimizer_config.adam.eps nan: give a number"),
        ("lr_schedule: 5", ": lr_schedule 5: give name, arguments, warmup, warmup_init, each on a "
         "line below it"),
        ("lr_schedule: {name: nope, arguments: [1]}",
         ": lr_schedule.name 'nope': give cosine_decay or "
         "exponential_decay or linear_schedule or step_decay"),
        ("lr_schedule: {name: cosine_decay}", ": lr_schedule: no arguments in it; write it there"),
        ("lr_schedule: {name: cosine_decay, arguments: []}", ": lr_schedule.arguments []: give a "
         "list of numbers"),
        ("lr_schedule: {name: cosine_decay, arguments: [x]}",
         ": lr_schedule.arguments ['x']: give a "
         "list of numbers"),
        ("lora_parameters: 5",
         ": lora_parameters 5: give rank, scale, dropout, keys, each on a line "
         "below it"),
        ("lora_parameters: {rank: 0, scale: 1, dropout: 0}", f": lora_parameters.rank 0: {RANK}"),
        ("lora_parameters: {rank: 1, scale: .nan, dropout: 0}",
         f": lora_parameters.scale nan: {RATE}"),
        ("lora_parameters: {rank: 1, scale: .inf, dropout: 0}",
         f": lora_parameters.scale inf: {RATE}"),
        ("lora_parameters: {rank: 1, scale: 1, dropout: 1}", ": lora_parameters.dropout 1: give a "
         "number from 0, below 1"),
        ("lora_parameters: {rank: 1, dropout: 0}", ": lora_parameters: no scale in it; write it "
         "there"),
        ("lora_parameters: {rank: 1, alpha: 1, dropout: 0}", ": lora_parameters: unknown setting "
         "alpha; take it out"),
        ("lora_parameters: {rank: 1, scale: 1, dropout: 0, keys: nope}", ": lora_parameters.keys "
         "'nope': give a list of names, such as [self_attn.q_proj]"),
        ("lora_parameters: {rank: 2147483647, scale: 1, dropout: 0}",
         f": lora_parameters.rank 2147483647: {RANK}"),
        ("lora_parameters: {rank: 1, scale: 1e300, dropout: 0}",
         f": lora_parameters.scale 1e+300: {RATE}"),
        ("config: other.yaml", ": config: take it out; a file names no other"),
        ("report_to: 5", ": report_to 5: give wandb or swanlab"),
        ("report_to: wandb", ": report_to wandb: not installed; pip install wandb"),
    ],
)  # fmt: skip
def test_a_yaml_file_that_can_not_be(text, message, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as refused:
        parse(["--train", "-c", str(path)])
    assert str(refused.value) == f"{path}{message}"


def test_a_yaml_file_that_is_not_utf_8(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"iters: 5\nproject_name: caf\xe9\n")
    with pytest.raises(UserError, match=r":2: not UTF-8; save the file as UTF-8$"):
        parse(["--train", "-c", str(path)])


def test_a_yaml_file_may_be_a_pipe():
    reading, writing = os.pipe()
    os.write(writing, b"iters: 3\n")
    os.close(writing)
    assert parse(["--train", "-c", f"/dev/fd/{reading}"]).iters == 3
    os.close(reading)


def test_train_sh_trains_whatever_the_file_says(tmp_path):
    with pytest.raises(UserError, match=r"x.yaml: train: take it out; train.sh trains$"):
        merged(tmp_path, "train: false")
    assert merged(tmp_path, "train: true").train


def test_a_yaml_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        parse(["-c", str(tmp_path / "none.yaml")])


WRAPPER = [
    "--train",
    "--batch-size",
    "16",
    "--epochs",
    "5",
    "--decay",
    "--bias-correction",
    "--model",
    "m",
]


def merged(tmp_path: Path, text: str, *typed: str) -> Settings:
    """What comes of a wrapper's defaults, a YAML file, and what a person typed."""
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    return parse([*WRAPPER, "--typed", "-c", str(path), *typed])


def test_typed_over_yaml_over_a_wrappers_defaults(tmp_path):
    some = merged(tmp_path, "batch_size: 8\nlearning_rate: 1e-5\ndecay: false\n")
    assert (some.batch_size, some.learning_rate, some.decay, some.epochs) == (8, 1e-5, False, 5)
    assert merged(tmp_path, "batch_size: 8\n", "--batch-size", "4").batch_size == 4
    assert merged(tmp_path, "seed: 1\n", "--no-decay").decay is False
    assert merged(tmp_path, "learning_rate:\n").learning_rate == 1e-5  # as mlx_lm: not given


def test_steps_win_over_passes_of_the_same_source_or_an_earlier_one(tmp_path):
    def lengths(text: str, *typed: str) -> tuple:
        some = merged(tmp_path, text, *typed)
        return some.iters, some.epochs

    assert lengths("seed: 1") == (None, 5)
    assert lengths("iters: 7") == (7, None)
    assert lengths("iters: 7", "--epochs", "2") == (None, 2)
    assert lengths("epochs: 7") == (None, 7)
    assert lengths("epochs: 7", "--iters", "2") == (2, None)
    assert lengths("seed: 1", "--iters", "2", "--epochs", "3") == (2, None)


def test_what_a_wrapper_decides_is_not_for_a_yaml_file(tmp_path):
    with pytest.raises(UserError, match=r"x\.yaml: model: take it out; MODEL decides it$"):
        merged(tmp_path, "model: other")


def test_a_schedule_and_a_rate_do_not_go_together(tmp_path, capsys):
    text = "lr_schedule: {name: linear_schedule, arguments: [1e-4, 0, 100]}"
    assert merged(tmp_path, text).lr_schedule.arguments == [1e-4, 0, 100]
    with pytest.raises(SystemExit):
        merged(tmp_path, text, "--learning-rate", "1e-3")
    assert "--learning-rate: " in capsys.readouterr().err
    assert merged(tmp_path, text, "--no-decay").lr_schedule.arguments == [1e-4, 0, 100]


def test_dropout_and_layers_that_are_computed_again_do_not_go_together(tmp_path):
    text = "lora_parameters: {rank: 4, scale: 1, dropout: 0.1}\ngrad_checkpoint: true"
    with pytest.raises(UserError, match=r"x\.yaml: grad_checkpoint: not with dropout, as "):
        merged(tmp_path, text)


def test_a_wrappers_bias_correction_gives_way_to_another_optimizer(tmp_path):
    assert merged(tmp_path, "seed: 1").optimizer_options() == {"bias_correction": True}
    assert merged(tmp_path, "seed: 1", "--optimizer", "sgd").optimizer_options() == {}
    without = "optimizer_config: {adam: {bias_correction: false, eps: 1e-7}}"
    assert merged(tmp_path, without).optimizer_options() == {"eps": 1e-7}
    stock = parse(["--train", "--engine", "mlx_lm", "-c", str(tmp_path / "x.yaml")])
    assert stock.builtins()["optimizer_config"]["adam"] == {"eps": 1e-7, "bias_correction": False}
    typed = merged(tmp_path, without, "--bias-correction").optimizer_options()
    assert typed == {"eps": 1e-7, "bias_correction": True}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_parameters: {rank: 4, scale: 1, dropout: 0, keys: [nope]}",
         "lora_parameters.keys: the model has no layer nope; name those such as self_attn.q_proj"),
        ("lora_parameters: {rank: 4, scale: 1, dropout: 0, keys: [input_layernorm]}",
         "lora_parameters.keys: Can't convert layer of type RMSNorm to LoRA; name linear layers"),
        ("lora_parameters: {rank: 4, scale: 1, dropout: 0, keys: []}",
         "lora_parameters.keys: no layer gets an adapter; name linear layers"),
        ("num_layers: 99", "--num-layers 99: the model has 6; -1 is all of them"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model(text, message, tmp_path):
    from mlx_lm.utils import load_model

    from slang.train.model import add_adapter

    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    net, _ = load_model(ROOT / "models/tiny-gemma3", lazy=True)
    settings = parse(
        ["-c", str(path), "--num-layers", "-1"] if "num" not in text else ["-c", str(path)]
    )
    with pytest.raises(UserError) as refused:
        add_adapter(settings, net)
    assert str(refused.value) == message


@pytest.mark.parametrize("arguments", ["[1e-4]", "[1, 2, 3, 4, 5, 6]"])
def test_a_schedule_with_other_arguments(arguments, tmp_path):
    from slang.train.model import learning_rate

    path = tmp_path / "x.yaml"
    path.write_text(f"lr_schedule: {{name: linear_schedule, arguments: {arguments}}}")
    with pytest.raises(
        UserError, match=r"x\.yaml: lr_schedule\.arguments: .*; see mlx\.optimizers"
    ):
        learning_rate(parse(["-c", str(path)]), 10)


def test_from_a_terminal_it_is_one_line():
    """Through the one boundary, imports included."""
    program = [sys.executable, "-m", "slang.train", "--train", "--model", "models/none"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "mlx-community/WikiSQL: no such folder; name one with train.jsonl in it\n"
