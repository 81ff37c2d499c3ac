"""Step records by plain hooks, from real tiny trainings; shares no code with the probe."""

import math
from itertools import count

import torch
from torch import nn

from fadiag_fast.training.records import StepRecord


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h):
        return h + self.down(nn.functional.gelu(self.up(self.norm(h))))


class TinyMLP(nn.Module):
    """Residual MLP on vectors: ``embed``, ``blocks``, norm and head."""

    def __init__(self, width=32, depth=4, features=20, classes=5):
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.blocks = nn.ModuleList(Residual(width) for _ in range(depth))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.out(h)


class TinyTransformer(nn.Module):
    """Transformer encoder on tokens that classifies their mean."""

    def __init__(self, width=32, depth=3, tokens=16, length=8, classes=5, norm_first=True):
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 2 * width, 0.0, batch_first=True, norm_first=norm_first
            )
            for _ in range(depth)
        )
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.out(h.mean(1))


class HookRecorder:
    """Keep the states of the embedding and the blocks, and make a record after a backward pass."""

    def __init__(self, model):
        self.layers = ("embed", *(f"blocks.{l}" for l in range(len(model.blocks))), "out")
        self.states, self.steps = {}, count()
        modules = (model.embed, *model.blocks, model.out)
        for name, module in zip(self.layers, modules, strict=True):
            module.register_forward_hook(lambda _m, _a, out, name=name: self._keep(name, out))

    def _keep(self, name, state):
        if state.requires_grad:
            state.retain_grad()
            self.states[name] = state

    def record(self):
        def norms(tensor):
            return tensor.detach().double().flatten(1).norm(dim=1)

        *hidden, logits = (self.states.pop(name) for name in self.layers)
        errors = norms(logits.grad)
        n = len(hidden)
        lengths = [norms(h).median().item() for h in hidden]
        return StepRecord(
            step=next(self.steps),
            layers=self.layers[:-1],
            hidden_norms=tuple(lengths),
            rms_norms=tuple(
                a / math.sqrt(h[0].numel()) for a, h in zip(lengths, hidden, strict=True)
            ),
            grad_norms=tuple(norms(h.grad).median().item() for h in hidden),
            credit_gains=tuple((norms(h.grad) / errors).median().item() for h in hidden),
            output_grad_norm=errors.median().item(),
            stabilities=(math.nan,) * n,
            average_cosines=(math.nan,) * n,
            num_directions=0,
            num_samples=len(logits),
        )


OPTIMISERS = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=30 * lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=10 * lr, momentum=0.9, nesterov=True),
    "adam": lambda p, lr: torch.optim.Adam(p, lr=lr),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.05),
    "rmsprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr / 3),
}
SCHEDULES = {
    "constant": lambda step, steps: 1.0,
    "warm-up and cosine": lambda step, steps: (
        min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
    ),
    "steps": lambda step, steps: 0.1 ** (3 * step // steps),
}


def training(
    seed=0,
    *,
    model="mlp",
    optimiser="adamw",
    schedule="constant",
    lr=1e-3,
    batch=32,
    steps=2000,
    noise=0.1,
    pool=None,
    depth=None,
    spoil=None,
):
    """Yield the records of a training on a random teacher's labels, some of them wrong.

    ``pool`` limits the training set, so that the task gets solved; ``spoil(step, model)`` is called
    before each step and may break the model.
    """
    torch.manual_seed(seed)
    if model == "mlp":
        net = TinyMLP(depth=depth or 4)
        teacher = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 5))
        draw = lambda size: torch.randn(size, 20)  # noqa: E731
    else:
        net = TinyTransformer(depth=depth or 3, norm_first=model == "transformer")
        table = nn.Embedding(16, 24)
        body = nn.Sequential(nn.Flatten(), nn.Linear(8 * 24, 40), nn.Tanh(), nn.Linear(40, 5))
        teacher = nn.Sequential(table, body)
        draw = lambda size: torch.randint(0, 16, (size, 8))  # noqa: E731
    kept = draw(pool) if pool else None
    recorder = HookRecorder(net)
    optimizer = OPTIMISERS[optimiser](net.parameters(), lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: SCHEDULES[schedule](step, steps)
    )
    flip = torch.rand(pool) < noise if pool else None
    wrong = torch.randint(0, 5, (pool,)) if pool else None
    for step in range(steps):
        if spoil is not None:
            spoil(step, net)
        chosen = torch.randint(0, pool, (batch,)) if pool else None
        x = kept[chosen] if pool else draw(batch)
        with torch.no_grad():
            y = teacher(x).argmax(1)
        if pool:
            y = torch.where(flip[chosen], wrong[chosen], y)
        else:
            y = torch.where(torch.rand(batch) < noise, torch.randint(0, 5, (batch,)), y)
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(net(x), y).backward()
        yield recorder.record()
        optimizer.step()
        scheduler.step()


def healthy_settings(runs, first_seed=0):
    """Return keyword arguments of ``runs`` different healthy trainings."""
    models = ("mlp", "transformer", "mlp", "transformer-post")
    rates = (1e-3, 3e-4, 3e-3, 1e-4)
    pools = (None, 512, None, 2048, 128)
    return [
        {
            "seed": first_seed + i,
            "model": models[i % 4],
            "optimiser": list(OPTIMISERS)[i % 5],
            "schedule": list(SCHEDULES)[(i // 2) % 3],
            "lr": rates[(i // 3 + i) % 4],
            "batch": (32, 64, 16)[i % 3],
            "noise": (0.1, 0.0, 0.3)[(i // 4) % 3],
            "pool": pools[(i // 2 + i) % 5],
        }
        for i in range(runs)
    ]
