"""Capture hidden states and the gradients of the loss with respect to them.

(parameters, x, y) → hiddens, grads, and the gradient at the logits, by ``torch.func``: the network
is run block by block, each under its own ``torch.func.vjp``, and the pullbacks are applied in
reverse. That is one forward and one backward pass; parameters are constants in it, so that no
gradient of a parameter is ever computed, and row b of a gradient is sample b's.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .taps import ContractError, Taps, split_hidden, steps_of, tensor_from

Loss = Callable[[Tensor, Tensor], Tensor]
Pullback = Callable[[Tensor], tuple[Tensor]]


class Captured(NamedTuple):
    """One batch, seen from inside.

    Attributes:
        hiddens: h_0 … h_L, ``[B, ...]`` each.
        grads: the gradients of the loss at ``hiddens``, same shapes and dtypes. A loss with mean
            reduction puts the factor 1/B into them.
        logits: the network's output.
        logit_grads: the gradient of the loss at ``logits``.
        loss: scalar.
    """

    hiddens: list[Tensor]
    grads: list[Tensor]
    logits: Tensor
    logit_grads: Tensor
    loss: Tensor


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode; leave modes, buffers and random number generators as they were."""
    modes = [(module, module.training) for module in model.modules()]
    # A forward pass may update buffers even in eval mode: a counter, for example.
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        model.eval()
        with torch.random.fork_rng(devices=sorted(devices, key=str), enabled=True):
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def constants_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and buffers by name, detached: no gradient is taken at them."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return parameters | {name: buffer.detach() for name, buffer in model.named_buffers()}


def _pullback(step: Callable[[Tensor], Tensor], h: Tensor) -> tuple[Tensor, Pullback]:
    """Run one step of the network; return its output and the map from grads there to grads at h."""
    out, pullback = torch.func.vjp(step, h)  # type: ignore[misc]  # three values only with has_aux
    return out, pullback


class _Probe(nn.Module):
    """The network with its gradients as outputs; ``functional_call`` supplies the parameters."""

    def __init__(self, model: nn.Module, taps: Taps, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.taps = taps
        self.loss = loss

    def forward(self, x: Tensor, y: Tensor) -> Captured:
        if self.taps.style == "return_hidden":
            return self._through_autograd(x, y)
        model: Any = self.model
        *blocks, head = steps_of(self.model, self.taps.style)
        hiddens = [tensor_from(model.embed(x), "embed")]
        pullbacks = []
        for block in blocks:
            state, pullback = _pullback(block, hiddens[-1])
            hiddens.append(state)
            pullbacks.append(pullback)
        logits, pullback = _pullback(head, hiddens[-1])
        pullbacks.append(pullback)
        logit_grads, loss = self._at_the_output(logits, y)
        grads = [logit_grads]
        while pullbacks:
            # Popped, so that a block's activations are freed as soon as they have been used.
            grads.append(pullbacks.pop()(grads[-1])[0])
        return Captured(hiddens, grads[:0:-1], logits, logit_grads, loss)

    def _at_the_output(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        def scalar(z: Tensor) -> Tensor:
            loss = tensor_from(self.loss(z, y), "loss")
            if loss.dim() != 0:
                raise ValueError(f"loss: expected a scalar, got shape {list(loss.shape)}")
            return loss

        return torch.func.grad_and_value(scalar)(logits)

    def _through_autograd(self, x: Tensor, y: Tensor) -> Captured:
        """Serve a network that hands out its states: only ordinary autograd reaches them."""
        with torch.enable_grad():
            if x.is_floating_point():
                x = x.detach().requires_grad_()
            output = self.model(x, return_hidden=True)
            logits, hiddens = split_hidden(output, type(self.model).__name__)
            logit_grads, loss = self._at_the_output(logits.detach(), y)
            reached = [l for l, h in enumerate(hiddens) if h.requires_grad]
            grads: list[Tensor | None] = [None] * len(hiddens)
            if logits.requires_grad and reached:
                targets = [hiddens[l] for l in reached]
                found = torch.autograd.grad(logits, targets, logit_grads, allow_unused=True)
                grads = [
                    found[reached.index(l)] if l in reached else None for l in range(len(hiddens))
                ]
        for l, grad in enumerate(grads):
            if grad is None:
                raise ContractError(
                    f"{type(self.model).__name__}: hidden {l}: expected a state that the logits "
                    f"depend on, got one that is detached or was overwritten in place"
                )
        return Captured(
            [h.detach() for h in hiddens],
            [grad for grad in grads if grad is not None],
            logits.detach(),
            logit_grads,
            loss.detach(),
        )


def capture(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    taps: Taps,
    loss: Loss,
    constants: Mapping[str, Tensor] | None = None,
) -> Captured:
    """Run one forward and one backward pass and return what :class:`Captured` lists.

    Args:
        model: an unwrapped module in eval mode (see :func:`untouched`).
        x: input batch, first dimension B.
        y: targets, passed to ``loss``.
        taps: from :func:`fadiag_fast.taps.find_taps`.
        loss: (logits, y) → scalar. Its reduction scales every gradient.
        constants: parameters and buffers by name; None takes the model's own.

    Raises:
        ContractError: a block or the head returns no tensor, or a state is not part of the graph.
        ValueError: the loss is not a scalar.
    """
    probe = _Probe(model, taps, loss)
    chosen = constants_of(model) if constants is None else constants
    named = {f"model.{name}": tensor for name, tensor in chosen.items()}
    if taps.style == "return_hidden":
        # Autograd needs a path from the first state to the logits; integer inputs offer none, and
        # parameters only do if they require a gradient, which is still never computed.
        named = {
            name: tensor.requires_grad_() if tensor.is_floating_point() else tensor
            for name, tensor in ((n, t.detach()) for n, t in named.items())
        }
        return torch.func.functional_call(probe, named, (x, y), strict=False)  # type: ignore[no-any-return]
    with torch.enable_grad():
        return torch.func.functional_call(probe, named, (x, y), strict=False)  # type: ignore[no-any-return]
