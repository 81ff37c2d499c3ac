"""Reading image sets: what comes out, what is refused, and that nothing in a file runs."""

import codecs
import gzip
import hashlib
import os
import pickle

import numpy as np
import pytest
import torch

from fadiag_fast.checkpoints.numpy_pickle import OFFERED
from fadiag_fast.checkpoints.restricted_pickle import read_pickle
from fadiag_fast.zoo import ImageDataset, load_dataset, teacher_dataset
from fadiag_fast.zoo.data import CIFAR10_MEAN, CIFAR10_STD, MINI_FOLDER

# Of the decompressed files; made from the four original files with the lines in the README there.
MINI_SHA256 = {
    "train-images-idx3-ubyte": "6dded81672539b5d148c1a85358069d1808c316dc6f6c0abfd12ba3ced5dd394",
    "train-labels-idx1-ubyte": "d7c464914ae4b919728c5c99c3cdde5a0259febf1e99ddc6927a15768731d7dc",
    "t10k-images-idx3-ubyte": "862035b0a96959b614c9574f4c2b0ae9584ca234813e8d6d7adb7838b12ca46b",
    "t10k-labels-idx1-ubyte": "aa3f574d30afaf0d4d9da084a6f8541771e20693d6a97fae6e9a4953fca8f078",
}
TRAIN_HISTOGRAM = [560, 643, 608, 612, 584, 594, 590, 617, 590, 602]
TEST_HISTOGRAM = [200, 203, 214, 190, 219, 195, 197, 200, 194, 188]


@pytest.fixture(scope="module")
def mini() -> ImageDataset:
    return load_dataset("fashion-mnist-mini")


# The shipped subset


@pytest.mark.parametrize("name", sorted(MINI_SHA256))
def test_shipped_files_are_the_first_records(name):
    content = gzip.decompress((MINI_FOLDER / f"{name}.gz").read_bytes())
    assert hashlib.sha256(content).hexdigest() == MINI_SHA256[name]


def test_shipped_subset_has_its_licence_beside_it():
    text = (MINI_FOLDER / "LICENSE").read_text(encoding="utf-8")
    assert "Copyright (c) 2017 Zalando SE" in text
    assert "WITHOUT WARRANTY OF ANY KIND" in text


def test_shipped_subset_loads(mini):
    assert mini.name == "fashion-mnist-mini"
    assert mini.num_classes == 10
    assert mini.input_shape == (1, 28, 28)
    assert mini.train_images.shape == (6000, 1, 28, 28)
    assert mini.test_images.shape == (2000, 1, 28, 28)
    assert mini.train_images.dtype == torch.float32
    assert mini.train_labels.dtype == torch.int64
    assert torch.bincount(mini.train_labels).tolist() == TRAIN_HISTOGRAM
    assert torch.bincount(mini.test_labels).tolist() == TEST_HISTOGRAM
    # The first labels of the original test file, as published.
    assert mini.test_labels[:8].tolist() == [9, 2, 1, 1, 6, 1, 4, 6]


def test_pixels_are_fractions_of_the_stored_bytes(mini):
    for name, images in (("train", mini.train_images), ("t10k", mini.test_images)):
        raw = gzip.decompress((MINI_FOLDER / f"{name}-images-idx3-ubyte.gz").read_bytes())
        stored = np.frombuffer(raw, np.uint8, offset=16).reshape(images.shape)
        np.testing.assert_allclose(images.numpy(), stored / 255, rtol=1e-6)


# Evaluation batches


def test_eval_batches_are_the_first_test_images_in_order(mini):
    batches = mini.eval_batches()
    assert len(batches) == 10
    assert torch.equal(torch.cat([x for x, _ in batches]), mini.test_images[:1280])
    assert torch.equal(torch.cat([y for _, y in batches]), mini.test_labels[:1280])
    assert all(x.shape == (128, 1, 28, 28) for x, _ in batches)


def test_eval_batches_flatten_and_move(mini):
    ((x, y),) = mini.eval_batches(4, 1, flatten=True, device="meta")
    assert x.shape == (4, 784)
    assert x.device.type == y.device.type == "meta"


def test_eval_batches_refuse_a_set_that_is_too_small(mini):
    with pytest.raises(ValueError, match="expected 20 batches of 128 = 2560 test images, got 2000"):
        mini.eval_batches(num_batches=20)


