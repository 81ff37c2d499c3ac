"""Image sets for the demo, the tests and audits, read from files without running their content.

A set is named by a short string: ``fashion-mnist-mini`` (shipped with the package), ``teacher`` or
``teacher:SEED`` (synthetic), ``fashion-mnist:FOLDER``, ``cifar10:FOLDER``, ``npz:FILE`` or
``imagefolder:FOLDER``. Nothing is downloaded.
"""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..checkpoints.errors import listed, printable
from ..checkpoints.numpy_pickle import OFFERED, PickledArray
from ..checkpoints.restricted_pickle import MOST_BYTES, PickleError, read_pickle
from .folders import load_folders

Array = npt.NDArray[Any]

MINI_FOLDER = Path(__file__).parent / "fashion_mnist_mini"

# The constants the protocol's own scripts normalise CIFAR-10 with, for pixels in [0, 1].
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)

_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_PIXELS = math.prod(_CIFAR_SHAPE)
_CIFAR_TRAIN_FILES = tuple(f"data_batch_{index}" for index in range(1, 6))
_CIFAR_TEST_FILE = "test_batch"

# An idx file starts with two zero bytes, a type code (8: unsigned bytes), the number of dimensions.
_IDX_UNSIGNED_BYTE = 8


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Hold one labelled image set in memory, split.

    Attributes:
        name: short name, for reports.
        train_images: ``[N, C, H, W]`` float32; see :func:`load_dataset` for their range.
        train_labels: ``[N]`` int64 in ``[0, num_classes)``.
        test_images: ``[M, C, H, W]`` float32, in the same units.
        test_labels: ``[M]`` int64 in ``[0, num_classes)``.
        num_classes: number of classes.
        input_shape: ``(C, H, W)`` of one image.

    Raises TypeError for other dtypes and ValueError for shapes, counts or labels that do not fit
    together.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    input_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            images: Tensor = getattr(self, f"{split}_images")
            labels: Tensor = getattr(self, f"{split}_labels")
            where = f"ImageDataset: {self.name}: {split}"
            if images.dtype != torch.float32 or labels.dtype != torch.int64:
                raise TypeError(
                    f"{where}: expected float32 images and int64 labels, "
                    f"got {images.dtype} and {labels.dtype}"
                )
            if images.dim() != 4 or tuple(images.shape[1:]) != tuple(self.input_shape):
                raise ValueError(
                    f"{where}: expected images of shape [N, {_sizes(self.input_shape)}], "
                    f"got [{_sizes(images.shape)}]"
                )
            if tuple(labels.shape) != (images.shape[0],):
                raise ValueError(
                    f"{where}: expected {images.shape[0]} labels for {images.shape[0]} images, "
                    f"got labels of shape [{_sizes(labels.shape)}]"
                )
            if images.shape[0] == 0:
                raise ValueError(f"{where}: expected at least one image, got none")
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"{where}: expected labels in [0, {self.num_classes}), "
                    f"got labels from {low} to {high}"
                )

    def to(self, device: torch.device | str) -> ImageDataset:
        """Return the set with its tensors on a device: trainings and audits there copy nothing.

        Tensors that are there already are shared.
        """
        return replace(
            self,
            train_images=self.train_images.to(device),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
        )

    def with_random_targets(self, seed: int) -> ImageDataset:
        """Return the set with training labels drawn uniformly, which say nothing of the images.

        What still happens to a network that is trained on them is the rule's doing and not the
        task's. Test images keep their labels.

        Args:
            seed: of the draw, which does not depend on the device; non-negative.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(self.num_classes, self.train_labels.shape, generator=generator)
        return replace(
            self,
            name=f"{self.name} with random targets",
            train_labels=drawn.to(self.train_labels.device),
        )

    def eval_batches(
        self,
        batch_size: int = 128,
        num_batches: int = 10,
        *,
        flatten: bool = False,
        device: torch.device | str | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Cut the first test images, in their order, into evaluation batches.

        Args:
            batch_size: samples B in each batch.
            num_batches: number of batches; the protocol wants 10, and at least 8.
            flatten: return images as ``[B, C·H·W]`` rather than ``[B, C, H, W]``.
            device: where the batches go; ``None`` leaves them where the set is.

        Returns a list of (images float32, labels ``[B]`` int64); without ``flatten`` and
        ``device`` these are views of the set. Raises ValueError for a size below 1 or when the
        test set is too small: a short or missing batch would change the figures silently.
        Source: 'Beyond Accuracy and Alignment' protocol, arXiv 2606.21126.
        """
        if batch_size < 1 or num_batches < 1:
            raise ValueError(
                "eval_batches: expected batch_size and num_batches of at least 1, "
                f"got {batch_size} and {num_batches}"
            )
        available = self.test_images.shape[0]
        if batch_size * num_batches > available:
            raise ValueError(
                f"eval_batches: {self.name}: expected {num_batches} batches of {batch_size} = "
                f"{batch_size * num_batches} test images, got {available}"
            )
        batches = []
        for start in range(0, batch_size * num_batches, batch_size):
            images = self.test_images[start : start + batch_size]
            labels = self.test_labels[start : start + batch_size]
            if flatten:
                images = images.flatten(1)
            batches.append((images.to(device), labels.to(device)))
        return batches


