"""Checks that the constructors of the networks share."""

from __future__ import annotations


def check_sizes(owner: str, **sizes: int) -> None:
    """Raise ValueError that names the first size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{owner}: expected {name} of at least 1, got {size}")


def check_image_shape(owner: str, input_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return (channels, height, width); raise ValueError for any other number of sizes."""
    if len(input_shape) != 3:
        raise ValueError(
            f"{owner}: expected an input_shape (channels, height, width), got {input_shape}"
        )
    channels, height, width = input_shape
    check_sizes(owner, channels=channels, height=height, width=width)
    return channels, height, width
