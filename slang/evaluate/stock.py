"""The test loss that mlx_lm itself prints."""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from slang import jsonl
from slang.errors import UserError

FLAGS = (
    ("--batch-size", "1"),  # every row counts: mlx_lm drops the last batch when it is not full
    ("--test-batches", "-1"),  # all of them
    ("--mask-prompt",),  # the loss of the answer, not of the question
)


def test_loss(model: str, adapter: str, rows: list[jsonl.Record]) -> str:
    """`Test loss 2.345, Test ppl 10.433.`, as mlx_lm.lora --test prints it of these records.

    adapter  "" is the base model
    mlx_lm reads the records from a file of our own: it stops at a blank line and at a BOM.
    Raises UserError when it fails; its own words are on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / "test.jsonl").open("wb") as file:
            file.writelines(map(jsonl.dumps, rows))
        command = ["mlx_lm.lora", "--test", "--model", model, "--adapter-path", adapter]
        command += ["--data", folder, *(part for flag in FLAGS for part in flag)]
        print("+", shlex.join(command), file=sys.stderr)
        # Ctrl-C does not reach a process in a session of its own: it is ended when this one stops.
        done = subprocess.run(
            [sys.executable, "-m", "slang.errors", *command],
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "PYTHONUTF8": "1"},
            start_new_session=True,
        )
    if done.returncode:
        raise UserError("mlx_lm.lora --test failed, see above; --quick does without it")
    found = re.search(r"Test loss \S+, Test ppl \S+", done.stdout)
    if not found:
        raise UserError("mlx_lm.lora --test printed no loss; --quick does without it")
    return found[0]
