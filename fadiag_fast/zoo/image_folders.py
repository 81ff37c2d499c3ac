"""Images in folders, one folder a class, as torchvision's ImageFolder has them."""

from __future__ import annotations

from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# The constants that networks trained on ImageNet expect, for pixels in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
TEST_FOLDERS = ("test", "val", "valid", "validation")
DEFAULT_LIMIT = 2000

Split = tuple[Tensor, Tensor]


def load_folders(
    folder: Path,
    *,
    size: int | None = None,
    limit: int = DEFAULT_LIMIT,
    channels: int = 3,
    normalize: bool = True,
) -> tuple[Split, Split, int]:
    """Read images [N, C, H, W] and labels [N] of both splits, and the number of classes.

    Args:
        folder: holds ``train`` and one of ``test``, ``val``, ``valid``, ``validation``, each with a
            folder per class; or the class folders themselves, which then serve as both splits.
        size: scale the shorter side to this many pixels and cut out the square in the middle; None
            takes images as they are, all of one size.
        limit: read at most so many images of each split, spread evenly over the classes; 0 reads
            all. The set is held in memory.
        channels: 3 (grey images repeat their channel) or 1 (colours become grey).
        normalize: subtract ImageNet's mean and divide by its standard deviation, for 3 channels;
            else pixels are in [0, 1].

    The first images of every class come first, then the second ones, and so on, so that every batch
    holds many classes. Classes are numbered in the order of their names in the training split.

    Raises:
        ImportError: Pillow is not installed.
        FileNotFoundError: no such folder.
        ValueError: no images, images of several sizes without ``size``, a file that is no image, a
            test class that training does not have, or an option out of range.
    """
    where = "load_dataset: imagefolder"
    if not folder.is_dir():
        got = "a file" if folder.exists() else "nothing there"
        raise FileNotFoundError(f"{where}: expected a folder {folder}, got {got}")
    if channels not in (1, 3):
        raise ValueError(f"{where}: channels: expected 1 or 3, got {channels!r}")
    for name, value, lowest in (("size", size, 1), ("limit", limit, 0)):
        if value is not None and (not isinstance(value, int) or value < lowest):
            raise ValueError(f"{where}: {name}: expected at least {lowest}, got {value!r}")
    held_out = next((folder / name for name in TEST_FOLDERS if (folder / name).is_dir()), None)
    splits = [folder / "train", held_out] if held_out and (folder / "train").is_dir() else [folder]
    classes = sorted(entry.name for entry in splits[0].iterdir() if entry.is_dir())
    read = [_read_split(split, classes, size, limit, channels, normalize) for split in splits]
    return read[0], read[-1], len(classes)


def _read_split(
    split: Path, classes: list[str], size: int | None, limit: int, channels: int, normalize: bool
) -> Split:
    where = "load_dataset: imagefolder"
    strange = sorted({entry.name for entry in split.iterdir() if entry.is_dir()} - {*classes})
    if strange:
        raise ValueError(
            f"{where}: expected only classes of the training split in {split}, got {strange[0]}"
        )
    # Not every file is looked at: a name says enough, and folders may hold lists and licences.
    of_class = [
        [
            (path, label)
            for path in sorted((split / name).rglob("*"))
            if path.suffix.lower() in ENDINGS
        ]
        for label, name in enumerate(classes)
        if (split / name).is_dir()
    ]
    files = [pair for pair in chain.from_iterable(zip_longest(*of_class)) if pair is not None]
    files = files[: limit or None]
    if not files:
        raise ValueError(f"{where}: expected images in one folder a class in {split}, got none")
    images: list[npt.NDArray[np.uint8]] = []
    for path, _ in files:
        image = _read(path, size, channels)
        if images and image.shape != images[0].shape:
            raise ValueError(
                f"{where}: expected images of one size, got {_pixels(images[0])} in {files[0][0]} "
                f"and {_pixels(image)} in {path}; --data-option size=PIXELS scales and crops"
            )
        images.append(image)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div_(255)
    if normalize and channels == 3:
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = pixels.sub_(mean).div_(std)
    return pixels.contiguous(), torch.tensor([label for _, label in files])


def _pixels(image: npt.NDArray[Any]) -> str:
    return f"{image.shape[1]}×{image.shape[0]}"


def _read(path: Path, size: int | None, channels: int) -> npt.NDArray[np.uint8]:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise ImportError(
            "load_dataset: imagefolder: reading images needs Pillow: pip install pillow"
        ) from None
    try:
        with Image.open(path) as file:
            image = file.convert("RGB" if channels == 3 else "L")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"load_dataset: imagefolder: expected an image in {path}: {error}"
        ) from None
    if size is not None:
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    array = np.asarray(image, dtype=np.uint8)
    return array if array.ndim == 3 else array[:, :, None]
