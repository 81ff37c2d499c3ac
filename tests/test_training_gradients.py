"""Which backward passes a record is of: those that train, not what a step differentiates besides.

The oracle is the same step without the rest: another copy of the network, probed alike, whose step
has the backward pass that trains alone.
"""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from fadiag_fast import StepProbe
from fadiag_fast.taps import TapError

F = nn.functional
SAMPLES, WIDTH = 8, 6
FIGURES = (
    "hidden_norms",
    "grad_norms",
    "credit_gains",
    "output_grad_norm",
    "num_samples",
    "micro_batches",
    "unreached",
    "gain_reference",
)


class Network(nn.Module):
    """Layers that are curved everywhere: second derivatives reach all states."""

    def __init__(self, recompute=None):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)
        )
        self.head = nn.Linear(WIDTH, 3)
        self.recompute = recompute

    def forward(self, x):
        for layer in self.layers:
            if self.recompute is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.recompute)
        return self.head(x)


def network(**options):
    torch.manual_seed(3)
    return Network(**options)


def batch_of(seed=1):
    torch.manual_seed(seed)
    return torch.randn(SAMPLES, WIDTH), torch.randint(0, 3, (SAMPLES,))


X, Y = batch_of()
OTHER_X, OTHER_Y = batch_of(2)
TAPS = ["layers.0", "layers.1", "layers.2"]


def probed(model, **options):
    records = []
    return StepProbe(model, TAPS, sink=records.append, alarms=False, **options), records


def recorded(step, model=None, **options):
    """Return the record of one step of a copy of a network."""
    model = copy.deepcopy(model or network())
    probe, records = probed(model, **options)
    step(model)
    probe.step()
    probe.remove()
    (record,) = records
    return record


def assert_same(found, expected):
    for name in FIGURES:
        got, wanted = getattr(found, name), getattr(expected, name)
        if name.endswith(("norms", "norm", "gains")):
            assert got == pytest.approx(wanted, rel=1e-5, nan_ok=True), name
        else:
            assert got == wanted, name


def loss_of(model, x=X, y=Y):
    return F.cross_entropy(model(x), y)


def plain(model):
    loss_of(model).backward()


# ---- inner gradients that leave the loss as it is


def saliency(model):
    x = X.clone().requires_grad_()
    torch.autograd.grad(model(x).sum(), x)


def saliency_of_a_state(model):
    seen = []
    handle = model.layers[1].register_forward_hook(lambda m, args, out: seen.append(out))
    loss = loss_of(model)
    handle.remove()
    torch.autograd.grad(loss, seen[-1:])  # the first pass is run ahead, to find the taps


def attack(model, steps=3):
    x = X.clone()
    for _ in range(steps):
        x.requires_grad_()
        (slope,) = torch.autograd.grad(loss_of(model, x), x)
        x = (x + 0.1 * slope.sign()).detach()
    return x


def attack_into_inputs(model):
    x = X.clone().requires_grad_()
    loss_of(model, x).backward(inputs=[x])


def attack_and_zero_grad(model):
    x = X.clone().requires_grad_()
    loss_of(model, x).backward()
    model.zero_grad()


def attack_and_fill_with_zeros(model):
    x = X.clone().requires_grad_()
    loss_of(model, x).backward()
    model.zero_grad(set_to_none=False)


def attack_of_a_frozen_model(model):
    x = X.clone().requires_grad_()
    model.requires_grad_(False)
    loss_of(model, x).backward()
    model.requires_grad_(True)


def another_networks_loss(model):
    generator = nn.Linear(WIDTH, WIDTH)
    model.requires_grad_(False)
    model(generator(X)).sum().backward()
    model.requires_grad_(True)


def a_product_with_the_hessian(model):
    parameters = list(model.parameters())
    grads = torch.autograd.grad(loss_of(model), parameters, create_graph=True)
    torch.autograd.grad(grads, parameters, [torch.ones_like(p) for p in parameters])


def first_order_inner_loop(model):
    grads = torch.autograd.grad(loss_of(model, OTHER_X, OTHER_Y), list(model.parameters()))
    assert all(torch.isfinite(grad).all() for grad in grads)


def jacobian_rows(model):
    x = X.clone().requires_grad_()
    out = model(x)
    for k in range(out.shape[1]):
        torch.autograd.grad(out[:, k].sum(), x, retain_graph=True)


OTHERS = [
    saliency,
    saliency_of_a_state,
    attack,
    attack_into_inputs,
    attack_and_zero_grad,
    attack_and_fill_with_zeros,
    attack_of_a_frozen_model,
    another_networks_loss,
    a_product_with_the_hessian,
    first_order_inner_loop,
    jacobian_rows,
]