@pytest.mark.parametrize("sizes", [(0, 10), (128, 0), (-1, 10)])
def test_eval_batches_refuse_sizes_below_one(mini, sizes):
    with pytest.raises(ValueError, match="batch_size and num_batches of at least 1"):
        mini.eval_batches(*sizes)


# Fashion-MNIST's idx files


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim])
    return header + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def fashion_files(seed: int = 0) -> dict[str, bytes]:
    rng = np.random.default_rng(seed)
    return {
        "train-images-idx3-ubyte": idx(rng.integers(0, 256, (12, 4, 3), dtype=np.uint8)),
        "train-labels-idx1-ubyte": idx(np.arange(12, dtype=np.uint8) % 10),
        "t10k-images-idx3-ubyte": idx(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)),
        "t10k-labels-idx1-ubyte": idx(np.array([3, 1, 4, 1, 5], dtype=np.uint8)),
    }


def write_fashion(folder, compressed=False, **replaced):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {**fashion_files(), **replaced}.items():
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("sub_folder", ["", "FashionMNIST/raw"])
def test_fashion_mnist_is_found_and_read(tmp_path, compressed, sub_folder):
    write_fashion(tmp_path / sub_folder, compressed)
    dataset = load_dataset(f"fashion-mnist:{tmp_path}")
    assert dataset.input_shape == (1, 4, 3)
    assert dataset.num_classes == 10
    assert dataset.train_labels.tolist() == [*range(10), 0, 1]
    assert dataset.test_labels.tolist() == [3, 1, 4, 1, 5]
    files = fashion_files()
    train = np.frombuffer(files["train-images-idx3-ubyte"][16:], np.uint8).astype(np.float64)
    expected = train.reshape(12, 1, 4, 3) / 255
    np.testing.assert_allclose(dataset.train_images.numpy(), expected, rtol=1e-6)


def test_fashion_mnist_missing_folder(tmp_path):
    missing = tmp_path / "nowhere"
    with pytest.raises(
        FileNotFoundError, match=r"fashion-mnist: expected a folder .*nowhere, got nothing there"
    ):
        load_dataset(f"fashion-mnist:{missing}")


def test_fashion_mnist_missing_file(tmp_path):
    write_fashion(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"expected t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz in .*got t10k-images",
    ):
        load_dataset(f"fashion-mnist:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "train-images-idx3-ubyte",
            fashion_files()["train-images-idx3-ubyte"][:-1],
            r"expected 160 bytes for an idx array of shape \[12, 4, 3\] in .*, got 159",
        ),
        (
            "train-images-idx3-ubyte",
            fashion_files()["train-images-idx3-ubyte"] + b"\0",
            r"expected 160 bytes .*, got 161",
        ),
        ("t10k-images-idx3-ubyte", b"\0\0\x08\x03\0\0", "expected an idx header of 16 bytes"),
        (
            "t10k-labels-idx1-ubyte",
            fashion_files()["t10k-images-idx3-ubyte"],
            "expected the idx magic number 0x00000801 in .*, got 0x00000803",
        ),
        ("t10k-labels-idx1-ubyte", b"", "expected the idx magic number 0x00000801 in .*, got 0x"),
        (
            "train-labels-idx1-ubyte",
            idx(np.zeros(11, np.uint8)),
            "expected 12 training labels for 12 training images in .*, got 11",
        ),
        (
            "t10k-labels-idx1-ubyte",
            idx(np.array([0, 1, 2, 3, 10], np.uint8)),
            r"expected test labels in \[0, 10\) in .*, got labels from 0 to 10",
        ),
        (
            "t10k-images-idx3-ubyte",
            idx(np.zeros((5, 3, 4), np.uint8)),
            r"expected test images of shape \[1, 4, 3\] like .*, got \[1, 3, 4\]",
        ),
        (
            "t10k-images-idx3-ubyte",
            idx(np.zeros((0, 4, 3), np.uint8)),
            "expected at least one test image in .*, got none",
        ),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_fashion_mnist_damaged_files(tmp_path, name, content, message, compressed):
    write_fashion(tmp_path, compressed, **{name: content})
    with pytest.raises(ValueError, match=f"load_dataset: fashion-mnist: {message}"):
        load_dataset(f"fashion-mnist:{tmp_path}")


@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda raw: b"not gzip" + raw])
def test_fashion_mnist_damaged_gzip(tmp_path, damage):
    write_fashion(tmp_path, compressed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"expected a whole gzip file in .*train-images"):
        load_dataset(f"fashion-mnist:{tmp_path}")