def load_dataset(spec: str, **options: Any) -> ImageDataset:
    """Read the image set a short string names.

    Args:
        spec: one of

            - ``fashion-mnist-mini``: the first 6,000 training and 2,000 test images of
              Fashion-MNIST, shipped with the package;
            - ``teacher`` or ``teacher:SEED``: random vectors labelled by a random network, see
              :func:`teacher_dataset`; the seed is 0 where none is given;
            - ``fashion-mnist:FOLDER``: the four idx files, compressed (.gz) or not, in FOLDER or
              in FOLDER/FashionMNIST/raw;
            - ``cifar10:FOLDER``: the python version (data_batch_1 … 5, test_batch) or the binary
              version (the same names with .bin), in FOLDER or in its cifar-10-batches-py or
              cifar-10-batches-bin. The pickles may only rebuild numpy arrays; any other global is
              refused by name and nothing of it runs;
            - ``npz:FILE``: arrays train_images, train_labels, test_images, test_labels; images
              uint8 or float, ``[N, H, W]``, ``[N, C, H, W]`` or ``[N, D]`` (kept as
              ``[N, 1, 1, D]``); integer labels, of which the largest training label gives the
              number of classes;
            - ``imagefolder:FOLDER``: images in one folder a class, see
              :func:`fadiag_fast.zoo.folders.load_folders`.
        options: of ``imagefolder``: size, limit, channels, normalize; of the others: ``channels=3``
            repeats the channel of grey images.

    Returns float32 images and int64 labels. Bytes become pixels in [0, 1]; CIFAR-10 is then
    normalised by the protocol's constants; floats of an npz file stay as they are. Raises
    TypeError for a spec that is not a string or arrays of a wrong type, FileNotFoundError for a
    missing folder or file, ValueError for everything else that does not fit. Source: 'Beyond
    Accuracy and Alignment' protocol, arXiv 2606.21126 (CIFAR-10's constants).
    """
    if not isinstance(spec, str):
        raise TypeError(f"load_dataset: expected a string, got {type(spec).__name__}")
    kind, colon, place = spec.partition(":")
    allowed = ("size", "limit", "channels", "normalize") if kind == "imagefolder" else ("channels",)
    for option in options:
        if option not in allowed:
            raise ValueError(
                f"load_dataset: {kind}: expected an option among {', '.join(allowed)}, got {option}"
            )
    if kind == "imagefolder" and place:
        folder = Path(place).expanduser()
        train, test, num_classes = load_folders(folder, **options)
        return ImageDataset(kind, *train, *test, num_classes, tuple(test[0].shape[1:]))
    if options:
        return _with_channels(load_dataset(spec), options["channels"])
    if kind == "fashion-mnist-mini":
        if colon:
            raise ValueError(f"load_dataset: {kind}: expected nothing after the name, got {spec!r}")
        return _load_fashion_mnist(kind, MINI_FOLDER)
    if kind == "teacher":
        if colon and not place.isdecimal():
            raise ValueError(f"load_dataset: {kind}: expected {kind} or {kind}:SEED, got {spec!r}")
        return teacher_dataset(int(place or 0))
    if kind == "imagefolder":
        raise ValueError(f"load_dataset: {kind}: expected {kind}:FOLDER, got {spec!r}")
    if kind not in _LOADERS:
        known = ["fashion-mnist-mini", "teacher", "imagefolder:FOLDER"]
        known += [f"{name}:{what}" for name, (what, _) in _LOADERS.items()]
        raise ValueError(f"load_dataset: expected one of {', '.join(known)}, got {spec!r}")
    what, loader = _LOADERS[kind]
    if not place:
        raise ValueError(f"load_dataset: {kind}: expected {kind}:{what}, got {spec!r}")
    return loader(kind, Path(place).expanduser())