@pytest.mark.parametrize("mode", ["auto", "passing"])
@pytest.mark.parametrize("inner", OTHERS)
def test_what_does_not_train_is_left_out(inner, mode):
    def step(model):
        inner(model)
        plain(model)

    assert_same(recorded(step, mode=mode), recorded(plain, mode=mode))


@pytest.mark.parametrize("inner", OTHERS)
def test_what_comes_after_the_training_pass_is_left_out(inner):
    if "zero" in inner.__name__:
        return  # these clear the gradients of the pass that trains too

    def step(model):
        plain(model)
        inner(model)

    assert_same(recorded(step), recorded(plain))


@pytest.mark.parametrize("recompute", [None, False])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_between_micro_batches_under_checkpointing(recompute, accumulated):
    batches = [(X, Y), (OTHER_X, OTHER_Y)][:accumulated]

    def step(model):
        for x, y in batches:
            attack(model)
            loss_of(model, x, y).backward()
            saliency(model)

    def alone(model):
        for x, y in batches:
            loss_of(model, x, y).backward()

    model = network(recompute=recompute)
    found = recorded(step, model)
    assert (found.micro_batches, found.num_samples) == (accumulated, accumulated * SAMPLES)
    assert_same(found, recorded(alone, network()))


def test_reentrant_checkpointing_trains():
    x = X.clone().requires_grad_()

    def step(model):
        loss_of(model, x).backward()

    def twice(model):
        step(model)
        step(model)

    for wanted in (step, twice):
        assert_same(recorded(wanted, network(recompute=True)), recorded(wanted, network()))


def test_adversarial_training_is_of_the_adversarial_batch():
    found = recorded(lambda model: loss_of(model, attack(model)).backward())
    x = attack(network())
    assert_same(found, recorded(lambda model: loss_of(model, x).backward()))


# ---- inner gradients that are part of the loss


def critic_loss(model):
    return model(X)[:, 0].mean() - model(OTHER_X)[:, 0].mean()


def penalty(model):
    between = (0.3 * X + 0.7 * OTHER_X).requires_grad_()
    (slope,) = torch.autograd.grad(model(between)[:, 0].sum(), between, create_graph=True)
    return (slope.norm(dim=1) - 1).square().mean()


@pytest.mark.parametrize("backwards", ["one", "two", "penalty first"])
def test_a_gradient_penalty_leaves_figures_of_the_loss(backwards):
    def step(model):
        if backwards == "one":
            (critic_loss(model) + 10 * penalty(model)).backward()
        elif backwards == "two":
            critic_loss(model).backward()
            (10 * penalty(model)).backward()
        else:
            (10 * penalty(model)).backward()
            critic_loss(model).backward()

    found = recorded(step)
    assert (found.micro_batches, found.num_samples) == (2, 2 * SAMPLES)
    assert_same(found, recorded(lambda model: critic_loss(model).backward()))


