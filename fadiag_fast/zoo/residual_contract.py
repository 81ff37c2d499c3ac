"""How a network's state moves from block to block and reaches its head.

The training rules read every network through an :class:`Anatomy`, so that one rule serves networks
whose caller adds the skip and networks that have none, states of any shape, and heads that read
one token or all features.

Notation: h_0 is what the first block takes, h_L what terminal norm and head take, and block l
computes its branch f_l from h_l. With a skip h_{l+1} = h_l + f_l(h_l); without, h_{l+1} = f_l(h_l).
"""

from __future__ import annotations

import math
from typing import ClassVar, cast

from torch import Tensor, nn

from ..capture.reduction import Reduction


class Anatomy:
    """Read a network by the residual contract.

    The model has ``embed``, ``blocks``, ``out_head`` and optionally ``out_ln``; h_0 = embed(x) and
    ``blocks[l](h)`` returns the branch, to which the caller adds the skip. A model class of
    another build names a subclass of this one in its attribute ``anatomy``.

    Args:
        model: the network. Nothing of it is copied.

    Attributes:
        model: the network.
        skip: whether the caller adds h_l to the branch.
        credit_reduction: which part of a state credit is compared at: what :meth:`features` takes.

    Raises TypeError for a model without the attributes named above. Source: 'Beyond Accuracy and
    Alignment' protocol, arXiv 2606.21126.
    """

    skip: ClassVar[bool] = True
    required: ClassVar[tuple[str, ...]] = ("embed", "blocks", "out_head")
    credit_reduction: ClassVar[Reduction] = "flatten"

    def __init__(self, model: nn.Module) -> None:
        missing = [part for part in self.required if not hasattr(model, part)]
        if missing:
            *others, last = self.required
            raise TypeError(
                f"{type(self).__name__}: expected a model with {', '.join(others)} and {last}, "
                f"got {type(model).__name__} without {', '.join(missing)}"
            )
        self.model = model

    # The parts.

    @property
    def embedding(self) -> nn.Module | None:
        """Return the module that makes h_0 from the input; None where h_0 IS the input."""
        return cast("nn.Module | None", getattr(self.model, "embed", None))

    @property
    def blocks(self) -> list[nn.Module]:
        # A plain list: slicing a ModuleList builds a new module.
        return list(cast(nn.ModuleList, self.model.blocks))

    @property
    def head_modules(self) -> list[nn.Module]:
        """List what follows h_L: ``out_ln`` where the model has one, then ``out_head``."""
        modules = [getattr(self.model, "out_ln", None), getattr(self.model, "out_head", None)]
        return [module for module in modules if isinstance(module, nn.Module)]

    @property
    def num_classes(self) -> int:
        return self.model.get_parameter("out_head.weight").shape[0]

    @property
    def feature_shapes(self) -> list[tuple[int, ...]]:
        """List the shapes, for one sample, of what :meth:`features` flattens in h_0 … h_L."""
        width = self.model.get_parameter("out_head.weight").shape[1]
        return [(width,)] * (len(self.blocks) + 1)

    @property
    def feature_counts(self) -> list[int]:
        """List how many features :meth:`features` finds in h_0 … h_L."""
        return [math.prod(shape) for shape in self.feature_shapes]

    # The way of a state.

    def embed(self, x: Tensor) -> Tensor:
        """Compute h_0 ``[B, ...]`` from the input."""
        module = self.embedding
        return x if module is None else cast(Tensor, module(x))

    def branch(self, index: int, h: Tensor) -> Tensor:
        """Compute what block ``index`` returns for h_l: the branch with a skip, else h_{l+1}."""
        return cast(Tensor, self.blocks[index](h))

    def advance(self, h: Tensor, branch: Tensor) -> Tensor:
        """Compute h_{l+1} from h_l and the branch."""
        return h + branch if self.skip else branch

    def logits(self, h_last: Tensor) -> Tensor:
        """Compute the logits ``[B, C]`` of h_L."""
        for module in self.head_modules:
            h_last = module(h_last)
        return h_last

    # Between a state and the vector that a feedback matrix speaks to.

    def features(self, h: Tensor) -> Tensor:
        """Return the part of a state that gets credit, ``[B, D]``: here all of it, flattened."""
        return h.flatten(1)

    def as_state(self, features: Tensor, like: Tensor) -> Tensor:
        """Give features ``[B, D]`` the shape of the state ``like``, zero where no credit goes.

        It is the adjoint of :meth:`features`: ⟨h, as_state(a, h)⟩ = ⟨features(h), a⟩.
        """
        return features.reshape(like.shape)


def anatomy_of(model: nn.Module) -> Anatomy:
    """Return the anatomy a model's class names, or else that of the residual contract."""
    named = getattr(type(model), "anatomy", None)
    if isinstance(named, type) and issubclass(named, Anatomy):
        return named(model)
    return Anatomy(model)
