"""How a layer's axes become one row for each sample."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["flatten", "cls", "mean", "token"]


REDUCTIONS: tuple[Reduction, ...] = ("flatten", "cls", "mean", "token")


@dataclass(frozen=True)
class SampleReduction:
    """What counts as one sample's state where a state has more than two dimensions.

    A state ``[B, D]`` is left alone. ``[B, T, D]`` holds T positions of D features; with four and
    more dimensions the features are dimension 1 (``[B, D, H, W]``) unless ``feature_dim`` says so.

    Attributes:
        kind: ``flatten`` takes all features of all positions; ``cls`` the first position of
            ``[B, T, D]``; ``mean`` the average over the positions, whose gradient is the SUM over
            the positions: the loss's derivative along a shift of all of them; ``token`` counts
            every position as a sample of its own.
        feature_dim: the dimension that holds features, −1 for channels last.

    Raises:
        ValueError: an unknown kind.
    """

    kind: Reduction = "flatten"
    feature_dim: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in REDUCTIONS:
            raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {self.kind}")

    def feature_index(self, state: Tensor) -> int:
        """Return the dimension that holds the features of a state ``[B, ...]``."""
        if self.feature_dim is None:
            return state.dim() - 1 if state.dim() == 3 else 1
        fits = -state.dim() < self.feature_dim < state.dim() and self.feature_dim != 0
        if not fits:
            raise ValueError(
                f"reduction {self.kind}: expected a feature_dim beside the samples' dimension 0 of "
                f"states of shape {list(state.shape)}, got {self.feature_dim}"
            )
        return self.feature_dim % state.dim()

    def apply(self, hidden: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return a state and its gradient, ``[B, ...]``, as the samples' ``[N, ...]``.

        Raises:
            ValueError: ``cls`` of a state with four and more dimensions, or a ``feature_dim`` that
                the state does not have.
        """
        return self.of_hidden(hidden), self.of_grad(grad)

    def of_hidden(self, hidden: Tensor) -> Tensor:
        """Return a state alone as :meth:`apply` does."""
        return self._reduced(hidden, averaged=True)

    def of_grad(self, grad: Tensor) -> Tensor:
        """Return a state's gradient alone as :meth:`apply` does."""
        return self._reduced(grad, averaged=False)

    def _reduced(self, state: Tensor, averaged: bool) -> Tensor:
        if state.is_complex():
            return torch.view_as_real(self._positions(state, averaged))
        return self._positions(state, averaged)

    def _positions(self, state: Tensor, averaged: bool) -> Tensor:
        if self.kind == "flatten" or state.dim() < 3:
            return state
        if self.kind == "cls":
            if state.dim() != 3:
                raise ValueError(
                    f"reduction cls: expected states of shape [B, T, D], got {list(state.shape)}"
                )
            return state[:, 0]
        features = self.feature_index(state)
        if self.kind == "mean":
            positions = [d for d in range(1, state.dim()) if d != features]
            # A sum of many small terms leaves the precision and the range of 16 bits.
            wide = torch.float32 if state.dtype in (torch.float16, torch.bfloat16) else None
            merge = state.mean if averaged else state.sum
            merged: Tensor = merge(positions, dtype=wide)
            return merged
        return state.movedim(features, -1).flatten(0, -2)


def reduction_of(reduction: Reduction | SampleReduction) -> SampleReduction:
    """Return a reduction by its name, or as it is given."""
    return reduction if isinstance(reduction, SampleReduction) else SampleReduction(reduction)