def norms_by_hand(model, loss_with):
    """Return the gradients' norms of a loss that may differentiate on its way to the states."""
    seen = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, args, out: seen.append(out))
        for name in TAPS
    ]
    loss = loss_with(model)
    for handle in handles:
        handle.remove()
    grads = torch.autograd.grad(loss, seen)
    return [float(grad.norm(dim=1).sort().values[(SAMPLES - 1) // 2]) for grad in grads]


def r1(model):
    x = X.clone().requires_grad_()
    out = model(x)[:, 0]
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return F.softplus(-out).mean() + slope.square().sum(1).mean()


def flat_minimum(model):
    loss = loss_of(model)
    grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    return loss + sum(grad.square().sum() for grad in grads)


@pytest.mark.parametrize("loss_with", [r1, flat_minimum])
def test_a_penalty_on_the_training_batch_itself_counts_with_it(loss_with):
    found = recorded(lambda model: loss_with(model).backward())
    assert (found.micro_batches, found.num_samples) == (1, SAMPLES)
    assert found.grad_norms == pytest.approx(norms_by_hand(network(), loss_with), rel=1e-5)


def test_r1_beside_another_batch_counts_both():
    def step(model):
        (r1(model) + F.softplus(model(OTHER_X)[:, 0]).mean()).backward()

    found = recorded(step)
    assert (found.micro_batches, found.num_samples) == (2, 2 * SAMPLES)


@pytest.mark.parametrize("second_order", [True, False])
def test_an_inner_loop_leaves_figures_of_the_outer_loss(second_order):
    def adapted(model, weights, times=2):
        for _ in range(times):
            loss = F.cross_entropy(functional_call(model, weights, (OTHER_X,)), OTHER_Y)
            grads = torch.autograd.grad(loss, list(weights.values()), create_graph=second_order)
            weights = {
                name: p - 0.5 * grad for (name, p), grad in zip(weights.items(), grads, strict=True)
            }
        return weights

    def step(model):
        weights = adapted(model, dict(model.named_parameters()))
        F.cross_entropy(functional_call(model, weights, (X,)), Y).backward()

    model = network()
    weights = adapted(model, dict(model.named_parameters()))
    shifted = network()
    shifted.load_state_dict({name: p.detach() for name, p in weights.items()})
    found = recorded(step, model)
    assert (found.micro_batches, found.num_samples) == (1, SAMPLES)
    assert_same(found, recorded(plain, shifted))


# ---- what trains in other ways


def test_parameters_trained_with_autograd_grad():
    def step(model):
        for x, y in ((X, Y), (OTHER_X, OTHER_Y)):
            saliency(model)
            torch.autograd.grad(loss_of(model, x, y), list(model.parameters()))

    def alone(model):
        for x, y in ((X, Y), (OTHER_X, OTHER_Y)):
            loss_of(model, x, y).backward()

    assert_same(recorded(step), recorded(alone))


def low_rank(model):
    model.requires_grad_(False)
    layer = model.layers[0][0]
    layer.down = nn.Parameter(torch.randn(WIDTH, 1))
    layer.register_forward_hook(lambda m, args, out: out + args[0] @ m.down)
    return model


def frozen(model):
    return model.requires_grad_(False)


@pytest.mark.parametrize("change", [low_rank, frozen])
@pytest.mark.parametrize("leaf", [nn.Parameter, lambda x: x.clone().requires_grad_()])
def test_networks_that_are_frozen_in_part(change, leaf):
    x = leaf(X)

    def step(model):
        seen = x.detach().clone().requires_grad_()
        torch.autograd.grad(loss_of(model, seen), seen)
        loss_of(model, x).backward()

    model = change(network())
    hooked = recorded(step, model)
    assert (hooked.micro_batches, hooked.num_samples) == (1, SAMPLES)
    assert hooked.grad_norms == pytest.approx(
        norms_by_hand(model, lambda model: loss_of(model, x)), rel=1e-5
    )


def test_backward_into_some_parameters_only():
    def step(model):
        loss_of(model).backward(inputs=list(model.layers[0].parameters()))

    assert recorded(step).grad_norms == pytest.approx(recorded(plain).grad_norms, rel=1e-5)


def test_nothing_that_trains_is_named_in_the_error():
    model = network()
    probe, records = probed(model)
    saliency(model)
    with pytest.raises(RuntimeError, match=r"differentiate the loss with backward\(\)"):
        probe.step()
    plain(model)
    probe.step()
    probe.remove()
    assert [record.num_samples for record in records] == [SAMPLES]


@pytest.mark.parametrize("taps", [TAPS, None])
@pytest.mark.parametrize("plain_chain", [True, False])
def test_a_call_without_a_batch_dimension_is_named(taps, plain_chain):
    model = network()
    if plain_chain:
        model = nn.Sequential(*[module for layer in model.layers for module in layer])
        taps = taps and ["0", "2", "4"]
    probe = StepProbe(model, taps, alarms=False)
    with pytest.raises(TapError, match=r"without a batch dimension, call .* shape \[1, 6\]"):
        model(X[0])
    model(X[:1])
    probe.remove()


# ---- gradients that are thrown away


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_that_is_given_up_after_its_backward_pass(set_to_none):
    model = network()
    probe, records = probed(model)
    for fails in (True, True, False):
        try:
            loss_of(model, OTHER_X if fails else X).backward()
            if fails:
                raise torch.cuda.OutOfMemoryError("in the gradients' norm")
            probe.step()
        except torch.cuda.OutOfMemoryError:
            model.zero_grad(set_to_none)
    probe.remove()
    assert [record.step for record in records] == [0]
    assert_same(records[0], recorded(plain))


def test_gradients_that_stay_after_an_exception_are_in_the_record():
    model = network()
    probe, records = probed(model)
    loss_of(model, OTHER_X, OTHER_Y).backward()  # and nothing clears them
    for p in model.parameters():
        p.grad.mul_(0.5)
    plain(model)
    probe.step()
    probe.remove()
    assert (records[0].micro_batches, records[0].num_samples) == (2, 2 * SAMPLES)


def test_gradients_that_an_optimiser_used_are_in_the_record():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe, records = probed(model)
    for _ in range(2):
        plain(model)
        optimizer.step()
        optimizer.zero_grad()
    probe.step()
    probe.remove()
    assert records[0].micro_batches == 2


def test_an_adversarial_game_clears_the_gradients_of_the_other_players_loss():
    model = network()
    probe, records = probed(model)
    generator = nn.Linear(WIDTH, WIDTH)
    for _ in range(3):
        model(generator(X)).sum().backward()  # into the critic's gradients too
        model.zero_grad()
        plain(model)
        probe.step()
    probe.remove()
    for record in records:
        assert_same(record, recorded(plain))
    assert len(records) == 3
    assert all(math.isfinite(record.output_grad_norm) for record in records)
