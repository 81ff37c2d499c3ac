"""Where networks are observed, against oracles of ordinary hooks and autograd in float64."""

import copy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Branching, example
from torch import nn

from fadiag_fast.capture import Probe, untouched
from fadiag_fast.capture.points import TapError
from fadiag_fast.capture.taps import find_taps

WIDTH = 6


class Net(nn.Module):
    """A stem, layers and a head, with a forward that is given as a function."""

    def __init__(self, forward=None, block=None, depth=3, **modules):
        super().__init__()
        self.stem = nn.Linear(5, WIDTH)
        self.layers = nn.ModuleList((block or self.simple)() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 4)
        self.way = forward or Net.residual
        for name, module in modules.items():
            setattr(self, name, module)

    @staticmethod
    def simple():
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())

    def residual(self, x):
        h = self.stem(x)
        for layer in self.layers:
            h = h + layer(h)
        return self.head(h)

    def in_a_row(self, x):
        h = self.stem(x)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)

    def forward(self, x):
        return self.way(self, x)


class Residual(nn.Module):
    """A block that returns the next state."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, h):
        return h + self.second(self.first(h).relu())


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(7, 5, dtype=torch.float64), torch.randint(0, 4, (7,))


def probed(model, x, y, **options):
    """Capture by both paths, which must agree; return the taps and what was captured."""
    results = []
    with untouched(model):
        for path in ("torch.func", "autograd"):
            probe = Probe(model.double(), path=path, **options)
            results.append(probe.capture(x, y))
    for a, b in zip(tensors_of(results[0]), tensors_of(results[1]), strict=True):
        close(a, b)
    return probe.taps, results[0]


def tensors_of(captured):
    return [*captured.hiddens, *captured.grads, captured.logits, captured.logit_grads]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-15)


def by_hand(model, x, y, see):
    """Hidden states by ``see(model, x, states)``, which returns logits and fills ``states``."""
    model = copy.deepcopy(model).double().eval()
    states = []
    logits = see(model, x.requires_grad_(x.is_floating_point()), states)
    loss = nn.functional.cross_entropy(logits, y)
    grads = torch.autograd.grad(loss, [*states, logits])
    return [h.detach() for h in states], list(grads[:-1]), grads[-1]


def by_hooks(model, places, x, y):
    """Hidden states at (module's name, input or output), in the order of ``places``."""
    seen = {}

    def see(model, x, states):
        for name, at in places:
            module = model.get_submodule(name)
            if at == "input":
                module.register_forward_pre_hook(
                    lambda _, args, key=(name, at): seen.setdefault(key, args[0])
                )
            else:
                module.register_forward_hook(
                    lambda _, args, out, key=(name, at): seen.setdefault(key, out)
                )
        logits = model(x)
        states += [seen[place] for place in places]
        return logits

    return by_hand(model, x, y, see)


def check_by_hooks(model, captured, places, x, y):
    hiddens, grads, logit_grads = by_hooks(model, places, x, y)
    expected = [*hiddens, *grads, logit_grads]
    got = [*captured.hiddens, *captured.grads, captured.logit_grads]
    for a, b in zip(got, expected, strict=True):
        close(a, b)


def places_of(taps):
    return [(tap.module, tap.at) for tap in taps.points]


# ---- taps by name

OUTPUTS = [("layers.0", "output"), ("layers.1", "output"), ("layers.2", "output")]
LINEARS = [(f"layers.{l}.{n}", "output") for l in range(3) for n in ("first", "second")]
SELECTORS = {
    "exact": ("layers.1", [("layers.1", "output")]),
    "output": ("layers.1:output", [("layers.1", "output")]),
    "input": ("layers.1:input", [("layers.1", "input")]),
    "star": ("layers.*", OUTPUTS),
    "star_within_a_part": ("layers.*.first", LINEARS[::2]),
    "double_star": ("layers.**.second", LINEARS[1::2]),
    "double_star_across_parts": (
        "**t",
        [("layers.0.first", "output"), ("layers.1.first", "output"), ("layers.2.first", "output")],
    ),
    "question_mark": ("layers.?", OUTPUTS),
    "range": ("layers.[0-1]", OUTPUTS[:2]),
    "not_in_range": ("layers.[!0-1]", OUTPUTS[2:]),
    "expression": (r"re:layers\.[02]", [OUTPUTS[0], OUTPUTS[2]]),
    "expression_of_the_whole_name": (r"re:layers\.\d\.f.*", LINEARS[::2]),
    "expression_input": (r"re:layers\.[12]:input", [("layers.1", "input"), ("layers.2", "input")]),
    "class_by_name": ("class:Residual", OUTPUTS),
    "class_by_a_base": ("class:Linear", [("stem", "output"), *LINEARS, ("head", "output")]),
    "class_input": ("class:Residual:input", [(f"layers.{l}", "input") for l in range(3)]),
    "class": (Residual, OUTPUTS),
    "list": (["stem", ["layers.2", "layers.2"]], [("stem", "output"), OUTPUTS[2]]),
    "chain": ("chain:layers.*", [("layers.0", "input"), *OUTPUTS]),
    "chain_of_a_class": ("chain:class:Residual", [("layers.0", "input"), *OUTPUTS]),
}


@pytest.mark.parametrize("case", SELECTORS)
def test_selectors(case, batch):
    select, expected = SELECTORS[case]
    model = Net(Net.in_a_row, Residual).double()
    taps, captured = probed(model, *batch, select=select)
    assert places_of(taps) == expected
    assert not taps.unseen
    assert taps.remarks == ()
    check_by_hooks(model, captured, expected, *batch)


def test_modules_select_themselves(batch):
    model = Net(Net.in_a_row, Residual)
    for select, expected in (
        (model.layers[1], OUTPUTS[1:2]),
        ([model.layers[0], "stem"], [("stem", "output"), OUTPUTS[0]]),
        (model.layers, OUTPUTS),  # a ModuleList is never called: its modules are meant
        (torch.compile(model.layers[1]), OUTPUTS[1:2]),
    ):
        assert places_of(probed(model, *batch, select=select)[0]) == expected


def test_taps_are_reported_in_the_order_of_the_pass(batch):
    model = Net(Net.in_a_row, Residual)
    taps, _ = probed(model, *batch, select=["layers.2", "layers.0", "stem"])
    assert taps.labels == ("stem", "layers.0", "layers.2")
    assert any("not the order in which they were named" in remark for remark in taps.remarks)
    assert taps.coverage == "named: asked for 3, saw 3, 3 states"


def test_taps_that_are_never_called_are_counted(batch):
    def skipping(self, x):
        return self.head(self.layers[2](self.layers[0](self.stem(x))))

    model = Net(skipping, Residual)
    taps, _ = probed(model, *batch, select="layers.?")
    assert taps.unseen == ("layers.1",)
    assert taps.coverage == "named: asked for 3, saw 2, 2 states"
    assert "Asked for but never called: layers.1." in taps.remarks
    automatic, _ = probed(model, *batch)
    assert automatic.unseen == ("layers.1",)
    assert automatic.coverage == "chain of 2 Residual in layers.*: asked for 3, saw 2, 3 states"


BAD_SELECTORS = {
    "nearest": ("layer.1", TapError, r"'layer\.1' matches no module; the nearest names are layers"),
    "nothing_near": (
        "xyz",
        TapError,
        "'xyz' matches no module; the model has the classes Bilinear",
    ),
    "class": ("class:Conv2d", TapError, "'class:Conv2d' matches no module; .*classes Bilinear, "),
    "class_object": (nn.Conv2d, TapError, "a class of which the model has modules, got Conv2d; it"),
    "module": (nn.Linear(1, 1), TapError, "expected a module of the model, got a Linear"),
    "expression": ("re:(", TapError, r"'re:\(': expected a regular expression: missing"),
    "empty": ([], TapError, "expected at least one selector, got an empty list"),
    "number": (3, TypeError, "expected names, classes, modules or a list of them, got int"),
    "nested": (["stem", 3], TypeError, "or a list of them, got int"),
    "never_called": (
        "spare",
        TapError,
        r"'spare': expected a module that the forward pass calls, got no call of spare; called "
        r"were head, layers\.0",
    ),
    "never_called_class": (
        nn.Bilinear,
        TapError,
        "taps: Bilinear: expected a module that the forward pass calls, got no call of spare;",
    ),
    "no_tensor": (
        "texts",
        TapError,
        "taps: output of texts: expected a floating tensor, got str",
    ),
    "integers": ("texts:input", TapError, "input of texts: expected .* got no floating tensor"),
    "nested_chain": (
        "chain:class:Linear|x",
        TapError,
        "matches no module",
    ),
    "chain_within_a_chain": (
        r"chain:re:layers\.\d(\.first)?",
        TapError,
        r"expected blocks that are called one after another, got layers\.0\.first within layers\.0",
    ),
    "chain_without_states": (
        "chain:texts",
        TapError,
        "texts: expected a block that takes and returns a floating tensor, got str",
    ),
}


class Texts(nn.Module):
    def forward(self, tokens):
        return "text"


@pytest.mark.parametrize("case", BAD_SELECTORS)
def test_selectors_that_select_nothing(case, batch):
    def talking(self, x):
        self.texts(torch.arange(3))
        return self.in_a_row(x)

    select, error, message = BAD_SELECTORS[case]
    model = Net(talking, Residual, spare=nn.Bilinear(2, 2, 2), texts=Texts()).double()
    with untouched(model), pytest.raises(error, match=message):
        find_taps(model, batch[0], select)


# ---- taps that the tool chooses


def chosen(model, x, y, **options):
    taps, captured = probed(model, x, y, **options)
    return taps, captured, [tap.where for tap in taps.points]


def test_blocks_that_return_the_next_state(batch):
    """The convolutions of a residual block are parts of the branch, not the stream."""
    model = Net(Net.in_a_row, Residual)
    taps, captured, where = chosen(model, *batch)
    assert where == ["input of layers.0", *(f"output of layers.{l}" for l in range(3))]
    assert taps.labels == ("input of layers.0", "layers.0", "layers.1", "layers.2")
    assert taps.coverage == "chain of 3 Residual in layers.*: asked for 3, saw 3, 4 states"
    check_by_hooks(model, captured, [("layers.0", "input"), *OUTPUTS], *batch)


def test_blocks_whose_caller_adds_the_skip(batch):
    model = Net()
    taps, captured, where = chosen(model, *batch)
    assert where == [*(f"input of layers.{l}" for l in range(3)), "input of head"]
    assert taps.labels == ("input of layers.0", "layers.0", "layers.1", "layers.2")
    places = [("layers.0", "input"), ("layers.1", "input"), ("layers.2", "input")]
    check_by_hooks(model, captured, [*places, ("head", "input")], *batch)


def test_a_skip_that_is_added_in_place(batch):
    """h += f(h): every state but the last is overwritten after its tap."""

    def in_place(self, x):
        h = self.stem(x)
        for layer in self.layers:
            h += layer(h)
        return self.head(h)

    model = Net(in_place, lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sigmoid()))
    _, captured, where = chosen(model, *batch)
    assert where == [*(f"input of layers.{l}" for l in range(3)), "input of head"]

    def see(model, x, states):
        states.append(model.stem(x))
        for layer in model.layers:
            states.append(states[-1] + layer(states[-1]))
        return model.head(states[-1])

    hiddens, grads, _ = by_hand(model, *batch, see)
    for a, b in zip([*captured.hiddens, *captured.grads], [*hiddens, *grads], strict=True):
        close(a, b)


