"""A plain convolutional network: no skips, no terminal norm."""

from __future__ import annotations

import math
from typing import ClassVar, cast

from torch import Tensor, nn

from ..residual_contract import Anatomy
from .sizes import check_image_shape, check_sizes


class StackAnatomy(Anatomy):
    """Read a :class:`SmallCNN`: h_0 is the image, h_{l+1} what block l returns for h_l."""

    skip: ClassVar[bool] = False
    required: ClassVar[tuple[str, ...]] = ("blocks", "out_head", "step", "state_shapes")

    @property
    def embedding(self) -> None:
        return None

    @property
    def feature_shapes(self) -> list[tuple[int, ...]]:
        model = cast(SmallCNN, self.model)
        return [model.input_shape, *model.state_shapes]

    def branch(self, index: int, h: Tensor) -> Tensor:
        return cast(SmallCNN, self.model).step(index, h)


class SmallCNN(nn.Module):
    """Build the protocol's small convolutional network.

    Args:
        input_shape: (channels, height, width) of one image; height and width at least 4, because
            two blocks halve them (rounding down).
        num_classes: number of logits C.
        channels: output channels of the three convolutions.
        d_hidden: width of the fully connected block.

    Attributes:
        blocks: four modules. Blocks 0 to 2 are a 3×3 convolution, BatchNorm and ReLU; blocks 1 and
            2 end with a 2×2 max-pooling. Block 3, a linear layer and ReLU, takes the FLATTENED
            map: 8192 → 256 for CIFAR-10.
        out_head: the linear head. There is no embedding and no terminal norm.
        state_shapes: shape of each block's output for one sample.

    ``forward`` takes ``[B, channels, height, width]`` and returns logits ``[B, C]`` in the
    parameters' dtype; with ``return_hidden=True`` the logits and the outputs of the four blocks.
    Raises ValueError for a size that does not fit or an input of another shape. Source: 'Beyond
    Accuracy and Alignment' protocol, arXiv 2606.21126.
    """

    anatomy = StackAnatomy

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        channels: tuple[int, int, int] = (32, 64, 128),
        d_hidden: int = 256,
    ) -> None:
        super().__init__()
        in_channels, height, width = check_image_shape("SmallCNN", input_shape)
        if height < 4 or width < 4:
            raise ValueError(
                f"SmallCNN: expected height and width of at least 4, got {height} and {width}"
            )
        if len(channels) != 3:
            raise ValueError(f"SmallCNN: expected three channels, got {channels}")
        first, second, third = channels
        check_sizes(
            "SmallCNN",
            num_classes=num_classes,
            **{f"channels[{index}]": count for index, count in enumerate(channels)},
            d_hidden=d_hidden,
        )
        self.input_shape = (in_channels, height, width)
        self.state_shapes = (
            (first, height, width),
            (second, height // 2, width // 2),
            (third, height // 4, width // 4),
            (d_hidden,),
        )
        self.blocks = nn.ModuleList(
            [
                _convolution(in_channels, first),
                _convolution(first, second, pool=True),
                _convolution(second, third, pool=True),
                nn.Sequential(nn.Linear(math.prod(self.state_shapes[2]), d_hidden), nn.ReLU()),
            ]
        )
        self.out_head = nn.Linear(d_hidden, num_classes)

    def step(self, index: int, h: Tensor) -> Tensor:
        """Compute the output of block ``index`` from that of the block before, or the image."""
        last = len(self.blocks) - 1
        return cast(Tensor, self.blocks[index](h.flatten(1) if index == last else h))

    def forward(
        self, x: Tensor, return_hidden: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        if x.dim() != 4 or tuple(x.shape[1:]) != self.input_shape:
            sizes = ", ".join(map(str, self.input_shape))
            raise ValueError(
                f"SmallCNN: expected an input of shape [B, {sizes}], got {list(x.shape)}"
            )
        hiddens = []
        h = x
        for index in range(len(self.blocks)):
            h = self.step(index, h)
            hiddens.append(h)
        logits = cast(Tensor, self.out_head(h))
        return (logits, hiddens) if return_hidden else logits


def _convolution(in_channels: int, out_channels: int, pool: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
        nn.BatchNorm2d(out_channels),
        # Not in place: an audit may hold the map before it.
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))
