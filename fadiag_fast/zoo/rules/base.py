"""What every training rule shares: the interface, the local update, the optimiser.

Notation, with B samples in a batch and L blocks: h_0 = embed(x), h_{l+1} = h_l + f_l(h_l), and
CE is the cross-entropy of the logits head(norm(h_L)). For a network without skips read h_{l+1} =
f_l(h_l); for one without an embedding, h_0 = x. A rule knows a network only through its
:class:`~.Anatomy`, ``self.anatomy``, and so needs no case for either.

**Credit** a_l, l = 0 … L−1, is what a rule tells block l about its OUTPUT, per sample and not
divided by B. Its counterpart in backpropagation is ∂CE_b/∂h_{l+1}, the gradient of sample b's OWN
cross-entropy: B times the gradient of the batch's mean. It has the shape of h_{l+1}. BatchNorm in
training mode mixes the samples of a batch, so "own" holds for it in eval mode only.

**Reduction.** Every loss here is the mean over the samples of a batch. The local rules minimise

    mean_b CE_b(head(norm(h_L)))  +  Σ_l mean_b ⟨f_l(h_l), a_l⟩

with every h_l and a_l detached, so that no gradient crosses from one block to another: block l
learns from its own term, ``out_ln`` and ``out_head`` from the first.

With a ``penalty`` λ > 0 every block's term also has λ·mean_b ‖f_l(h_l)‖². Where the network has no
skips f_l(h_l) is h_{l+1} itself, and the penalty one on activity.

A new rule is a subclass that says what its credit is, in ``block_credit``, and draws what it needs
beside the model in ``setup``: ``docs/rules.md`` has one. A vector per sample becomes a state by
``self.anatomy.as_state``, whatever shape the states have.

Source: 'Beyond Accuracy and Alignment' protocol, arXiv 2606.21126.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..residual_contract import anatomy_of
from .schedule import DeviceCosine

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class ForwardStates:
    """Hold one forward pass, cut between the blocks.

    Attributes:
        hiddens: h_0 … h_L, each ``[B, ...]`` (``[B, d]`` in an MLP), detached.
        branches: f_0(h_0) … f_{L−1}(h_{L−1}), shaped like h_1 … h_L; each carries the graph of its
            own block and of nothing else.
        embedded: h_0 with the graph of the embedding, where there is one.
        logits: ``[B, C]``, computed from the detached h_L.
        labels: ``[B]`` int64.
        error: softmax(logits) − onehot(labels), ``[B, C]``, detached: ∂CE_b/∂logits per sample.
    """

    hiddens: list[Tensor]
    branches: list[Tensor]
    embedded: Tensor
    logits: Tensor
    labels: Tensor
    error: Tensor


class Rule(ABC):
    """Train a network with one credit rule.

    Args:
        model: has ``embed``, ``blocks``, ``out_head`` and optionally ``out_ln``; ``blocks[l](h)``
            returns the branch without the skip, ``[B, d]`` for ``[B, d]``. Or its class names
            another :class:`~.Anatomy`, as SmallCNN and ViTMini do. It is
            trained in place and should be on its device already.
        learning_rate: of AdamW at step 0; a cosine takes it to 0 at ``total_steps``.
        weight_decay: of AdamW.
        total_steps: number of updates the cosine spans, at least 1.
        seed: of whatever the rule draws (feedback matrices). Torch's random state is not used.
        train_embed: whether the embedding learns; None takes the rule's own ``trains_embed``.
        penalty: λ of the residual penalty λ·mean_b ‖f_l(h_l)‖² in every block's local loss.

    Attributes:
        version: of the class, 1 at first: raise it where the rule comes to train otherwise than it
            did. A study then refuses to take over runs of the earlier one.
        tensors: what ``setup`` drew and does not train, by name: feedback matrices.
        networks: what ``setup`` made and the rule trains beside the model, by name.
        optimizer, scheduler: of all that learns.

    A training that is interrupted and goes on carries the model's weights, these four and every
    ``torch.Generator`` in an attribute. A rule that keeps anything else from step to step, such as
    a number or a tensor in an attribute, trains as well, but starts again at its first step.

    Raises TypeError for a model without the attributes named above and ValueError for
    ``total_steps`` below 1, a ``train_embed`` for a model without an embedding, or a ``penalty``
    that is negative or not finite. Source: 'Beyond Accuracy and Alignment' protocol, arXiv
    2606.21126 (λ from 1e-4 to 1e-1).
    """

    name: ClassVar[str]
    trains_embed: ClassVar[bool] = True
    version: ClassVar[int] = 1

    def __init__(
        self,
        model: nn.Module,
        *,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        total_steps: int,
        seed: int = 0,
        train_embed: bool | None = None,
        penalty: float = 0.0,
    ) -> None:
        self.anatomy = anatomy_of(model)
        if total_steps < 1:
            raise ValueError(
                f"{type(self).__name__}: expected total_steps of at least 1, got {total_steps}"
            )
        if train_embed is not None and self.anatomy.embedding is None:
            raise ValueError(
                f"{type(self).__name__}: train_embed: expected a model with an embedding, "
                f"got {type(model).__name__}, which has none"
            )
        if not 0 <= penalty < float("inf"):  # false for NaN too
            raise ValueError(
                f"{type(self).__name__}: expected a finite penalty of at least 0, got {penalty}"
            )
        self.model = model
        self.seed = seed
        self.total_steps = total_steps
        self.penalty = penalty
        self.train_embed = self.trains_embed if train_embed is None else train_embed
        self.tensors: dict[str, Tensor] = {}
        self.networks = nn.ModuleDict()
        self._set_up(seed)
        own = [parameter for parameter in self.networks.parameters() if parameter.requires_grad]
        self.parameters = [*self.trained_parameters(), *own]
        self.optimizer, self.scheduler = self._descent(learning_rate, weight_decay)

    @property
    def blocks(self) -> list[nn.Module]:
        return self.anatomy.blocks

    # What a rule defines.

    def fixed_modules(self) -> list[nn.Module]:
        """List the parts that stay as they are, weight decay included."""
        embedding = self.anatomy.embedding
        return [] if self.train_embed or embedding is None else [embedding]

    def trained_parameters(self) -> list[nn.Parameter]:
        """List the parameters the optimiser may move: all but those of the fixed modules."""
        fixed = {parameter for module in self.fixed_modules() for parameter in module.parameters()}
        return [parameter for parameter in self.model.parameters() if parameter not in fixed]

    @abstractmethod
    def block_credit(self, states: ForwardStates) -> list[Tensor] | list[None]:
        """Return the credit a_l of every block, from one forward pass.

        A list of L tensors shaped like h_1 … h_L, per sample and not divided by B, or L times None
        for a rule that gives its blocks no credit. Whoever calls this detaches them.
        """

    def setup(self, generator: torch.Generator) -> None:  # noqa: B027 - optional
        """Draw what the rule needs beside the model; nothing by default.

        Feedback matrices go into ``self.tensors``, networks that are trained along into
        ``self.networks``, in the dtype and on the device of ``self.like``. Both are saved with a
        checkpoint. Everything random comes from ``generator``, on the CPU, so that the draws are
        the same on every device, and nothing depends on what was set up before.
        """

    def embed_credit(self, states: ForwardStates) -> Tensor | None:
        """Return the credit of h_0 for an embedding that learns locally, detached like a_l.

        None, the default, leaves the embedding without a loss.
        """
        return None

    def auxiliary_loss(self, states: ForwardStates) -> Tensor:
        """Return the loss of ``self.networks``, a scalar; it must not reach the model."""
        return states.logits.new_zeros(())

    def finish_step(self) -> None:  # noqa: B027 - optional
        """Do what follows an optimiser step; nothing by default."""

    # For training on a GPU, where one step is recorded and repeated without Python.

    def count_step(self) -> None:  # noqa: B027 - optional
        """Do what a step does on the host alone, such as counting; nothing by default.

        ``update`` calls it last, and where a recorded step is repeated it is called in ``update``'s
        place. A rule that counts elsewhere trains with ordinary steps.
        """

    @property
    def phase(self) -> Hashable:
        """Return what the steps of now have in common; always the same by default.

        A rule whose ``update`` does something else from some step on returns something else from
        then on, and the step is recorded anew. Read on the host before every step.
        """
        return None

    # What every rule gets.

    @property
    def like(self) -> Tensor:
        """Return a tensor of the dtype and device that the rule's own tensors should have."""
        return self.model.get_parameter("out_head.weight")

    def _descent(
        self, learning_rate: float, weight_decay: float
    ) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.CosineAnnealingLR | DeviceCosine]:
        """Make the optimiser and its schedule: the same formulas on every device."""
        if not self.like.is_cuda:
            optimizer = torch.optim.AdamW(
                self.parameters, lr=learning_rate, weight_decay=weight_decay
            )
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.total_steps)
            return optimizer, cosine
        # Rate and number of steps lie on the device, where a recorded step finds them, and one
        # kernel serves all parameters.
        rate = torch.tensor(learning_rate, dtype=torch.float32, device=self.like.device)
        optimizer = torch.optim.AdamW(
            self.parameters, lr=rate, weight_decay=weight_decay, fused=True, capturable=True
        )
        rate = optimizer.param_groups[0]["lr"]
        return optimizer, DeviceCosine(rate, learning_rate, self.total_steps)

    def _set_up(self, seed: int) -> None:
        self.setup(torch.Generator().manual_seed(seed))
        self.networks.to(self.like)

    def redrawn(self, seed: int) -> Self:
        """Return this rule on the same model with everything it draws drawn anew.

        The copy shares the model and is there to compute credit with, not to train.
        """
        other = copy.copy(self)
        other.tensors, other.networks = {}, nn.ModuleDict()
        other._set_up(seed)
        return other

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the rule needs, beside the model, to compute its credit again.

        Only tensors: feedback matrices and the weights of auxiliary networks; empty for a rule
        that draws nothing. The optimiser's state is not part of it.
        """
        return {**self.tensors, **self.networks.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises ValueError when names or shapes differ from this rule's own.
        """
        own = self.state_dict()
        if own.keys() != state.keys():
            raise ValueError(
                f"{type(self).__name__}: expected the rule state {sorted(own)}, got {sorted(state)}"
            )
        for key, tensor in own.items():
            if tensor.shape != state[key].shape:
                raise ValueError(
                    f"{type(self).__name__}: rule state {key!r}: expected shape "
                    f"{list(tensor.shape)}, got {list(state[key].shape)}"
                )
        # Only when everything fits, so that a refused state leaves the rule as it was.
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(state[key])

    def forward_states(self, x: Tensor, y: Tensor) -> ForwardStates:
        """Run the model on ``x`` with labels ``y`` and cut the graph between the blocks."""
        with torch.enable_grad():
            embedded = self.anatomy.embed(x)
            hiddens = [embedded.detach()]
            branches = []
            for index in range(len(self.blocks)):
                branch = self.anatomy.branch(index, hiddens[-1])
                branches.append(branch)
                hiddens.append(self.anatomy.advance(hiddens[-1], branch.detach()))
            logits = self.anatomy.logits(hiddens[-1])
        error = output_error(logits.detach(), y)
        return ForwardStates(hiddens, branches, embedded, logits, y, error)

    def credit(self, x: Tensor, y: Tensor) -> list[Tensor] | list[None]:
        """Compute the credit vectors a_0 … a_{L−1} the rule would use on one batch.

        Args:
            x: ``[B, ...]``, as the model takes it.
            y: labels ``[B]``, int64.

        Returns L detached tensors shaped like h_1 … h_L (``[B, d]`` in an MLP): a_l credits the
        OUTPUT of block l, so compare it with ∂CE/∂h_{l+1}; per sample, not divided by B. A rule
        that gives no credit (frozen) returns L times None. Nothing is trained; but a model with
        BatchNorm should be in eval mode, or its running statistics take part. Source: 'Beyond
        Accuracy and Alignment' protocol, arXiv 2606.21126.
        """
        return _detached(self.block_credit(self.forward_states(x, y)))

    def update(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Make one training step on a batch.

        Args:
            x: ``[B, ...]``, as the model takes it.
            y: labels ``[B]``, int64.

        Returns scalar tensors, on the model's device and without a graph, so that no step waits
        for a value: ``loss``, the mean cross-entropy before the step; and for a local rule
        ``local_loss``, Σ_l mean_b ⟨f_l(h_l), a_l⟩ with penalty, and ``auxiliary_loss`` where the
        rule trains networks of its own.
        """
        losses = self.losses(x, y)
        self.descend(reduce(add, losses.values()))
        self.finish_step()
        self.count_step()
        return {name: loss.detach() for name, loss in losses.items()}

    def losses(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Compute the losses whose sum a step descends, by the names of :meth:`update`."""
        states = self.forward_states(x, y)
        # Detached here, so that a credit made from the head's weights does not train the head.
        credits = _detached(self.block_credit(states))
        loss = F.cross_entropy(states.logits, y)
        local_loss = torch.zeros_like(loss)
        for branch, credit in zip(states.branches, credits, strict=True):
            if credit is not None:
                local_loss = local_loss + mean_inner_product(branch, credit)
                if self.penalty:
                    local_loss = local_loss + self.penalty_of(branch)
        if self.train_embed and (embed_credit := self.embed_credit(states)) is not None:
            local_loss = local_loss + mean_inner_product(states.embedded, embed_credit.detach())
        losses = {"loss": loss, "local_loss": local_loss}
        return (
            {**losses, "auxiliary_loss": self.auxiliary_loss(states)} if self.networks else losses
        )

    def penalty_of(self, branch: Tensor) -> Tensor:
        """Compute λ·mean_b ‖f_l(h_l)‖² of one branch, a scalar."""
        if self.penalty == 0:
            # Not zero times a square, which is NaN where a branch has left the range.
            return branch.new_zeros(())
        return self.penalty * mean_inner_product(branch, branch)

    def descend(self, loss: Tensor) -> None:
        """Make one optimiser step down ``loss`` and one step of the schedule.

        A parameter that ``loss`` does not reach is left alone, weight decay included.
        """
        grads = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = grad
        self.optimizer.step()
        self.scheduler.step()
        # Nothing of this step stays behind for another backward to add to.
        self.optimizer.zero_grad(set_to_none=True)


def _detached(credits: list[Tensor] | list[None]) -> list[Tensor] | list[None]:
    return [credit if credit is None else credit.detach() for credit in credits]  # type: ignore[return-value]


def output_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute e = softmax(logits) − onehot(labels), ``[B, C]``, per sample."""
    return logits.softmax(dim=1) - F.one_hot(labels, logits.shape[1]).to(logits.dtype)


def mean_inner_product(branch: Tensor, credit: Tensor) -> Tensor:
    """Compute mean_b ⟨branch_b, credit_b⟩ over all features of a sample, a scalar."""
    return (branch * credit).flatten(1).sum(dim=1).mean()