def test_what_comes_after_the_last_block_is_named_for_what_receives_it(batch):
    def scaled(self, x):
        h = self.stem(x)
        for layer in self.layers:
            h = h + layer(h)
        return self.head(2 * h)

    taps, _, where = chosen(Net(scaled), *batch)
    assert where[-1] == "input of head"
    assert taps.labels == ("input of layers.0", "layers.0", "layers.1", "input of head")


def test_one_module_called_again_and_again(batch):
    block = Net.simple()
    model = Net(block=lambda: block)
    taps, captured, where = chosen(model, *batch)
    again = [f"input of layers.0 (call {n})" for n in (2, 3)]
    assert where == ["input of layers.0", *again, "input of head"]
    assert taps.labels[1:] == tuple(f"layers.0 (call {n})" for n in (1, 2, 3))
    assert taps.coverage == "chain of 3 Sequential in layers.0: asked for 1, saw 1, 4 states"

    def see(model, x, states):
        states.append(model.stem(x))
        for _ in range(3):
            states.append(states[-1] + model.layers[0](states[-1]))
        return model.head(states[-1])

    hiddens, grads, _ = by_hand(model, *batch, see)
    for a, b in zip([*captured.hiddens, *captured.grads], [*hiddens, *grads], strict=True):
        close(a, b)
    # By any of its names it is the one module.
    assert len(probed(model, *batch, select="layers.2")[0].points) == 3


