"""What several tests of the zoo train on."""

import pytest
from toys import noisy_patterns

from fadiag_fast.zoo import ImageDataset


@pytest.fixture(scope="session")
def images() -> ImageDataset:
    """Noisy 1x8x8 patterns of four classes: a transformer's patches of 4 fit."""
    return noisy_patterns("patterns", (1, 8, 8), train=128, test=96, noise=1.0)
