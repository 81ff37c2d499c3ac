"""Content and configuration hashes: equal for equals, and for nothing else."""

import math
import os

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from fadiag_fast.scanning import ContentHasher, config_hash, content_hash


def test_a_file_is_hashed_as_its_bytes(tmp_path):
    data = os.urandom((1 << 20) + 17)  # not a whole number of chunks
    (tmp_path / "x").write_bytes(data)
    assert content_hash(tmp_path / "x") == f"xxh3:{xxhash.xxh3_128_hexdigest(data)}"
    hasher = ContentHasher()
    for start in range(0, len(data), 1000):
        hasher.update(memoryview(data)[start : start + 1000])
    assert hasher.result() == content_hash(tmp_path / "x")
    (tmp_path / "empty").touch()
    assert content_hash(tmp_path / "empty") != content_hash(tmp_path / "x")


def test_a_folder_is_its_names_and_contents(tmp_path):
    def folder(name, files):
        for path, text in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text)
        return content_hash(tmp_path / name)

    first = folder("a", {"x.pt": "1", "deep/y.pt": "2"})
    os.utime(tmp_path / "a" / "x.pt", (1, 1))
    assert content_hash(tmp_path / "a") == first
    assert folder("b", {"deep/y.pt": "2", "x.pt": "1"}) == first
    others = [{"x.pt": "2", "deep/y.pt": "1"}, {"x.pt": "1", "y.pt": "2"}, {"x.pt": "12"}]
    assert len({first, *(folder(f"c{i}", files) for i, files in enumerate(others))}) == 4


def test_what_cannot_be_read_raises(tmp_path):
    with pytest.raises(FileNotFoundError):
        content_hash(tmp_path / "nothing")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_configurations_are_hashed_in_any_order(config):
    reordered = dict(reversed(list(config.items())))
    assert config_hash(config) == config_hash(reordered)
    assert config_hash({**config, "one more": 1}) != config_hash(config)
    assert config_hash({"x": [1, 2]}) == config_hash({"x": (1, 2)})


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"a": {"b": [object()]}}, TypeError, r"config\.a\.b\[0\]: expected a JSON value"),
        ({"a": {1: 2}}, TypeError, r"config\.a: expected text keys, got 1"),
        ({"a": math.nan}, ValueError, r"config\.a: expected a finite number, got nan"),
    ],
)
def test_what_has_no_single_text_is_refused(config, error, message):
    with pytest.raises(error, match=message):
        config_hash(config)
