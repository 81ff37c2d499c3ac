"""What tests of whole scans share."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Networks this small are slower on several threads, and their sums depend on how many."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