def _with_channels(dataset: ImageDataset, channels: object) -> ImageDataset:
    """Return grey images as three equal channels, without a copy."""
    has = dataset.input_shape[0]
    if has == channels:
        return dataset
    if (has, channels) != (1, 3):
        raise ValueError(
            f"load_dataset: {dataset.name}: channels: expected {has}"
            f"{' or 3' if has == 1 else ''}, got {channels!r}"
        )
    return replace(
        dataset,
        train_images=dataset.train_images.expand(-1, 3, -1, -1),
        test_images=dataset.test_images.expand(-1, 3, -1, -1),
        input_shape=(3, *dataset.input_shape[1:]),
    )


# The teacher


def teacher_dataset(
    seed: int = 0,
    *,
    input_dim: int = 16,
    num_classes: int = 10,
    train_count: int = 10000,
    test_count: int = 2000,
) -> ImageDataset:
    """Label random vectors by a random network, the teacher.

    Formula: x ~ N(0, I); label = argmax_c (z_c(x) − mean z_c), with z(x) = V·tanh(2·W·x/√D), W
    ``[D, D]`` and V ``[C, D]`` drawn from N(0, 1), and the mean over all samples, so that no class
    is rare.

    Args:
        seed: of teacher and samples; non-negative.
        input_dim: features D of a sample.
        num_classes: number of classes C, at least 2.
        train_count: training samples N.
        test_count: test samples M.

    Returns a set named "teacher" (or "teacher:SEED") of "images" ``[N, 1, 1, D]``. The same
    arguments give the same set. Raises ValueError for sizes or a seed that do not fit. Source:
    'Beyond Accuracy and Alignment' protocol, arXiv 2606.21126 (synthetic teacher labels, 10
    classes); the teacher itself is this package's choice.
    """
    smallest = {"seed": 0, "input_dim": 1, "num_classes": 2, "train_count": 1, "test_count": 1}
    given = (seed, input_dim, num_classes, train_count, test_count)
    for (name, lowest), value in zip(smallest.items(), given, strict=True):
        if value < lowest:
            raise ValueError(f"teacher_dataset: expected {name} of at least {lowest}, got {value}")
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inner, outer = draw(input_dim, input_dim), draw(num_classes, input_dim)
    # In float64 down to the label; the samples themselves are stored, and labelled, in float32.
    samples = draw(test_count + train_count, input_dim).float()
    # Twice the usual scale bends the tanh enough that a linear student stays behind.
    z = torch.tanh(2 * samples.double() @ inner.T / math.sqrt(input_dim)) @ outer.T
    labels = (z - z.mean(dim=0)).argmax(dim=1)
    images = samples[:, None, None, :]
    return ImageDataset(
        "teacher" if seed == 0 else f"teacher:{seed}",
        images[test_count:],
        labels[test_count:],
        images[:test_count],
        labels[:test_count],
        num_classes,
        (1, 1, input_dim),
    )


# idx files


def _load_fashion_mnist(kind: str, folder: Path) -> ImageDataset:
    candidates = [folder, folder / "FashionMNIST" / "raw"]
    _require_folder(kind, folder)
    splits: list[Array] = []
    for split in ("train", "t10k"):
        for part, dims in (("images-idx3-ubyte", 3), ("labels-idx1-ubyte", 1)):
            name = f"{split}-{part}"
            path = _find_file(kind, folder, candidates, (name, f"{name}.gz"))
            splits.append(_read_idx(kind, path, dims))
    train_images, train_labels, test_images, test_labels = splits
    return _assemble(
        kind,
        folder,
        (train_images[:, None], train_labels),
        (test_images[:, None], test_labels),
        num_classes=10,
    )


def _read_idx(kind: str, path: Path, dims: int) -> Array:
    raw = path.read_bytes()
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(
                f"load_dataset: {kind}: expected a whole gzip file in {path}, got {error}"
            ) from error
    magic = bytes([0, 0, _IDX_UNSIGNED_BYTE, dims])
    if raw[:4] != magic:
        raise ValueError(
            f"load_dataset: {kind}: expected the idx magic number 0x{magic.hex()} in {path}, "
            f"got 0x{raw[:4].hex()}"
        )
    header = 4 + 4 * dims
    if len(raw) < header:
        raise ValueError(
            f"load_dataset: {kind}: expected an idx header of {header} bytes in {path}, "
            f"got {len(raw)} bytes"
        )
    shape = [int.from_bytes(raw[at : at + 4], "big") for at in range(4, header, 4)]
    if len(raw) != header + math.prod(shape):
        raise ValueError(
            f"load_dataset: {kind}: expected {header + math.prod(shape)} bytes for an idx array "
            f"of shape [{_sizes(shape)}] in {path}, got {len(raw)}"
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape)


# CIFAR-10