def test_the_contract_with_one_block_called_again_and_again(batch):
    model = Branching()
    model.blocks = nn.ModuleList([model.blocks[0]] * 3)
    taps, _, where = chosen(model, *batch)
    assert where[1:] == [f"input of blocks.0 (call {n})" for n in (2, 3)] + ["input of out_ln"]
    assert taps.unseen == ()
    assert taps.coverage == "residual contract: asked for 1, saw 1, 4 states"


def test_the_contract_with_blocks_called_in_another_order(batch):
    class Backwards(Branching):
        def forward(self, x):
            h = self.embed(x)
            for block in reversed(self.blocks):
                h = h + block(h)
            return self.out_head(self.out_ln(h))

    taps, _, where = chosen(Backwards(), *batch)
    assert where == [*(f"input of blocks.{l}" for l in (2, 1, 0)), "input of out_ln"]
    assert taps.labels == ("embed", "blocks.2", "blocks.1", "blocks.0")
    assert any("in the order blocks.2, blocks.1, blocks.0" in remark for remark in taps.remarks)


def test_the_contract_with_a_bypassed_block(batch):
    class Skipping(Branching):
        def forward(self, x):
            h = self.embed(x)
            for block in (self.blocks[0], self.blocks[2]):
                h = h + block(h)
            return self.out_head(self.out_ln(h))

    taps, _, where = chosen(Skipping(), *batch)
    assert where == ["input of blocks.0", "input of blocks.2", "input of out_ln"]
    assert taps.coverage == "residual contract: asked for 3, saw 2, 3 states"
    assert taps.unseen == ("blocks.1",)


