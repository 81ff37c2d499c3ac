"""What the tests of the integrations share: a small task, and figures by plain hooks."""

from importlib.util import find_spec

import pytest
import torch
from recorder import TinyMLP
from torch import nn

from benchmarks.vision import import_torchvision

pytest.importorskip("fadiag_fast.training.probe", reason="needs StepProbe")

if find_spec("torchvision") is not None:
    # The libraries import it where they find it, and its wheel may not fit this torch.
    import_torchvision()


class Breaking(TinyMLP):
    """A residual MLP of which ``blocks.1`` breaks before training pass ``break_at``."""

    def __init__(self, break_at=None):
        super().__init__()
        self.break_at, self.calls = break_at, 0

    def forward(self, x):
        if self.training:
            if self.calls == self.break_at:
                with torch.no_grad():
                    for parameter in self.blocks[1].parameters():
                        parameter.mul_(100)
            self.calls += 1
        return super().forward(x)


TAPS = ["embed", "blocks.0", "blocks.1", "blocks.2", "blocks.3"]


def task(samples):
    torch.manual_seed(1)
    x = torch.randn(samples, 20)
    return x, nn.Linear(20, 5)(x).argmax(1).detach()


def first_norms(model, x):
    """Median ‖h‖ per tap over the samples, and median ‖∂loss/∂h‖ of the mean loss over them."""
    import copy

    model, states = copy.deepcopy(model).eval(), []
    for module in (model.embed, *model.blocks):
        module.register_forward_hook(lambda _m, _a, out: states.append(out))
    with torch.no_grad():
        model(x)
    return [state.norm(dim=1).median().item() for state in states]