def _load_cifar10(kind: str, folder: Path) -> ImageDataset:
    _require_folder(kind, folder)
    versions = (
        ("", [folder, folder / "cifar-10-batches-py"], _read_cifar_pickle),
        (".bin", [folder, folder / "cifar-10-batches-bin"], _read_cifar_binary),
    )
    for suffix, candidates, read in versions:
        names = [f"{stem}{suffix}" for stem in (*_CIFAR_TRAIN_FILES, _CIFAR_TEST_FILE)]
        if not any((candidate / names[0]).is_file() for candidate in candidates):
            continue
        batches = [read(kind, _find_file(kind, folder, candidates, (name,))) for name in names]
        train_images = np.concatenate([images for images, _ in batches[:-1]])
        train_labels = np.concatenate([labels for _, labels in batches[:-1]])
        return _assemble(
            kind,
            folder,
            (train_images, train_labels),
            batches[-1],
            num_classes=10,
            mean=CIFAR10_MEAN,
            std=CIFAR10_STD,
        )
    raise FileNotFoundError(
        f"load_dataset: {kind}: expected data_batch_1 or data_batch_1.bin in {folder} (or in its "
        f"cifar-10-batches-py or cifar-10-batches-bin), got {_listing(folder)}"
    )


def _read_cifar_binary(kind: str, path: Path) -> tuple[Array, Array]:
    raw = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    record = 1 + _CIFAR_PIXELS
    if raw.size == 0 or raw.size % record:
        raise ValueError(
            f"load_dataset: {kind}: expected a multiple of {record} bytes in {path}, got {raw.size}"
        )
    records = raw.reshape(-1, record)
    return records[:, 1:].reshape(-1, *_CIFAR_SHAPE), records[:, 0]


def _read_cifar_pickle(kind: str, path: Path) -> tuple[Array, Array]:
    with path.open("rb") as file:
        raw = file.read(MOST_BYTES + 1)
    try:
        # The files were written by Python 2: its strings are kept as bytes.
        content, _, refused = read_pickle(raw, OFFERED, byte_strings=True)
    except PickleError as error:
        raise ValueError(
            f"load_dataset: {kind}: expected a CIFAR-10 pickle in {path}, got one that is not "
            f"read: {error}"
        ) from error
    if refused:
        raise ValueError(
            f"load_dataset: {kind}: refused the global {listed(map(printable, sorted(refused)))} "
            f"in {path}"
        )
    if not isinstance(content, dict):
        raise ValueError(
            f"load_dataset: {kind}: expected a dictionary with data and labels in {path}, "
            f"got {type(content).__name__}"
        )
    data = content.get(b"data", content.get("data"))
    labels = content.get(b"labels", content.get("labels"))
    if isinstance(data, PickledArray):
        data = data.array
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8:
        got = data.dtype if isinstance(data, np.ndarray) else type(data).__name__
        raise ValueError(f"load_dataset: {kind}: expected data of uint8 in {path}, got {got}")
    if data.ndim != 2 or data.shape[1] != _CIFAR_PIXELS:
        raise ValueError(
            f"load_dataset: {kind}: expected data of shape [N, {_CIFAR_PIXELS}] in {path}, "
            f"got [{_sizes(data.shape)}]"
        )
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError(
            f"load_dataset: {kind}: expected labels as a list of integers in {path}, "
            f"got {type(labels).__name__}"
        )
    if len(labels) != data.shape[0]:
        raise ValueError(
            f"load_dataset: {kind}: expected {data.shape[0]} labels for {data.shape[0]} images "
            f"in {path}, got {len(labels)}"
        )
    # int64 before the range check, so that no label wraps around into the valid range.
    return data.reshape(-1, *_CIFAR_SHAPE), np.asarray(labels, dtype=np.int64)


# npz