# CIFAR-10

CIFAR_NAMES = [*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"]


def cifar_batch(index: int, count: int = 3) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(index)
    data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
    return data, rng.integers(0, 10, count).tolist()


def write_cifar_pickles(folder, protocol=2, **replaced):
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(CIFAR_NAMES):
        data, labels = cifar_batch(index)
        content = replaced.get(name, {b"data": data, b"labels": labels, b"batch_label": b"tiny"})
        if not isinstance(content, bytes):
            content = pickle.dumps(content, protocol=protocol)
        (folder / name).write_bytes(content)


def write_cifar_binary(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(CIFAR_NAMES):
        data, labels = cifar_batch(index)
        column = np.array(labels, dtype=np.uint8)[:, None]
        (folder / f"{name}.bin").write_bytes(np.concatenate([column, data], axis=1).tobytes())


def check_tiny_cifar(dataset):
    assert dataset.num_classes == 10
    assert dataset.input_shape == (3, 32, 32)
    batches = [cifar_batch(index) for index in range(6)]
    assert dataset.train_labels.tolist() == [y for _, labels in batches[:5] for y in labels]
    assert dataset.test_labels.tolist() == batches[5][1]
    pixels = np.concatenate([data for data, _ in batches[:5]]).reshape(15, 3, 32, 32) / 255
    mean, std = (np.reshape(values, (1, 3, 1, 1)) for values in (CIFAR10_MEAN, CIFAR10_STD))
    np.testing.assert_allclose(dataset.train_images.numpy(), (pixels - mean) / std, atol=1e-5)


@pytest.mark.parametrize("sub_folder", ["", "cifar-10-batches-py"])
@pytest.mark.parametrize("protocol", range(6))
def test_cifar10_python_version(tmp_path, sub_folder, protocol):
    write_cifar_pickles(tmp_path / sub_folder, protocol)
    check_tiny_cifar(load_dataset(f"cifar10:{tmp_path}"))


@pytest.mark.parametrize("sub_folder", ["", "cifar-10-batches-bin"])
def test_cifar10_binary_version(tmp_path, sub_folder):
    write_cifar_binary(tmp_path / sub_folder)
    check_tiny_cifar(load_dataset(f"cifar10:{tmp_path}"))


def test_cifar10_as_python_2_and_an_old_numpy_wrote_it(tmp_path):
    # Byte for byte what Python 2's cPickle.dump(…, protocol=2) makes of {'data': …, 'labels': …}:
    # 8-bit strings (opcodes U and T) and numpy.core.multiarray, as in the published files.
    def batch(index):
        data, labels = cifar_batch(index)
        return (
            b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03"
            b"cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05(K\x01K\x03M\x00\x0c\x86"
            b"cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNN"
            b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
            + data.nbytes.to_bytes(4, "little")
            + data.tobytes()
            + b"tbU\x06labelsq\x08]q\x09("
            + b"".join(b"K" + bytes([label]) for label in labels)
            + b"eu."
        )

    write_cifar_pickles(tmp_path, **{name: batch(i) for i, name in enumerate(CIFAR_NAMES)})
    check_tiny_cifar(load_dataset(f"cifar10:{tmp_path}"))


class Touch:
    """Unpickles into a call that makes a file: what a hostile pickle would do."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_cifar10_pickle_runs_nothing(tmp_path, protocol):
    canary = tmp_path / "canary"
    hostile = pickle.dumps(Touch(os.mkdir, str(canary)), protocol)
    write_cifar_pickles(tmp_path, data_batch_3=hostile)
    with pytest.raises(ValueError, match=r"cifar10: refused the global (posix|nt)\.mkdir in .*_3"):
        load_dataset(f"cifar10:{tmp_path}")
    assert not canary.exists()
    # The same bytes do run elsewhere: the test above would notice.
    pickle.loads(hostile)
    assert canary.exists()


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (eval, ("1",), "builtins.eval"),
        (getattr, ((), "__class__"), "builtins.getattr"),
        (np.load, ("x.npy",), r"numpy\S*\.load"),
        (codecs.lookup, ("zlib",), "_codecs.lookup"),
    ],
)
def test_cifar10_pickle_refuses_other_globals_by_name(tmp_path, function, arguments, name):
    write_cifar_pickles(tmp_path, test_batch=pickle.dumps(Touch(function, *arguments), 4))
    with pytest.raises(ValueError, match=f"cifar10: refused the global {name} in .*test_batch"):
        load_dataset(f"cifar10:{tmp_path}")


_TOUCH = b"X\x0c\x00\x00\x00touch canary"
_DTYPE = b"cnumpy\ndtype\nX\x02\x00\x00\x00%bK\x00K\x01\x87R"
_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"


@pytest.mark.parametrize(
    "code",
    [
        b"(" + _TOUCH + b"iposix\nsystem\n",  # INST
        b"(cposix\nsystem\n" + _TOUCH + b"o",  # OBJ
        b"\x82\x01" + _TOUCH + b"\x85R",  # EXT1
        b"X\x05\x00\x00\x00posixX\x06\x00\x00\x00system\x93" + _TOUCH + b"\x85R",
        b"Nr\xff\xff\xff\x7f" * 2 + b"cposix\nsystem\n" + _TOUCH + b"\x85R",  # a far memo
        _DTYPE % b"O8",
        _DTYPE % b"u1"
        + b"(K\x03X\x01\x00\x00\x00|X\x01\x00\x00\x00aNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
        _ARRAY + b"(K\x01J\xff\xff\xff\x7f\x85" + _DTYPE % b"u1" + b"\x89C\x01atb",
        _ARRAY + b"(K\x01J\xff\xff\xff\xff\x85" + _DTYPE % b"u1" + b"\x89C\x01atb",
        b"cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85\x81",  # NEWOBJ
    ],
)
def test_cifar10_hostile_pickle_is_refused(tmp_path, monkeypatch, code):
    monkeypatch.chdir(tmp_path)
    write_cifar_pickles(tmp_path, data_batch_2=b"\x80\x04" + code + b".")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"cifar10: (refused|expected a CIFAR-10 pickle) .*_2"):
        load_dataset(f"cifar10:{tmp_path}")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("dtype", ["?", "i1", "<u2", ">i4", "<f2", ">f8", "c16"])
@pytest.mark.parametrize("protocol", range(6))
def test_arrays_in_pickles_are_as_numpy_reads_them(dtype, protocol):
    rows = np.arange(-6, 6).reshape(3, 4).astype(dtype)
    wanted = [rows, np.asfortranarray(rows), rows[::2, 1:], rows[:1, 0].reshape(()), rows[:0]]
    made, _, refused = read_pickle(pickle.dumps(wanted, protocol), OFFERED)
    assert not refused
    for one, array in zip(made, wanted, strict=True):
        assert one.array.dtype == array.dtype
        np.testing.assert_array_equal(one.array, array, strict=True)


def test_cifar10_pickle_refuses_codecs_but_latin1(tmp_path):
    write_cifar_pickles(tmp_path, test_batch=pickle.dumps(Touch(codecs.encode, "x", "utf-8"), 2))
    with pytest.raises(ValueError, match=r"cifar10: .*test_batch, .*refused the codec 'utf-8'"):
        load_dataset(f"cifar10:{tmp_path}")


PIXELS, LABELS = cifar_batch(0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a CIFAR-10 pickle in .*, got one that is not read: it ends too early"),
        (b"\x80\x04not a pickle", "expected a CIFAR-10 pickle in "),
        ([1, 2], "expected a dictionary with data and labels in .*, got list"),
        ({b"labels": LABELS}, "expected data of uint8 in .*, got NoneType"),
        ({b"data": PIXELS.astype(np.float32), b"labels": LABELS}, "of uint8 in .*, got float32"),
        ({b"data": PIXELS[:, :-1], b"labels": LABELS}, r"\[N, 3072\] in .*, got \[3, 3071\]"),
        ({b"data": PIXELS}, "expected labels as a list of integers in .*, got NoneType"),
        ({b"data": PIXELS, b"labels": ["cat"] * 3}, "expected labels as a list of integers"),
        ({b"data": PIXELS, b"labels": LABELS[:2]}, "expected 3 labels for 3 images .*, got 2"),
        ({b"data": PIXELS, b"labels": [0, 1, 10]}, r"in \[0, 10\) in .*, got labels from 0 to 10"),
        # 256 is 0 in a byte: it must not wrap around into a valid label.
        ({b"data": PIXELS, b"labels": [0, 1, 256]}, "got labels from 0 to 256"),
        ({b"data": PIXELS, b"labels": [0, 1, -1]}, "got labels from -1 to 1"),
    ],
)
def test_cifar10_damaged_batch(tmp_path, content, message):
    write_cifar_pickles(tmp_path, test_batch=content)
    with pytest.raises(ValueError, match=f"load_dataset: cifar10: .*{message}"):
        load_dataset(f"cifar10:{tmp_path}")


def test_cifar10_truncated_binary(tmp_path):
    write_cifar_binary(tmp_path)
    path = tmp_path / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"expected a multiple of 3073 bytes in .*_2.bin, got 9218"
    ):
        load_dataset(f"cifar10:{tmp_path}")


def test_cifar10_missing_batch(tmp_path):
    write_cifar_pickles(tmp_path)
    (tmp_path / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match="expected data_batch_4 in "):
        load_dataset(f"cifar10:{tmp_path}")


def test_cifar10_empty_folder(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"expected data_batch_1 or data_batch_1.bin .* got an empty folder"
    ):
        load_dataset(f"cifar10:{tmp_path}")


def test_cifar10_archive_instead_of_a_folder(tmp_path):
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"expected a folder .*tar.gz, got a file"):
        load_dataset(f"cifar10:{archive}")


# npz files


def npz_arrays(shape: tuple[int, ...] = (4, 3), dtype: type = np.uint8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "train_images": rng.integers(0, 256, (6, *shape)).astype(dtype),
        "train_labels": np.array([0, 1, 2, 3, 0, 1]),
        "test_images": rng.integers(0, 256, (2, *shape)).astype(dtype),
        "test_labels": np.array([3, 1]),
    }


@pytest.mark.parametrize(
    ("shape", "input_shape"),
    [((4, 3), (1, 4, 3)), ((2, 4, 3), (2, 4, 3)), ((12,), (1, 1, 12))],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
def test_npz(tmp_path, shape, input_shape, dtype):
    arrays = npz_arrays(shape, dtype)
    np.savez(tmp_path / "set.npz", **arrays)
    dataset = load_dataset(f"npz:{tmp_path / 'set.npz'}")
    assert dataset.input_shape == input_shape
    assert dataset.num_classes == 4
    assert dataset.test_labels.tolist() == [3, 1]
    # Bytes are pixels; floats have been prepared by their owner.
    unit = 255 if dtype == np.uint8 else 1
    for split, images in (("train", dataset.train_images), ("test", dataset.test_images)):
        stored = arrays[f"{split}_images"].astype(np.float64).reshape(-1, *input_shape)
        np.testing.assert_allclose(images.numpy(), stored / unit, rtol=1e-6)


@pytest.mark.parametrize(
    ("replaced", "error", "message"),
    [
        ({"train_images": np.zeros((6, 4, 3), np.int32)}, TypeError, "uint8 or a float .* int32"),
        ({"test_labels": np.array([0.0, 1.0])}, TypeError, "test_labels of an integer .* float64"),
        ({"train_labels": np.zeros((6, 1), int)}, ValueError, r"shape \[N\] in .*, got \[6, 1\]"),
        ({"train_images": np.zeros(6, np.uint8)}, ValueError, r"\[N, D\] in .*, got \[6\]"),
        ({"test_labels": np.array([0, 4])}, ValueError, r"test labels in \[0, 4\) .* 0 to 4"),
        ({"test_labels": np.array([-1, 0])}, ValueError, "got labels from -1 to 0"),
        ({"train_labels": np.zeros(5, int)}, ValueError, "expected 6 training labels .* got 5"),
        ({"test_images": np.zeros((2, 12), np.uint8)}, ValueError, r"got \[1, 1, 12\]"),
        ({"test_images": np.full((2, 4, 3), np.nan)}, ValueError, "test_images .*finite"),
        # Finite as stored, infinite as float32.
        ({"train_images": np.full((6, 4, 3), 1e300)}, ValueError, "train_images .*finite"),
        ({"train_labels": np.array([{}] * 6)}, ValueError, "archive of plain arrays"),
    ],
)
def test_npz_damaged(tmp_path, replaced, error, message):
    np.savez(tmp_path / "set.npz", **{**npz_arrays(), **replaced})
    with pytest.raises(error, match=f"load_dataset: npz: .*{message}"):
        load_dataset(f"npz:{tmp_path / 'set.npz'}")


def test_npz_missing_array(tmp_path):
    arrays = npz_arrays()
    del arrays["test_labels"]
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(ValueError, match="got no test_labels among train_images"):
        load_dataset(f"npz:{tmp_path / 'set.npz'}")


def test_npz_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"npz: expected a file .*none.npz, got none"):
        load_dataset(f"npz:{tmp_path / 'none.npz'}")


def test_npz_that_is_something_else(tmp_path):
    (tmp_path / "text.npz").write_text("hello", encoding="utf-8")
    np.save(tmp_path / "single.npy", np.zeros(3))
    for name in ("text.npz", "single.npy"):
        with pytest.raises(ValueError, match=f"expected an npz archive .* in .*{name}, got "):
            load_dataset(f"npz:{tmp_path / name}")


# The teacher


def test_teacher_is_the_formula_on_its_own_samples():
    dataset = teacher_dataset(3, input_dim=5, num_classes=4, train_count=300, test_count=100)
    generator = torch.Generator().manual_seed(3)
    inner, outer, samples = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((5, 5), (4, 5), (400, 5))
    )
    images = torch.cat([dataset.test_images, dataset.train_images])
    labels = torch.cat([dataset.test_labels, dataset.train_labels])
    assert torch.equal(images.flatten(1), samples.float())
    z = np.tanh(2 / 5**0.5 * images.flatten(1).double().numpy() @ inner.numpy().T)
    z = z @ outer.numpy().T
    np.testing.assert_array_equal(labels.numpy(), (z - z.mean(axis=0)).argmax(axis=1))
    assert dataset.name == "teacher:3"
    assert dataset.input_shape == (1, 1, 5)


def test_teacher_by_its_short_name_is_the_same_every_time_and_follows_the_seed():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (load_dataset(spec) for spec in ("teacher", "teacher:0", "teacher:1"))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.name == again.name == "teacher"
    assert torch.equal(first.train_images, again.train_images)
    assert torch.equal(first.test_labels, again.test_labels)
    assert not torch.equal(first.test_labels, other.test_labels)
    counts = torch.bincount(first.train_labels, minlength=10) / len(first.train_labels)
    # Ten classes: none is rare, and naming the most frequent one is no use.
    assert counts.min() > 0.03
    assert counts.max() < 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "expected seed of at least 0, got -1"),
        ({"num_classes": 1}, "expected num_classes of at least 2, got 1"),
        ({"test_count": 0}, "expected test_count of at least 1, got 0"),
    ],
)
def test_teacher_refuses(arguments, message):
    with pytest.raises(ValueError, match=f"teacher_dataset: {message}"):
        teacher_dataset(**arguments)


# Specs and the container


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("imagenet", r"expected one of fashion-mnist-mini, .*npz:FILE, got 'imagenet'"),
        ("", "expected one of fashion-mnist-mini"),
        ("cifar10", "cifar10: expected cifar10:FOLDER, got 'cifar10'"),
        ("npz:", "npz: expected npz:FILE, got 'npz:'"),
        ("fashion-mnist-mini:x", "expected nothing after the name"),
        ("teacher:x", "teacher: expected teacher or teacher:SEED, got 'teacher:x'"),
        ("teacher:", "teacher: expected teacher or teacher:SEED, got 'teacher:'"),
    ],
)
def test_unknown_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(spec)


def test_spec_must_be_a_string(tmp_path):
    with pytest.raises(
        TypeError, match=r"load_dataset: expected a string, got (Posix|Windows)Path"
    ):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("replaced", "error", "message"),
    [
        ({"train_images": torch.zeros(2, 1, 4, 3).double()}, TypeError, "got torch.float64"),
        ({"test_labels": torch.zeros(2, dtype=torch.int32)}, TypeError, "and torch.int32"),
        ({"test_images": torch.zeros(2, 12)}, ValueError, r"\[N, 1, 4, 3\], got \[2, 12\]"),
        ({"train_labels": torch.tensor([0, 1, 0])}, ValueError, "expected 2 labels for 2 images"),
        (
            {"train_labels": torch.tensor([0, 2])},
            ValueError,
            r"in \[0, 2\), got labels from 0 to 2",
        ),
    ],
)
def test_image_dataset_refuses_what_does_not_fit(replaced, error, message):
    fields = {
        "name": "tiny",
        "train_images": torch.zeros(2, 1, 4, 3),
        "train_labels": torch.tensor([0, 1]),
        "test_images": torch.zeros(2, 1, 4, 3),
        "test_labels": torch.tensor([0, 1]),
        "num_classes": 2,
        "input_shape": (1, 4, 3),
    }
    ImageDataset(**fields)
    with pytest.raises(error, match=f"ImageDataset: tiny: .*{message}"):
        ImageDataset(**{**fields, **replaced})
