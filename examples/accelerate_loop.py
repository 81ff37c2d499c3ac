"""Probe every step of an accelerate loop, two micro-batches each."""

import argparse

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fadiag_fast.integrations.accelerate import prepare_probe
from fadiag_fast.zoo import build_model


def main(steps: int = 30, out: str = "accelerate-steps.jsonl") -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = build_model("resmlp", input_shape=(1, 8, 8), num_classes=4)
    x = torch.randn(64 * steps, 64)
    loader = DataLoader(TensorDataset(x, nn.Linear(64, 4)(x).argmax(1)), batch_size=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    with prepare_probe(accelerator, model, sinks=out) as probe:
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(inputs), labels))
                probe.step()
                optimizer.step()
                optimizer.zero_grad()
    print(f"{out}: {steps} steps; fadiag watch {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", default="accelerate-steps.jsonl")
    asked = parser.parse_args()
    main(asked.steps, asked.out)
