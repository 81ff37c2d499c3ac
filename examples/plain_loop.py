"""Probe every step of a plain loop: JSON lines, and an alarm when a block breaks.

Run it, then look at the file: ``fadiag watch steps.jsonl``.
"""

import argparse

import torch
from torch import nn

from fadiag_fast.training import Alarms, StepProbe, TrainingStopped, guard
from fadiag_fast.zoo import build_model


def main(steps: int = 200, out: str = "steps.jsonl", break_at: int | None = 150) -> None:
    torch.manual_seed(0)
    model = build_model("resmlp", input_shape=(1, 8, 8), num_classes=4)
    teacher = nn.Linear(64, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    lines = guard(out)
    alarms = Alarms(actions=["warn", "stop"], on_event=lines.event)
    probe = StepProbe(model, sink=[lines, alarms])
    try:
        for step in range(steps):
            if step == break_at:
                with torch.no_grad():
                    for parameter in model.blocks[2].parameters():
                        parameter.mul_(30)
            x = torch.randn(64, 64)
            loss = nn.functional.cross_entropy(model(x), teacher(x).argmax(1))
            loss.backward()
            probe.step()
            if alarms.stop_requested:
                break
            optimizer.step()
            optimizer.zero_grad()
        probe.flush()
    except TrainingStopped as stopped:
        print(stopped)
    finally:
        probe.remove()
        lines.close()
    print(f"{out}: {len(alarms.events)} alarms; fadiag watch {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", default="steps.jsonl")
    asked = parser.parse_args()
    main(asked.steps, asked.out)
