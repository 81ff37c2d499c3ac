"""Damaged files: refused, or exactly what torch reads, and the same to a scan and a diagnosis."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from checkpoint_fuzz import by_torch, mutated_files, tensors_in, whole_files
from test_checkpoints import raw_bytes

from fadiag_fast.checkpoints import CheckpointError, load_checkpoint, read_into

SLAB = torch.zeros(1 << 18, dtype=torch.uint8)


def assert_refused_or_torchs(path: Path, what: str) -> bool:
    """Check a file; say whether it was read."""
    data = path.read_bytes()
    try:
        got = load_checkpoint(path)
    except CheckpointError as error:
        with pytest.raises(type(error)):
            read_into(path, SLAB)
        return False
    wanted = tensors_in(by_torch(data))
    assert wanted is not None, f"{what}: read although torch refuses it"
    removed = got.removed_prefix
    for found in (got.state_dict, read_into(path, SLAB).tensors(SLAB)):
        assert [removed + name for name in found] == list(wanted), what
        for name, tensor in found.items():
            expected = wanted[removed + name]
            assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape), what
            assert raw_bytes(tensor) == raw_bytes(expected), what
    return True


@pytest.mark.parametrize("kind", whole_files())
def test_whole_files_are_read(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.pt").write_bytes(whole_files()[kind])
    assert assert_refused_or_torchs(tmp_path / "a.pt", kind)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files(tmp_path: Path, seed: int) -> None:
    read = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, on pickles of other protocols
        for number, (what, data) in enumerate(mutated_files(seed, 50)):
            path = tmp_path / f"{number}.pt"
            path.write_bytes(data)
            read += assert_refused_or_torchs(path, f"{what}, seed {seed}, file {number}")
    assert read < 50
