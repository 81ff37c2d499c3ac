"""Taps and capture against ordinary autograd, and what they must leave alone."""

import copy

import pytest
import torch
from networks import EXPECTED_PLACES, KINDS, Branching, Handing, Stateful, audit_by_hand, example
from torch import nn

from fadiag_fast.capture import Probe, constants_of, untouched
from fadiag_fast.capture.points import TapError, unwrap


def captured_of(model, x, y, **options):
    with untouched(model):
        return Probe(model, **options).capture(x, y)


def places(model, x, select=None):
    with untouched(model):
        probe = Probe(model, select=select)
        probe.prepare(x)
    return [tap.where for tap in probe.taps.points]


@pytest.mark.parametrize("path", ["torch.func", "autograd"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_ordinary_autograd(kind, path, device):
    if (kind, path) == ("stateful", "torch.func"):
        pytest.skip("counts its calls in a buffer, which torch.func refuses: served by autograd")
    model, x, y, states = example(kind)
    hiddens, grads, logit_grads = audit_by_hand(copy.deepcopy(model), x, y, states)
    model, x, y = model.double().to(device), x.to(device), y.to(device)
    x = x.double() if x.is_floating_point() else x
    captured = captured_of(model, x, y, path=path)
    assert places(model, x) == EXPECTED_PLACES[kind]
    for got, expected in zip(
        [*captured.hiddens, *captured.grads, captured.logit_grads],
        [*hiddens, *grads, logit_grads],
        strict=True,
    ):
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-12, atol=1e-15)
        assert not got.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_leaves_the_model_as_it_was(kind):
    model, x, y, _ = example(kind)
    model.train()
    next(iter(model.children())).eval()
    next(model.parameters()).grad = torch.full_like(next(model.parameters()), 7.0)
    hooks = []
    model.register_forward_hook(lambda *_: hooks.append(1))
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    requires = [p.requires_grad for p in model.parameters()]
    random_state = torch.get_rng_state()
    captured_of(model, x, y)
    assert [module.training for module in model.modules()] == modes
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        assert (grad is None) == (parameter.grad is None)
        assert grad is None or torch.equal(grad, parameter.grad)
    assert [p.requires_grad for p in model.parameters()] == requires
    assert torch.equal(torch.get_rng_state(), random_state)
    assert len(model._forward_hooks) == 1


def test_restores_the_model_when_it_raises():
    model, x, y, _ = example("branching")
    model.train()
    with pytest.raises(ValueError, match="loss: expected a scalar, got shape"):
        captured_of(model, x, y, loss=lambda logits, _: logits.sum(1))
    assert all(module.training for module in model.modules())


def test_a_model_that_draws_random_numbers_in_eval_mode_leaves_the_generator():
    class Noisy(Branching):
        def forward(self, x):
            torch.rand(3)
            return super().forward(x)

    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    captured_of(
        Noisy(),
        torch.randn(4, 5, generator=torch.Generator().manual_seed(0)),
        torch.zeros(4, dtype=torch.long),
    )
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), expected)


def test_frozen_parameters_and_no_grad_do_not_matter():
    model, x, y, states = example("branching")
    _, expected, _ = audit_by_hand(copy.deepcopy(model), x, y, states)
    model.double().requires_grad_(False)
    with torch.no_grad():
        captured = captured_of(model, x.double(), y)
    for got, grad in zip(captured.grads, expected, strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-12, atol=1e-15)


def test_no_parameter_gradient_is_computed():
    """A parameter whose gradient would raise is never asked for it."""

    class Refusing(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x, weight):
            return x * weight

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(inputs[1])

        @staticmethod
        def backward(ctx, grad):
            assert not ctx.needs_input_grad[1], "asked for a parameter's gradient"
            return grad * ctx.saved_tensors[0], None

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((6,), 0.5))

        def forward(self, h):
            return Refusing.apply(h, self.weight)

    model = Branching()
    model.blocks = nn.ModuleList(Block() for _ in range(2))
    captured_of(model, torch.randn(4, 5), torch.zeros(4, dtype=torch.long))


def test_capture_is_a_function_of_the_parameters():
    """(parameters, x, y) → figures, so that a stack of checkpoints can be mapped over."""
    model, x, y, _ = example("branching")
    model.double().eval()
    x = x.double()
    probe = Probe(model)
    probe.prepare(x)
    stacks = {name: torch.stack([t, 2 * t]) for name, t in constants_of(model).items()}

    def grads(constants):
        return probe.capture(x, y, constants=constants).grads

    batched = torch.vmap(grads)(stacks)
    for c in range(2):
        one = grads({name: stack[c] for name, stack in stacks.items()})
        for got, expected in zip(batched, one, strict=True):
            torch.testing.assert_close(got[c], expected, rtol=1e-10, atol=1e-14)


