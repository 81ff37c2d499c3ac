"""Devices to test on, and oracles that share no code with the package."""

import numpy as np
import pytest
import torch
from toys import noisy_patterns

from fadiag_fast.ops import LIBRARIES
from fadiag_fast.zoo import ImageDataset

CUDA_REASON = (
    "no CUDA device"
    if not torch.cuda.is_available()
    else LIBRARIES["cuda"].reason  # empty where the library is loaded
)


def pytest_collection_modifyitems(items):
    if CUDA_REASON:
        skip = pytest.mark.skip(reason=f"needs CUDA: {CUDA_REASON}")
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def one_thread():
    """Networks this small are slower on several threads, and their sums depend on how many."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def images() -> ImageDataset:
    """Noisy 1x8x8 patterns of four classes: a transformer's patches of 4 fit."""
    return noisy_patterns("patterns", (1, 8, 8), train=128, test=96, noise=1.0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=["native", "torch"])
def backend(request, device):
    library = LIBRARIES[device.type]
    if request.param == "native" and not library.loaded:
        pytest.skip(f"native library: {library.reason}")
    return request.param


def wide(tensor):
    """The stored values in numpy's extended precision: 64 bits of mantissa, 15 of exponent."""
    return tensor.detach().cpu().double().numpy().astype(np.longdouble)


def oracle_norm(states):
    flat = wide(states).reshape(states.shape[0], -1)
    with np.errstate(invalid="ignore"):
        return np.sqrt((flat * flat).sum(axis=1))


def oracle_mean(grads):
    with np.errstate(invalid="ignore", divide="ignore"):
        return wide(grads).sum(axis=0) / np.longdouble(grads.shape[0])


def oracle_cosine(a, b):
    a, b = wide(a).ravel(), wide(b).ravel()
    with np.errstate(invalid="ignore", divide="ignore"):
        return float((a * b).sum() / np.sqrt((a * a).sum()) / np.sqrt((b * b).sum()))