def test_stages_are_refined_to_their_blocks(batch):
    def stage():
        return nn.Sequential(Residual(), Residual())

    model = Net(Net.in_a_row, stage, depth=2)
    taps, captured, where = chosen(model, *batch)
    blocks = [f"layers.{s}.{b}" for s in range(2) for b in range(2)]
    assert where == ["input of layers.0.0", *(f"output of {name}" for name in blocks)]
    assert "chain of 4 Residual in layers.*.*: asked for 4, saw 4, 5 states" in taps.coverage
    places = [("layers.0.0", "input"), *((name, "output") for name in blocks)]
    check_by_hooks(model, captured, places, *batch)


def test_return_hidden_comes_before_a_chain(batch):
    class Handing(Net):
        def forward(self, x, return_hidden=False):
            h = self.stem(x)
            states = [h]
            for layer in self.layers:
                h = h + layer(h)
                states.append(h)
            return (self.head(h), states[1:]) if return_hidden else self.head(h)

    taps, _, where = chosen(Handing(), *batch)
    assert where == ["hidden 0", "hidden 1", "hidden 2"]
    assert taps.coverage == "return_hidden=True: asked for 3, saw 3, 3 states"


def test_no_chain_lists_what_there_is(batch):
    model = nn.Sequential(nn.Linear(5, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4)).double()
    single = Net(Net.in_a_row, depth=1).double()
    # Between two layers of one class: what the second receives.
    assert [tap.where for tap in find_taps(model.eval(), batch[0])[0].points] == ["input of 2"]
    with pytest.raises(TapError) as error:
        find_taps(single.eval(), batch[0])
    for expected in (
        "Net: expected the residual contract",
        "head, stem, layers.0",
        "chain:PATTERN",
    ):
        assert expected in str(error.value)


