"""Pre-LayerNorm residual networks on vectors: the protocol's ResidualMLP and StudentNet."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from .sizes import check_sizes

# A branch this small leaves a fresh network close to the identity: cos(h_L, h_0) is about .98.
BRANCH_INIT_STD = 0.01


class ResidualBlock(nn.Module):
    """Compute the branch f(h) = W2·GELU(W1·LN(h)) of one pre-LayerNorm residual block.

    Args:
        dim: width d of the residual stream; both weights are [d, d].

    ``forward`` takes ``[B, d]`` and returns ``[B, d]`` in the parameters' dtype, WITHOUT the skip.
    W2 starts as N(0, 0.01²) with a zero bias. Source: 'Beyond Accuracy and Alignment' protocol,
    arXiv 2606.21126.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(dim)
        self.w1 = nn.Linear(dim, dim)
        self.w2 = nn.Linear(dim, dim)
        nn.init.normal_(self.w2.weight, std=BRANCH_INIT_STD)
        nn.init.zeros_(self.w2.bias)

    def forward(self, h: Tensor) -> Tensor:
        return cast(Tensor, self.w2(nn.functional.gelu(self.w1(self.ln(h)))))


class ResidualMLP(nn.Module):
    """Build the protocol's pre-LayerNorm residual MLP.

    Args:
        input_dim: features of one flattened input sample.
        d_hidden: width d of the residual stream.
        num_classes: number of logits C.
        num_blocks: number of residual blocks L.
        terminal_norm: normalise h_L before the head. ``False`` leaves the attribute ``out_ln`` out
            altogether, as in the protocol's control without a terminal norm.

    ``forward`` takes ``[B, input_dim]`` and returns logits ``[B, num_classes]`` in the parameters'
    dtype. Raises ValueError for a size below 1 or an input of another shape. Source: 'Beyond
    Accuracy and Alignment' protocol, arXiv 2606.21126 (audit size d = 256, L = 4).
    """

    def __init__(
        self,
        input_dim: int,
        d_hidden: int,
        num_classes: int,
        num_blocks: int,
        terminal_norm: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(
            type(self).__name__,
            input_dim=input_dim,
            d_hidden=d_hidden,
            num_classes=num_classes,
            num_blocks=num_blocks,
        )
        self.embed = nn.Linear(input_dim, d_hidden)
        self.blocks = nn.ModuleList(ResidualBlock(d_hidden) for _ in range(num_blocks))
        if terminal_norm:
            self.out_ln = nn.LayerNorm(d_hidden)
        self.out_head = nn.Linear(d_hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[1] != self.embed.in_features:
            raise ValueError(
                f"{type(self).__name__}: expected an input of shape [B, {self.embed.in_features}], "
                f"got {list(x.shape)}"
            )
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h)
        if hasattr(self, "out_ln"):
            h = self.out_ln(h)
        return cast(Tensor, self.out_head(h))


class StudentNet(ResidualMLP):
    """Build the protocol's student: a residual MLP without a terminal norm.

    Args:
        input_dim: features of one flattened input sample.
        num_classes: number of logits C.
        d_hidden: width d of the residual stream.
        num_blocks: number of residual blocks L.

    It learns what a random teacher network says (the image set ``teacher``). Without a norm
    between h_L and the head no scale of the stream can push the gradient to the floor. Everything
    else is as in :class:`ResidualMLP`. Source: 'Beyond Accuracy and Alignment' protocol, arXiv
    2606.21126 (d = 128, L = 4, 10 classes).
    """

    def __init__(
        self, input_dim: int, num_classes: int = 10, d_hidden: int = 128, num_blocks: int = 4
    ) -> None:
        super().__init__(input_dim, d_hidden, num_classes, num_blocks, terminal_norm=False)
