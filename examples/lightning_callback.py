"""Probe every step under Lightning, two micro-batches each: one callback."""

import argparse

import pytorch_lightning as lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fadiag_fast.integrations.lightning import FadiagCallback
from fadiag_fast.zoo import build_model


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = build_model("resmlp", input_shape=(1, 8, 8), num_classes=4)

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(steps: int = 30, out: str = "lightning-steps.jsonl", **trainer_options) -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 64)
    data = DataLoader(TensorDataset(x, nn.Linear(64, 4)(x).argmax(1)), batch_size=32)
    trainer = lightning.Trainer(
        max_steps=steps,
        accumulate_grad_batches=2,
        callbacks=[FadiagCallback(sinks=out)],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        **trainer_options,
    )
    trainer.fit(Classifier(), data)
    print(f"{out}: {trainer.global_step} steps; fadiag watch {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", default="lightning-steps.jsonl")
    asked = parser.parse_args()
    main(asked.steps, asked.out)