def test_blocks_of_two_classes_are_the_chain_that_their_names_make(batch):
    model = Net(Net.in_a_row, Residual)
    model.layers.insert(1, Net.simple())
    taps, _, where = chosen(model, *batch)
    assert taps.chosen == "chain of 4 Residual, Sequential in layers.*"
    assert where == chosen(model, *batch, select="chain:layers.*")[2]


# ---- what is differentiated


def test_a_state_is_its_tensor_with_all_of_its_uses(batch):
    """Dropout in eval mode returns its argument itself: what else uses it counts as well."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.dropout = nn.Dropout()

        def forward(self, h):
            h = self.linear(h)
            return 2 * h + self.dropout(h).tanh()

    model = Net(Net.in_a_row, Block)
    places = [(f"layers.{l}.dropout", "output") for l in range(3)]
    _, captured = probed(model, *batch, select="layers.*.dropout")
    check_by_hooks(model, captured, places, *batch)


@pytest.mark.parametrize("later", [False, True], ids=["rests", "overwritten"])
def test_a_state_that_is_written_to_before_its_tap(later, batch):
    """Neither an assignment nor a write to a view returns the tensor itself."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, h):
            if later:
                h.mul_(1.5)
            return self.linear(h)

    def writing(self, x):
        h = self.stem(x)
        h[:, 0] = 0.5
        h.view(-1)[1].exp_()
        for layer in self.layers:
            h = layer(h)
        return self.head(h)

    model = Net(writing, Block).double()
    with untouched(model):
        captured = Probe(model).capture(*batch)
        message = r"input of layers\.0 is not what a torch call returned"
        with pytest.raises(RuntimeError, match=message):
            Probe(model, path="torch.func").capture(*batch)

    def see(model, x, states):
        h = model.stem(x)
        h[:, 0] = 0.5
        h.view(-1)[1].exp_()
        states.append(h)
        for layer in model.layers:
            states.append(layer.linear(states[-1] * 1.5 if later else states[-1]))
        if later:
            return model.head(states[-1])
        return model.head(states[-1])

    hiddens, grads, logit_grads = by_hand(model, *batch, see)
    for a, b in zip(
        [*captured.hiddens, *captured.grads, captured.logit_grads],
        [*hiddens, *grads, logit_grads],
        strict=True,
    ):
        close(a, b)


def test_a_model_that_writes_into_its_input(batch):
    def writing(self, x):
        x.mul_(3.0)
        return self.residual(x)

    x, y = batch
    model = Net(writing)
    before = x.clone()
    _, captured = probed(model, x, y)
    assert torch.equal(x, before)
    close(captured.hiddens[0], model.stem(3 * x).detach())


def test_a_module_that_calls_itself(batch):
    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, h, depth=2):
            return self(h, depth - 1).tanh() if depth else self.linear(h)

    model = Net(Net.in_a_row, Recursive, depth=1)
    taps, captured = probed(model, *batch, select="layers.0")
    assert taps.labels == ("layers.0 (call 3)", "layers.0 (call 2)", "layers.0 (call 1)")

    def see(model, x, states):
        states.append(model.layers[0].linear(model.stem(x)))
        states += [states[0].tanh()]
        states += [states[1].tanh()]
        return model.head(states[-1])

    hiddens, grads, _ = by_hand(model, *batch, see)
    for a, b in zip([*captured.hiddens, *captured.grads], [*hiddens, *grads], strict=True):
        close(a, b)


