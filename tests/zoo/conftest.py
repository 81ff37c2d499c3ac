"""What several tests of the zoo train on."""

import pytest
import torch

from fadiag_fast.zoo import ImageDataset


@pytest.fixture(scope="session")
def images() -> ImageDataset:
    """Noisy 1x8x8 patterns of four classes: a transformer's patches of 4 fit."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(4, 1, 8, 8, generator=generator)

    def split(count):
        labels = torch.arange(count) % 4
        return patterns[labels] + torch.randn(count, 1, 8, 8, generator=generator), labels

    return ImageDataset("patterns", *split(128), *split(96), num_classes=4, input_shape=(1, 8, 8))
