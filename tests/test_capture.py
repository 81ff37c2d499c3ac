"""Taps and capture against ordinary autograd, and what they must leave alone."""

import copy

import pytest
import torch
from networks import EXPECTED_STYLE, KINDS, Branching, Handing, Stateful, audit_by_hand, example
from torch import nn

from fadiag_fast.capture import capture, constants_of, untouched
from fadiag_fast.taps import ContractError, find_taps, unwrap

cross_entropy = nn.functional.cross_entropy


def captured_of(model, x, y, loss=cross_entropy):
    with untouched(model):
        return capture(model, x, y, taps=find_taps(model, x), loss=loss)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_ordinary_autograd(kind, device):
    model, x, y, states = example(kind)
    hiddens, grads, logit_grads = audit_by_hand(copy.deepcopy(model), x, y, states)
    model, x, y = model.double().to(device), x.to(device), y.to(device)
    x = x.double() if x.is_floating_point() else x
    captured = captured_of(model, x, y)
    with untouched(model):
        assert find_taps(model, x).style == EXPECTED_STYLE[kind]
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
    taps = find_taps(model, x)
    stacks = {name: torch.stack([t, 2 * t]) for name, t in constants_of(model).items()}

    def grads(constants):
        return capture(model, x, y, taps=taps, loss=cross_entropy, constants=constants).grads

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


def test_a_network_without_the_contract_is_named_with_what_is_missing():
    model = nn.Sequential(nn.Linear(5, 4))
    with pytest.raises(
        ContractError, match=r"Sequential: expected .* missing: embed, blocks, out_head"
    ):
        find_taps(model, torch.randn(2, 5))


def test_a_network_that_no_reading_reproduces_shows_both_differences():
    class Halving(Branching):
        def forward(self, x):
            h = self.embed(x)
            for block in self.blocks:
                h = h + 0.5 * block(h)
            return self.out_head(self.out_ln(h))

    with pytest.raises(ContractError, match=r"as branch: 0\.\d+; as state: \d"):
        find_taps(Halving(), torch.randn(8, 5))


def test_return_hidden_serves_where_no_reading_does():
    class Both(Branching):
        def forward(self, x, return_hidden=False):
            h = self.embed(x)
            hiddens = [h]
            for block in self.blocks:
                h = h + 0.5 * block(h)
                hiddens.append(h)
            logits = self.out_head(self.out_ln(h))
            return (logits, hiddens) if return_hidden else logits

    taps = find_taps(Both(), torch.randn(8, 5))
    assert taps.style == "return_hidden"
    assert len(taps.names) == 4


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

    with pytest.raises(ContractError, match=message):
        find_taps(Odd(), torch.randint(0, 11, (4, 3)))


def test_a_detached_state_is_named():
    class Detaching(Handing):
        def forward(self, tokens, return_hidden=False):
            logits, hiddens = super().forward(tokens, True)
            hiddens = [hiddens[0], hiddens[1].detach().clone(), hiddens[2]]
            return (logits, hiddens) if return_hidden else logits

    with pytest.raises(
        ContractError, match="Detaching: hidden 1: expected a state that the logits"
    ):
        captured_of(Detaching(), torch.randint(0, 11, (4, 3)), torch.zeros(4, dtype=torch.long))


def test_a_block_that_returns_a_tuple_is_named():
    class Pair(nn.Module):
        def forward(self, h):
            return h, h

    model = Branching()
    model.blocks[1] = Pair()
    model.forward = lambda x: model.out_head(model.embed(x))
    with pytest.raises(ContractError, match=r"blocks\.1: expected one tensor, got tuple"):
        find_taps(model, torch.randn(2, 5))


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