@dataclass
class Bundle:
    """What a model of one's own may return: the state is not the first field."""

    note: str
    loss: torch.Tensor | None
    logits: torch.Tensor


PACKINGS = {
    "tuple": (lambda h, x: (x, h), lambda packed: packed[1]),
    "nested": (lambda h, x: ([h], x), lambda packed: packed[0][0]),
    "dict": (lambda h, x: {"note": "n", "state": h}, lambda packed: packed["state"]),
    "dataclass": (lambda h, x: Bundle("n", None, h), lambda packed: packed.logits),
}


@pytest.mark.parametrize("kind", ["nested", "dict", "dataclass"])
def test_blocks_that_pass_structures(kind, batch):
    pack, unpack = PACKINGS[kind]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, packed):
            h = unpack(packed)
            return pack(h + self.linear(h).tanh(), torch.zeros(3, dtype=torch.long))

    def passing(self, x):
        packed = pack(self.stem(x), torch.zeros(3, dtype=torch.long))
        for layer in self.layers:
            packed = layer(packed)
        return self.head(unpack(packed))

    model = Net(passing, Block)
    _, captured, where = chosen(model, *batch)
    assert where == ["input of layers.0", *(f"output of layers.{l}" for l in range(3))]

    def see(model, x, states):
        states.append(model.stem(x))
        for layer in model.layers:
            states.append(states[-1] + layer.linear(states[-1]).tanh())
        return model.head(states[-1])

    hiddens, grads, _ = by_hand(model, *batch, see)
    for a, b in zip([*captured.hiddens, *captured.grads], [*hiddens, *grads], strict=True):
        close(a, b)


def test_blocks_that_take_keywords_only(batch):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, *, mask, hidden_states):
            return hidden_states + self.linear(hidden_states).tanh() * mask

    def calling(self, x):
        h = self.stem(x)
        for layer in self.layers:
            h = layer(mask=torch.ones(7, 1).to(h), hidden_states=h)
        return self.head(h)

    model = Net(calling, Block)
    _, captured, where = chosen(model, *batch)
    assert where == ["input of layers.0", *(f"output of layers.{l}" for l in range(3))]
    close(captured.hiddens[0], model.stem(batch[0]).detach())


def test_modules_that_raise(batch):
    """An error passes on and leaves no hook behind; one that the model catches does no harm."""

    class Raising(nn.Module):
        def forward(self, h):
            raise KeyError("mine")

    def raising(self, x):
        return self.residual(self.bad(x))

    def catching(self, x):
        try:
            self.bad(x)
        except KeyError:
            return self.residual(x)

    model = Net(raising, bad=Raising()).double()
    with untouched(model), pytest.raises(KeyError, match="mine"):
        Probe(model).capture(*batch)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model.way = catching
    _, captured, _ = chosen(model, *batch)
    close(captured.hiddens[0], model.stem(batch[0]).detach())


def test_a_pass_that_never_goes_the_same_way_twice(batch):
    """Autograd serves where states are looked for elsewhere than where they were traced."""

    def wandering(self, x):
        self.passes += 1
        h = self.stem(x)
        if self.passes % 2:
            h = h.clone()
        for layer in self.layers:
            h = h + layer(h)
        return self.head(h)

    model = Net(wandering).double().eval()
    model.passes = 0
    places = [*((f"layers.{l}", "input") for l in range(3)), ("head", "input")]
    check_by_hooks(model, Probe(model).capture(*batch), places, *batch)
    with pytest.raises(TapError, match="goes the same way when it is run again, got one in which"):
        Probe(model, path="torch.func").capture(*batch)


def test_a_batch_costs_one_pass_and_nothing_of_it_is_kept(batch):
    """One more pass finds the taps."""
    import gc
    import weakref

    model, states = Net().double().eval(), []
    model.stem.register_forward_hook(lambda _, args, out: states.append(weakref.ref(out)))
    probe = Probe(model)
    gc.disable()  # reference counts alone must free them
    try:
        probe.prepare(batch[0])
        assert [state() for state in states] == [None]
        probe.capture(*batch)
        assert [state() for state in states] == [None, None]
    finally:
        gc.enable()


