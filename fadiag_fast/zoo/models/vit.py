"""A small vision transformer with a class token."""

from __future__ import annotations

import math
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from ...capture.reduction import Reduction
from ..residual_contract import Anatomy
from .sizes import check_image_shape, check_sizes

# Class token and positions start this small, the usual choice for vision transformers; the class
# token's norm after the embedding is then about 0.3 for d = 128.
TOKEN_INIT_STD = 0.02


class ClassTokenAnatomy(Anatomy):
    """Read a residual network on tokens ``[B, T, d]`` whose head reads the first of them.

    Credit goes to that token alone: it is the only one for which an error at the output says what
    the network should have done. The others learn as far as it attends to them.
    """

    credit_reduction: ClassVar[Reduction] = "cls"

    def features(self, h: Tensor) -> Tensor:
        return h[:, 0]

    def as_state(self, features: Tensor, like: Tensor) -> Tensor:
        others = features.new_zeros(like.shape[0], like.shape[1] - 1, like.shape[2])
        return torch.cat([features[:, None], others], dim=1)


class PatchEmbedding(nn.Module):
    """Turn an image into a class token and one token per patch, with learned positions.

    Args:
        input_shape: (channels, height, width) of one image.
        patch_size: side p of a patch; divides height and width.
        dim: width d of a token.

    ``forward`` takes ``[B, channels, height, width]`` and returns ``[B, 1 + height·width/p², d]``,
    the class token first.
    """

    def __init__(self, input_shape: tuple[int, int, int], patch_size: int, dim: int) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.input_shape = input_shape
        self.patch_size = patch_size
        # A linear layer on cut-out patches: the same map as a strided convolution, and repeatable
        # bit for bit on every device.
        self.projection = nn.Linear(channels * patch_size**2, dim)
        num_patches = (height // patch_size) * (width // patch_size)
        self.class_token = nn.Parameter(torch.randn(1, 1, dim) * TOKEN_INIT_STD)
        self.positions = nn.Parameter(torch.randn(1, 1 + num_patches, dim) * TOKEN_INIT_STD)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or tuple(x.shape[1:]) != self.input_shape:
            sizes = ", ".join(map(str, self.input_shape))
            raise ValueError(
                f"ViTMini: expected an input of shape [B, {sizes}], got {list(x.shape)}"
            )
        p = self.patch_size
        # [B, C, H/p, p, W/p, p] → [B, H/p, W/p, C, p, p]
        cut = x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5)
        patches = self.projection(cut.flatten(3).flatten(1, 2))
        class_token = self.class_token.expand(x.shape[0], -1, -1)
        return torch.cat([class_token, patches], dim=1) + self.positions


class Attention(nn.Module):
    """Compute multi-head self-attention on ``[B, T, d]``.

    Args:
        dim: width d of a token.
        num_heads: number of heads; divides d.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, h: Tensor) -> Tensor:
        # [B, T, 3d] → three of [B, heads, T, d/heads]
        qkv = self.qkv(h).unflatten(2, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        # Written out rather than fused: the fused backward is not repeatable on every device.
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
        mixed = scores.softmax(dim=3) @ value
        return cast(Tensor, self.out(mixed.transpose(1, 2).flatten(2)))


class TransformerBlock(nn.Module):
    """Compute the branch of one pre-LayerNorm transformer block.

    Formula: f(h) = A + M, with A = Attention(LN1(h)) and M = W2·GELU(W1·LN2(h + A)).

    Args:
        dim: width d of a token.
        num_heads: heads of the attention; divides d.
        mlp_ratio: width of W1's output as a multiple of d.

    ``forward`` takes ``[B, T, d]`` and returns ``[B, T, d]`` in the parameters' dtype, WITHOUT the
    outer skip: the next state is h + f(h).
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads)
        self.ln2 = nn.LayerNorm(dim)
        self.w1 = nn.Linear(dim, mlp_ratio * dim)
        self.w2 = nn.Linear(mlp_ratio * dim, dim)

    def forward(self, h: Tensor) -> Tensor:
        attended = self.attention(self.ln1(h))
        inner = nn.functional.gelu(self.w1(self.ln2(h + attended)))
        return cast(Tensor, attended + self.w2(inner))


class ClassTokenHead(nn.Linear):
    """Read the logits from the class token: ``[B, T, d]`` to ``[B, C]``."""

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h[:, 0])


class ViTMini(nn.Module):
    """Build the protocol's small vision transformer.

    Args:
        input_shape: (channels, height, width) of one image.
        num_classes: number of logits C.
        d_hidden: width d of a token.
        num_blocks: number of transformer blocks L.
        num_heads: heads of each attention; divides ``d_hidden``.
        mlp_ratio: width of a block's inner layer as a multiple of ``d_hidden``.
        patch_size: side of a patch; divides height and width.

    It follows the residual contract: ``embed`` returns tokens ``[B, T, d]``, class token first,
    ``blocks[l](h)`` returns the branch, ``out_ln`` normalises every token and ``out_head`` reads
    the class token. ``forward`` takes ``[B, channels, height, width]`` and returns logits
    ``[B, C]`` in the parameters' dtype. Raises ValueError for a size that does not fit or an input
    of another shape. Source: 'Beyond Accuracy and Alignment' protocol, arXiv 2606.21126 (d = 128,
    L = 4); heads, inner width and patch size are the usual ones.
    """

    anatomy = ClassTokenAnatomy

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        d_hidden: int = 128,
        num_blocks: int = 4,
        num_heads: int = 4,
        mlp_ratio: int = 4,
        patch_size: int = 4,
    ) -> None:
        super().__init__()
        channels, height, width = check_image_shape("ViTMini", input_shape)
        check_sizes(
            "ViTMini",
            num_classes=num_classes,
            d_hidden=d_hidden,
            num_blocks=num_blocks,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            patch_size=patch_size,
        )
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"ViTMini: expected a patch_size that divides height and width, {height} and "
                f"{width}, got {patch_size}"
            )
        if d_hidden % num_heads:
            raise ValueError(
                f"ViTMini: expected a num_heads that divides d_hidden {d_hidden}, got {num_heads}"
            )
        self.embed = PatchEmbedding((channels, height, width), patch_size, d_hidden)
        self.blocks = nn.ModuleList(
            TransformerBlock(d_hidden, num_heads, mlp_ratio) for _ in range(num_blocks)
        )
        self.out_ln = nn.LayerNorm(d_hidden)
        self.out_head = ClassTokenHead(d_hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h)
        return cast(Tensor, self.out_head(self.out_ln(h)))
