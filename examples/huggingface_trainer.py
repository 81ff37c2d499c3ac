"""Probe every step under transformers' Trainer, on a tiny GPT-2 without any download."""

import argparse
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from fadiag_fast.integrations.huggingface import FadiagTrainerCallback


def main(steps: int = 20, out: str = "huggingface-steps.jsonl", **options) -> Trainer:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64,
        n_positions=16,
        n_embd=32,
        n_layer=3,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    texts = torch.randint(0, 64, (128, 16))
    data = [{"input_ids": text, "labels": text} for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **options,
        )
        trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=data)
        FadiagTrainerCallback(sinks=out).attach(trainer)
        trainer.train()
    print(f"{out}: {trainer.state.global_step} steps; fadiag watch {out}")
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="huggingface-steps.jsonl")
    asked = parser.parse_args()
    main(asked.steps, asked.out)