def test_batches_of_other_sizes(batch):
    x, y = batch
    model = Net().double().eval()
    probe = Probe(model)
    for size in (7, 2, 1, 7):
        captured = probe.capture(x[:size], y[:size])
        places = [*((f"layers.{l}", "input") for l in range(3)), ("head", "input")]
        check_by_hooks(model, captured, places, x[:size].clone(), y[:size])


# ---- any network


class Random(nn.Module):
    """A network that is drawn: every block with a style of its own, and skips across them.

    ``states`` collects the tensors before, between and after the blocks, as they pass.
    """

    def __init__(self, styles, skips, tied, in_place, packing):
        super().__init__()
        self.stem = nn.Linear(5, WIDTH)
        blocks = [
            nn.Sequential(
                nn.Linear(WIDTH, WIDTH),
                nn.ReLU(inplace=True) if in_place else nn.Tanh(),
                nn.Linear(WIDTH, WIDTH),
                nn.Dropout(0.3),
            )
            for _ in styles
        ]
        if tied:
            for block in blocks[1:]:
                block[0].weight = blocks[0][0].weight
        self.layers = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, 4)
        self.styles, self.skips, self.packing = styles, skips, packing

    def run(self, x, states, copy):
        h = self.stem(x)
        kept = [h]
        for l, (style, layer) in enumerate(zip(self.styles, self.layers, strict=True)):
            states.append(h)
            branch = layer(h)
            if style == "added in place":
                h = h + branch if copy else h.add_(branch)
            else:
                h = {"state": branch, "branch": h + branch, "scaled": h - 0.3 * branch}[style]
            if l in self.skips:
                h = h + kept[0].sin()
            kept.append(h)
        states.append(h)
        return self.head(h)

    def forward(self, x=None, packed=None):
        x = packed["x"][0] if x is None else x
        logits = self.run(x, [], copy=False)
        return {
            "tensor": logits,
            "tuple": (torch.zeros(2, dtype=torch.long), logits),
            "dict": {"features": x, "logits": logits},
        }[self.packing]


@settings(max_examples=25, deadline=None)
@given(
    styles=st.lists(
        st.sampled_from(["state", "branch", "scaled", "added in place"]), min_size=2, max_size=4
    ),
    skips=st.sets(st.integers(0, 3), max_size=2),
    tied=st.booleans(),
    in_place=st.booleans(),
    packing=st.sampled_from(["tensor", "tuple", "dict"]),
    keywords=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_network(styles, skips, tied, in_place, packing, keywords, seed):
    """Both paths give what autograd gives for the tensors that the blocks receive."""
    if skips and "added in place" in styles:
        # stem's output, which a skip reads later, would be overwritten: autograd refuses that.
        styles = ["branch" if style == "added in place" else style for style in styles]
    torch.manual_seed(seed)
    model = Random(styles, skips, tied, in_place, packing).double().eval()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(0, 4, (6,))
    select = [*(f"layers.{l}:input" for l in range(len(styles))), "head:input"]
    batch = {"packed": {"x": [x]}} if keywords else x
    states = []
    logits = model.run(x, states, copy=True)
    found = torch.autograd.grad(nn.functional.cross_entropy(logits, y), [*states, logits])
    for path in ("torch.func", "autograd"):
        probe = Probe(
            model,
            select=select,
            path=path,
            output="logits" if packing == "dict" else None,
            loss=None,
        )
        captured = probe.capture(batch, y)
        got = [*captured.hiddens, *captured.grads, captured.logit_grads]
        for a, b in zip(got, [*(h.detach() for h in states), *found], strict=True):
            close(a, b)


def test_the_readings_of_the_contract_are_kept():
    """The four kinds of networks that the other tests share."""
    for kind in ("branching", "no_norm"):
        model, x, y, _ = example(kind)
        taps, _, _ = chosen(model, x.double(), y)
        assert taps.labels == ("embed", "blocks.0", "blocks.1", "blocks.2")