def test_other_losses():
    model, x, _, states = example("branching")
    target = torch.randn(12, 4, dtype=torch.float64)
    model.double().eval()
    hiddens, logits = states(model, x.double())
    expected = torch.autograd.grad(nn.functional.mse_loss(logits, target, reduction="sum"), hiddens)
    captured = captured_of(
        model, x.double(), target, loss=lambda z, t: nn.functional.mse_loss(z, t, reduction="sum")
    )
    for got, grad in zip(captured.grads, expected, strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-12, atol=1e-15)


def test_half_precision_states_keep_their_type():
    model, x, y, _ = example("branching")
    captured = captured_of(model.bfloat16(), x.bfloat16(), y)
    assert {t.dtype for t in (*captured.hiddens, *captured.grads)} == {torch.bfloat16}


def test_wrappers_are_looked_through():
    model = Branching()
    assert unwrap(nn.DataParallel(model)) is model
    assert unwrap(torch.compile(model)) is model
    assert unwrap(torch.compile(nn.DataParallel(model))) is model


def test_a_scaled_skip_is_seen_at_the_next_blocks_input():
    """No reading of ``blocks`` as branch or state would reproduce this network."""

    class Halving(Branching):
        def forward(self, x):
            h = self.embed(x)
            for block in self.blocks:
                h = h + 0.5 * block(h)
            return self.out_head(self.out_ln(h))

    def states(model, x):
        hiddens = [model.embed(x)]
        for block in model.blocks:
            hiddens.append(hiddens[-1] + 0.5 * block(hiddens[-1]))
        return hiddens, model.out_head(model.out_ln(hiddens[-1]))

    model, x, y, _ = example("branching")
    halving = Halving()
    halving.load_state_dict(model.state_dict())
    hiddens, grads, _ = audit_by_hand(halving, x, y, states)
    captured = captured_of(halving, x.double(), y)
    for got, expected in zip([*captured.hiddens, *captured.grads], [*hiddens, *grads], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


def test_return_hidden_serves_where_there_are_no_blocks():
    assert places(Handing(), torch.randint(0, 11, (4, 3))) == ["hidden 0", "hidden 1", "hidden 2"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda logits, hiddens: logits, r"expected \(logits, hiddens\) .*got Tensor"),
        (lambda logits, hiddens: (logits, []), "non-empty list of hidden states .*of length 0"),
        (lambda logits, hiddens: (logits, [hiddens]), "hidden 0: expected one tensor, got list"),
        (lambda logits, hiddens: ([logits], hiddens), "logits: expected one tensor, got list"),
    ],
)
def test_a_model_that_hands_out_something_else(output, message):
    class Odd(Handing):
        def forward(self, tokens, return_hidden=False):
            return (
                output(*super().forward(tokens, True)) if return_hidden else super().forward(tokens)
            )

    with pytest.raises(TapError, match=message):
        places(Odd(), torch.randint(0, 11, (4, 3)))


def test_a_detached_state_is_named():
    class Detaching(Handing):
        def forward(self, tokens, return_hidden=False):
            logits, hiddens = super().forward(tokens, True)
            hiddens = [hiddens[0], hiddens[1].detach().clone(), hiddens[2]]
            return (logits, hiddens) if return_hidden else logits

    with pytest.raises(TapError, match="Detaching: hidden 1: expected a state that the loss"):
        captured_of(Detaching(), torch.randint(0, 11, (4, 3)), torch.zeros(4, dtype=torch.long))


def test_a_block_that_returns_no_tensor_is_named():
    class Text(nn.Module):
        def forward(self, h):
            return "text"

    model = Branching()
    model.blocks[1] = Text()
    model.forward = lambda x: [model.blocks[i](model.embed(x)) for i in range(2)]
    with pytest.raises(TapError, match=r"blocks\.1: expected one tensor, got str"):
        places(model, torch.randn(2, 5))


def test_no_blocks_at_all():
    model = Branching(depth=0)
    captured = captured_of(model, torch.randn(3, 5), torch.zeros(3, dtype=torch.long))
    assert len(captured.hiddens) == len(captured.grads) == 1


def test_non_finite_logits_leave_the_reading_open_but_do_not_stop_the_probe():
    model = Stateful().eval()
    with torch.no_grad():
        model.embed.weight.fill_(float("nan"))
    captured = captured_of(model, torch.randn(4, 5), torch.zeros(4, dtype=torch.long))
    assert captured.hiddens[0].isnan().all()