def _load_npz(kind: str, path: Path) -> ImageDataset:
    if not path.is_file():
        raise FileNotFoundError(f"load_dataset: {kind}: expected a file {path}, got none")
    names = ("train_images", "train_labels", "test_images", "test_labels")
    try:
        opened = np.load(path, allow_pickle=False)
        if isinstance(opened, np.ndarray):
            raise ValueError("a single array")
        with opened as archive:
            missing = [name for name in names if name not in archive.files]
            if missing:
                raise ValueError(f"no {', '.join(missing)} among {', '.join(archive.files)}")
            arrays = [archive[name] for name in names]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"load_dataset: {kind}: expected an npz archive of plain arrays {', '.join(names)} "
            f"in {path}, got {error}"
        ) from error
    train_images, train_labels, test_images, test_labels = arrays
    for name, labels in (("train_labels", train_labels), ("test_labels", test_labels)):
        if not np.issubdtype(labels.dtype, np.integer):
            raise TypeError(
                f"load_dataset: {kind}: expected {name} of an integer type in {path}, "
                f"got {labels.dtype}"
            )
        if labels.ndim != 1:
            raise ValueError(
                f"load_dataset: {kind}: expected {name} of shape [N] in {path}, "
                f"got [{_sizes(labels.shape)}]"
            )
    for name, images in (("train_images", train_images), ("test_images", test_images)):
        is_float = np.issubdtype(images.dtype, np.floating)
        if images.dtype != np.uint8 and not is_float:
            raise TypeError(
                f"load_dataset: {kind}: expected {name} of uint8 or a float type in {path}, "
                f"got {images.dtype}"
            )
        if images.ndim not in (2, 3, 4):
            raise ValueError(
                f"load_dataset: {kind}: expected {name} of shape [N, H, W], [N, C, H, W] or "
                f"[N, D] in {path}, got [{_sizes(images.shape)}]"
            )
        with np.errstate(over="ignore"):
            finite = not is_float or bool(np.isfinite(images.astype(np.float32)).all())
        if not finite:
            raise ValueError(
                f"load_dataset: {kind}: expected values in {name} of {path} that are finite in "
                "float32, got NaN or infinity"
            )
    return _assemble(
        kind,
        path,
        (_as_image_batch(train_images), train_labels),
        (_as_image_batch(test_images), test_labels),
        num_classes=int(train_labels.max()) + 1 if train_labels.size else 0,
    )


def _as_image_batch(images: Array) -> Array:
    if images.ndim == 2:
        return images[:, None, None, :]
    return images[:, None] if images.ndim == 3 else images


_LOADERS: dict[str, tuple[str, Callable[[str, Path], ImageDataset]]] = {
    "fashion-mnist": ("FOLDER", _load_fashion_mnist),
    "cifar10": ("FOLDER", _load_cifar10),
    "npz": ("FILE", _load_npz),
}


# What every format shares


def _assemble(
    kind: str,
    place: Path,
    train: tuple[Array, Array],
    test: tuple[Array, Array],
    *,
    num_classes: int,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> ImageDataset:
    """Check two splits (images [N, C, H, W], labels [N]) against each other and convert them."""
    for split, (images, labels) in (("training", train), ("test", test)):
        if images.size == 0:
            raise ValueError(
                f"load_dataset: {kind}: expected at least one {split} image in {place}, got none"
            )
        if labels.shape[0] != images.shape[0]:
            raise ValueError(
                f"load_dataset: {kind}: expected {images.shape[0]} {split} labels for "
                f"{images.shape[0]} {split} images in {place}, got {labels.shape[0]}"
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"load_dataset: {kind}: expected {split} labels in [0, {num_classes}) in {place}, "
                f"got labels from {low} to {high}"
            )
    if train[0].shape[1:] != test[0].shape[1:]:
        raise ValueError(
            f"load_dataset: {kind}: expected test images of shape "
            f"[{_sizes(train[0].shape[1:])}] like the training images in {place}, "
            f"got [{_sizes(test[0].shape[1:])}]"
        )
    train_images, test_images = (_pixels(images) for images, _ in (train, test))
    if mean is not None and std is not None:
        for split_images in (train_images, test_images):
            shape = (1, len(mean), 1, 1)
            split_images.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))
    train_labels, test_labels = (
        torch.from_numpy(labels.astype(np.int64)) for _, labels in (train, test)
    )
    return ImageDataset(
        kind,
        train_images,
        train_labels,
        test_images,
        test_labels,
        num_classes,
        tuple(train_images.shape[1:]),
    )


def _pixels(images: Array) -> Tensor:
    pixels = torch.from_numpy(images.astype(np.float32))
    return pixels / 255 if images.dtype == np.uint8 else pixels


def _require_folder(kind: str, folder: Path) -> None:
    if not folder.is_dir():
        got = "a file" if folder.exists() else "nothing there"
        raise FileNotFoundError(f"load_dataset: {kind}: expected a folder {folder}, got {got}")


def _find_file(kind: str, folder: Path, candidates: list[Path], names: tuple[str, ...]) -> Path:
    for candidate in candidates:
        for name in names:
            if (candidate / name).is_file():
                return candidate / name
    raise FileNotFoundError(
        f"load_dataset: {kind}: expected {' or '.join(names)} in {folder} (or in its "
        f"{candidates[-1].relative_to(folder)}), got {_listing(folder)}"
    )


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
    return shown or "an empty folder"


def _sizes(shape: tuple[int, ...] | torch.Size | list[int]) -> str:
    return ", ".join(str(size) for size in shape)
