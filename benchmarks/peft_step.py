"""A training step of Hugging Face PEFT on PyTorch, for benchmarks/train_step.py, which runs this in
another environment.

Reads   a model's folder, and a JSON file of rows: [[tokens, start of the answer], ...]
Writes  {"seconds": [of each step, ...], "peak": of the process, in GB} to stdout

As a person would set it up: LoRA of rank 8 on every linear layer, float32, AdamW, rows padded to
the longest of them.
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def main(model_folder: str, rows_file: str, steps: int, threads: int) -> None:
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    adapter = LoraConfig(
        r=8, lora_alpha=160, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, adapter)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    rows = json.loads(Path(rows_file).read_text(encoding="utf-8"))
    longest = max(len(tokens) for tokens, _ in rows)
    inputs = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in rows])
    seen = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens, _ in rows])
    places = torch.arange(longest)
    labels = torch.stack([
        torch.where((places >= start) & (places < len(tokens)), row, -100)
        for row, (tokens, start) in zip(inputs, rows, strict=True)
    ])  # fmt: skip

    seconds = []
    for _ in range(steps + 1):
        begin = clock()
        model(input_ids=inputs, attention_mask=seen, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(clock() - begin)
    peak = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / 1e9
    )
    # The first step builds what is built once.
    print(json.dumps({"seconds": seconds[1:], "peak": peak}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
