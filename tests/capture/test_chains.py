"""Which chain of blocks is chosen, on the smallest network of each kind."""

import pytest
import torch
from torch import nn

from fadiag_fast.capture import Probe, untouched
from fadiag_fast.capture.points import TapError


class Residual(nn.Module):
    """Two convolutions that pass a state on, and a skip around them."""

    def __init__(self, width):
        super().__init__()
        self.convs = nn.Sequential(*(Conv(width, width) for _ in range(2)))

    def forward(self, h):
        return h + self.convs(h)


class Conv(nn.Sequential):
    def __init__(self, width, out):
        super().__init__(nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out))


class Stage(nn.Module):
    """Blocks, and a norm after the last of them."""

    def __init__(self, width):
        super().__init__()
        self.blocks = nn.ModuleList(Residual(width) for _ in range(3))
        self.norm = nn.GroupNorm(1, width)

    def forward(self, h):
        for block in self.blocks:
            h = block(h)
        return self.norm(h)


class Parallel(nn.Module):
    """Branches side by side: no chain."""

    def __init__(self, width):
        super().__init__()
        self.branches = nn.ModuleList(Conv(width, width) for _ in range(4))

    def forward(self, h):
        return sum(branch(h) for branch in self.branches)


class Head(nn.Sequential):
    def __init__(self, width):
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


def chosen(model, x=None, **options):
    x = torch.randn(2, 3, 8, 8) if x is None else x
    with untouched(model):
        probe = Probe(model, **options)
        probe.prepare(x)
    return probe.taps


def network(*parts):
    return nn.Sequential(Conv(3, 4), nn.Sequential(*parts), Head(4))


def test_the_blocks_of_stages_that_end_in_a_norm():
    taps = chosen(network(Stage(4), Stage(4)))
    assert taps.chosen == "chain of 6 Residual in 1.*.blocks.*"
    assert taps.labels[0] == "input of 1.0.blocks.0"


def test_a_skip_hides_the_convolutions_under_it():
    """Eight convolutions pass their states on visibly, in only four blocks."""
    taps = chosen(network(*(Residual(4) for _ in range(4))))
    assert taps.chosen == "chain of 4 Residual in 1.*"


def test_blocks_of_several_classes_are_one_chain():
    """Between the first and the last that keep the shape: the widening one, not the stem."""
    taps = chosen(nn.Sequential(Conv(3, 4), Residual(4), Conv(4, 6), Stage(6), Conv(6, 4), Head(4)))
    assert taps.chosen == "chain of 3 Residual, Conv, Stage in *"
    assert taps.labels == ("input of 1", "1", "2", "3")
    assert taps.remarks == ("Beside the chain * has Head: taps='chain:*' takes all of them.",)


def test_a_unit_that_repeats_is_the_block():
    """Attention and feed-forward, say, both with skips of their own, in every block."""

    class Wide(Residual):
        pass

    class Unit(nn.Sequential):
        def __init__(self):
            super().__init__(Residual(4), Wide(4))

    taps = chosen(network(Unit(), Unit(), Unit()))
    assert taps.chosen == "chain of 3 Unit in 1.*"


def test_siblings_named_by_a_number_and_a_letter():
    class Lettered(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = Conv(3, 4), Head(4)
            for name in ("mixed3a", "mixed3b", "mixed4a"):
                setattr(self, name, Parallel(4))

        def forward(self, x):
            h = self.mixed4a(self.mixed3b(self.mixed3a(self.stem(x))))
            return self.head(h)

    assert chosen(Lettered()).chosen == "chain of 3 Parallel in mixed*"


def test_parallel_branches_are_no_chain():
    with pytest.raises(TapError, match="at least two sibling blocks"):
        chosen(network(Parallel(4)))


def test_a_chain_through_element_assignments():
    """What is written into a tensor's elements is read with the tensor."""

    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = Conv(3, 4), Head(4)
            self.layers = nn.ModuleList(Conv(4, 4) for _ in range(3))

        def forward(self, x):
            h = self.stem(x)
            for layer in self.layers:
                out = torch.zeros_like(h)
                out[:, :2] = layer(h)[:, 2:]
                h = out
            return self.head(h)

    taps = chosen(Writing())
    assert taps.chosen == "chain of 3 Conv in layers.*"
    assert "other operations change the state" in taps.remarks[0]


def test_without_states_that_pass_on_the_deepest_part_counts():
    """A VGG's convolutions, though its classifier has more parameters."""
    convs = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
    convs += [nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential()
    model.add_module("features", nn.Sequential(*convs))
    model.add_module("head", nn.Sequential(nn.Linear(256, 99), nn.ReLU(), nn.Linear(99, 3)))
    assert chosen(model).chosen == "chain of 3 Conv2d in features.*"


def test_states_with_the_batch_elsewhere_are_hinted_at():
    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            h = x.movedim(1, 0) + 0
            for layer in self.layers:
                h = layer(h)
            return h.mean(0)

    x = torch.randn(2, 5, 4)
    with pytest.raises(TapError, match=r"chain of 3 Linear .* shape \[5, 2, 4\]: batch_dim says"):
        chosen(TimeFirst(), x)
