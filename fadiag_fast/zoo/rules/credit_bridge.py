"""Credit Bridge: credit as the gradient of a learned value of the hidden state."""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import ForwardStates
from .bridge import BridgeNetwork, credit_offset
from .dfa import DirectFeedbackAlignment


class CreditBridge(DirectFeedbackAlignment):
    """Train the blocks with the gradient of a scalar network V(h_l, t_l, e), a value of the state.

    Formulas, per sample, with t_l = l/L and e = softmax − onehot: a_l = ∂V(h, t_l, e)/∂h at
    h = h_l, or at h_{l+1} and t_{l+1} where the credit is read at the block's output. V learns from
    the forward pass beside the blocks, all states detached; it descends the batch mean of

    - consistency: the mean over l < L of (V(h_l) − T_l)², where T_l is the soft-min over noise of
      V̄, a copy of V whose weights follow by an exponential moving average:
      T_l = −λ·log mean_k exp(−V̄(h_{l+1} + σ·ε_k, t_{l+1}, e)/λ), ε_k ~ N(0, I), k = 1 … K;
    - terminal gradient: ``terminal_weight`` times ‖∂V(h_L, 1, e)/∂h_L − ∂CE_b/∂h_L‖², through norm
      and head only, without which V says nothing about the loss.

    For the first ``dfa_fraction`` of the steps the credit is that of direct feedback alignment,
    while V learns; :meth:`credit` follows, and the number of steps left is saved with the rule.

    Choices where the protocol is open: V and V̄ are GELU perceptrons on the raw states (see
    :class:`~fadiag_fast.zoo.rules.bridge.BridgeNetwork`), shared by all layers; consistency runs
    over the states below h_L at which V is read; no level of
    V is fixed, because its gradient alone is used; V learns by the model's optimiser at the
    model's learning rate. State means the class token in a transformer and the flattened map in a
    convolutional network.

    Args:
        credit_at: "input" or "output" of block l; None takes the input, as the protocol's formula
            does, or the output in a network without skips, whose states change their shape.
        width: of V's hidden layers.
        num_layers: of V, from input to output.
        temperature: λ of the soft-min.
        num_noises: K.
        noise_scale: σ.
        average_decay: share of its own weights that V̄ keeps in a step.
        terminal_weight: weight of the terminal gradient's match.
        dfa_fraction: share of the steps carried by direct feedback alignment, from 0 to 1.
        train_embed: also let the embedding descend ⟨embed(x), a⟩ with the credit at h_0. Off by
            default, for the reason given at direct feedback alignment.

    The other arguments are those of :class:`Rule`. The noise comes from ``seed``, drawn on the CPU,
    or on the GPU for a network there: unlike everything else that a rule draws it depends on that.
    :meth:`state_dict` returns V, V̄, DFA's matrices and the steps left to DFA. Raises ValueError for
    values out of range. Source: 'Beyond Accuracy and Alignment' protocol, arXiv 2606.21126 (width
    256, 3 layers, lr 1e-3, λ 0.1, K 8, average 0.995, σ 0.1, terminal weight 1, DFA for 20%).
    """

    name: ClassVar[str] = "credit-bridge"

    def __init__(
        self,
        model: nn.Module,
        *,
        credit_at: str | None = None,
        width: int = 256,
        num_layers: int = 3,
        temperature: float = 0.1,
        num_noises: int = 8,
        noise_scale: float = 0.1,
        average_decay: float = 0.995,
        terminal_weight: float = 1.0,
        dfa_fraction: float = 0.2,
        **common: Any,
    ) -> None:
        for what, value, fits in (
            ("a temperature above 0", temperature, temperature > 0),
            ("num_noises of at least 1", num_noises, num_noises >= 1),
            ("a noise_scale of at least 0", noise_scale, noise_scale >= 0),
            ("an average_decay from 0 to 1", average_decay, 0 <= average_decay <= 1),
            ("a terminal_weight of at least 0", terminal_weight, terminal_weight >= 0),
            ("a dfa_fraction from 0 to 1", dfa_fraction, 0 <= dfa_fraction <= 1),
        ):
            if not fits:
                raise ValueError(f"CreditBridge: expected {what}, got {value}")
        self.credit_at = credit_at
        self.width, self.num_layers = width, num_layers
        self.temperature = temperature
        self.num_noises = num_noises
        self.noise_scale = noise_scale
        self.average_decay = average_decay
        self.terminal_weight = terminal_weight
        self.dfa_fraction = dfa_fraction
        super().__init__(model, **common)

    def setup(self, generator: torch.Generator) -> None:
        super().setup(generator)
        self.offset = credit_offset("CreditBridge", self.anatomy, self.credit_at)
        value = BridgeNetwork(
            self.anatomy.feature_shapes,
            self.anatomy.num_classes,
            1,
            width=self.width,
            num_layers=self.num_layers,
            generator=generator,
        )
        self.networks["value"] = value
        self.networks["average"] = copy.deepcopy(value).requires_grad_(False)
        # Stays on the CPU, where a step can read it without waiting for the device.
        left = round(self.dfa_fraction * self.total_steps)
        self.tensors["dfa_steps_left"] = torch.tensor(left)
        self.noise = generator
        if self.like.is_cuda:
            # Noise from the host would make every step wait for it.
            seed = int(torch.randint(2**62, (), generator=generator))
            self.noise = torch.Generator(self.like.device).manual_seed(seed)

    @property
    def value(self) -> BridgeNetwork:
        return cast(BridgeNetwork, self.networks["value"])

    @property
    def average(self) -> BridgeNetwork:
        return cast(BridgeNetwork, self.networks["average"])

    @property
    def carried_by_dfa(self) -> bool:
        return int(self.tensors["dfa_steps_left"]) > 0

    def redrawn(self, seed: int) -> CreditBridge:
        other = super().redrawn(seed)
        # Where in the training it is belongs to the credit and is no draw.
        other.tensors["dfa_steps_left"] = self.tensors["dfa_steps_left"].clone()
        return other

    def block_credit(self, states: ForwardStates) -> list[Tensor]:
        if self.carried_by_dfa:
            return super().block_credit(states)
        return [
            self._value_gradient(index + self.offset, states) for index in range(len(self.blocks))
        ]

    def embed_credit(self, states: ForwardStates) -> Tensor:
        if self.carried_by_dfa:
            return super().embed_credit(states)
        return self._value_gradient(0, states)

    def _value_gradient(self, index: int, states: ForwardStates) -> Tensor:
        h = states.hiddens[index]
        credit = self._feature_gradient(
            self.anatomy.features(h), index, states, differentiable=False
        )
        return self.anatomy.as_state(credit, like=h)

    def _feature_gradient(
        self, features: Tensor, index: int, states: ForwardStates, *, differentiable: bool
    ) -> Tensor:
        """Compute ∂V/∂h_index per sample, ``[B, D]``."""
        with torch.enable_grad():
            leaf = features.detach().requires_grad_()
            value = self.value(leaf, index, states.error).sum()
            (gradient,) = torch.autograd.grad(value, [leaf], create_graph=differentiable)
        return gradient

    def auxiliary_loss(self, states: ForwardStates) -> Tensor:
        features = [self.anatomy.features(h) for h in states.hiddens]
        gradient = self._feature_gradient(
            features[-1], len(features) - 1, states, differentiable=True
        )
        mismatch = gradient - self._terminal_gradient(states)
        terminal = mismatch.square().sum(dim=1).mean()
        lowest = 0 if self.train_embed else self.offset
        consistency = [
            F.mse_loss(
                self.value(features[index], index, states.error).squeeze(1),
                self.soft_minimum(features[index + 1], index + 1, states.error),
            )
            for index in range(lowest, len(features) - 1)
        ]
        if not consistency:
            return self.terminal_weight * terminal
        return torch.stack(consistency).mean() + self.terminal_weight * terminal

    def _terminal_gradient(self, states: ForwardStates) -> Tensor:
        with torch.enable_grad():
            h = states.hiddens[-1].detach().requires_grad_()
            loss = F.cross_entropy(self.anatomy.logits(h), states.labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, [h])
        return self.anatomy.features(gradient)

    @torch.no_grad()
    def soft_minimum(self, features: Tensor, index: int, error: Tensor) -> Tensor:
        """Compute T from the features ``[B, D]`` of h_index: ``[B]``."""
        shape = (self.num_noises, *features.shape)
        noise = torch.randn(shape, generator=self.noise, device=self.noise.device)
        noise = noise.to(features) * self.noise_scale
        noisy = (features + noise).flatten(0, 1)
        values = self.average(noisy, index, error.repeat(self.num_noises, 1))
        scaled = -values.reshape(self.num_noises, -1) / self.temperature
        mean: Tensor = scaled.logsumexp(dim=0) - math.log(self.num_noises)
        return -self.temperature * mean

    @torch.no_grad()
    def finish_step(self) -> None:
        torch._foreach_lerp_(
            list(self.average.parameters()), list(self.value.parameters()), 1 - self.average_decay
        )

    def count_step(self) -> None:
        self.tensors["dfa_steps_left"].sub_(1).clamp_(min=0)

    @property
    def phase(self) -> bool:
        return self.carried_by_dfa
