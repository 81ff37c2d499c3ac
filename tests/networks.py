"""Small networks with every reading of the residual contract, and an audit that shares no code."""

import torch
from torch import nn


class Branching(nn.Module):
    """``blocks`` return branches; no terminal norm."""

    def __init__(self, width=6, depth=3, classes=4, norm=True):
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
            for _ in range(depth)
        )
        if norm:
            self.out_ln = nn.LayerNorm(width)
        self.out_head = nn.Linear(width, classes)

    def forward(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h)
        return self.out_head(self.out_ln(h) if hasattr(self, "out_ln") else h)


class Stateful(Branching):
    """``blocks`` return the full next state; dropout, a BatchNorm and a counter that must rest."""

    def __init__(self):
        super().__init__(norm=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout())
            for _ in range(3)
        )
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.out_head(h)


class Handing(nn.Module):
    """No contract attributes; hands out its states on request. Integer input."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.mix = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 4)

    def forward(self, tokens, return_hidden=False):
        h = self.table(tokens).mean(1)
        hiddens = [h]
        for layer in self.mix:
            h = h + layer(h).tanh()
            hiddens.append(h)
        logits = self.head(h)
        return (logits, hiddens) if return_hidden else logits


def audit_by_hand(model, x, y, states):
    """Hidden states by ``states(model, x)``, gradients by ordinary autograd; all in float64."""
    model = model.double().eval()
    hiddens, logits = states(model, x.double() if x.is_floating_point() else x)
    loss = nn.functional.cross_entropy(logits, y)
    grads = torch.autograd.grad(loss, [*hiddens, logits])
    return [h.detach() for h in hiddens], list(grads[:-1]), grads[-1]


def branch_states(model, x):
    h = model.embed(x)
    hiddens = [h]
    for block in model.blocks:
        h = h + block(h)
        hiddens.append(h)
    return hiddens, model.out_head(model.out_ln(h) if hasattr(model, "out_ln") else h)


def full_states(model, x):
    h = model.embed(x)
    hiddens = [h]
    for block in model.blocks:
        h = block(h)
        hiddens.append(h)
    return hiddens, model.out_head(h)


def handed_states(model, tokens):
    logits, hiddens = model(tokens, return_hidden=True)
    return hiddens, logits


def example(kind, batch=12, seed=0):
    """A network of one kind with a batch and the hand-written way to its states."""
    torch.manual_seed(seed)
    y = torch.randint(0, 4, (batch,))
    if kind == "handing":
        return Handing(), torch.randint(0, 11, (batch, 3)), y, handed_states
    x = torch.randn(batch, 5)
    if kind == "stateful":
        model = Stateful()
        model(torch.randn(32, 5))  # gives BatchNorm's running figures something to show
        return model, x, y, full_states
    return Branching(norm=kind == "branching"), x, y, branch_states


KINDS = ["branching", "no_norm", "stateful", "handing"]
EXPECTED_PLACES = {
    "branching": ["input of blocks.0", "input of blocks.1", "input of blocks.2", "input of out_ln"],
    "no_norm": ["input of blocks.0", "input of blocks.1", "input of blocks.2", "input of out_head"],
    "stateful": [
        "input of blocks.0",
        "output of blocks.0",
        "output of blocks.1",
        "output of blocks.2",
    ],
    "handing": ["hidden 0", "hidden 1", "hidden 2"],
}
