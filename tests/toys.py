"""An easy image set and an awkward rule that several tests train on."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fadiag_fast.zoo import ImageDataset
from fadiag_fast.zoo.rules import Backpropagation


def noisy_patterns(
    name: str, shape: tuple[int, ...], *, train: int, test: int, noise: float
) -> ImageDataset:
    """Four classes, each a pattern under noise of so many times its own scale."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(4, *shape, generator=generator)

    def split(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(count) % 4
        return patterns[labels] + noise * torch.randn(count, *shape, generator=generator), labels

    return ImageDataset(name, *split(train), *split(test), num_classes=4, input_shape=shape)


class Decaying(Backpropagation):
    """Count in a Python number, and do less with every step."""

    name = "decaying"
    share = 1.0

    def losses(self, x, y):
        self.share = self.share * 0.9
        return {"loss": F.cross_entropy(self.model(x), y) * self.share}
