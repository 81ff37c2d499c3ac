"""Checkpoints as public training scripts and libraries write them."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import fractions
import functools
import pickle
import uuid
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_checkpoints import assert_same, checkpoint_of, mismatch, raw_bytes
from torch import Tensor, nn

from fadiag_fast import diagnose
from fadiag_fast.checkpoints import (
    NoStateDict,
    StateDictMismatch,
    UnsafeCheckpoint,
    load_checkpoint,
    load_into,
    read_into,
)
from fadiag_fast.checkpoints.placeholders import is_opaque
from fadiag_fast.checkpoints.placeholders import shown as show
from fadiag_fast.checkpoints.restricted_pickle import PickleError, read_pickle
from fadiag_fast.checkpoints.torch_pickle import offered
from fadiag_fast.scanning.weight_layout import Fitter


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    return nn.Sequential(nn.Linear(3, 4), inner, nn.Linear(4, 2))


def weights(seed: int = 0) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network(seed).state_dict().items()}


def load(path: Path, model: nn.Module, key: str | None = None) -> tuple[str, ...]:
    """Load a file both as diagnose and as scan do; both give the same weights, bit for bit."""
    notes = load_into(model, load_checkpoint(path, key=key))
    slab = torch.empty(1 << 18, dtype=torch.uint8)
    for _ in range(2):  # as one of a new kind, and as one of a known kind
        found = read_into(path, slab, key=key)
        fitter = Fitter(model)
        fit, told = fitter.fit(found), ()
        row = slab[fit.start :] if fit is not None else torch.empty(1 << 18, dtype=torch.uint8)
        if fit is None:
            fit, told = fitter.load(found, slab, row)
        own = dict(model.named_parameters()) | dict(model.named_buffers())
        views = fit.views(row)
        assert {name: raw_bytes(value) for name, value in views.items()} == {
            name: raw_bytes(own[name]) for name in views
        }
        assert (*found.notes, *told) == notes
    return notes


def load_saved(content: Any, model: nn.Module, folder: Path, **options: Any) -> tuple[str, ...]:
    torch.save(content, folder / "a.pt")
    return load(folder / "a.pt", model, **options)


# ------------------------------------------------------------------------------------------------
# Where the weights are


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (lambda w: {"module": w, "optimizer": None, "global_steps": 3}, "module"),
        (lambda w: {"net": w, "acc": 91.2, "epoch": 4}, "net"),
        (lambda w: {"network": w}, "network"),
        (lambda w: {"params": w}, "params"),
        (lambda w: {"weights": w}, "weights"),
        (lambda w: {"ema": w, "epoch": 4}, "ema"),
        (lambda w: {"params_ema": w}, "params_ema"),
        (lambda w: {"model_ema": w, "args": {}}, "model_ema"),
        (lambda w: {"state_dict_ema": w}, "state_dict_ema"),
        (lambda w: {"ema_state_dict": w}, "ema_state_dict"),
        (lambda w: {"state": {"model": w, "step": 3}}, "state.model"),
        (lambda w: {"model": {"model": w, "optimizer": {"state": {}}}}, "model.model"),
        (lambda w: {"model": {"state_dict": w}, "ema": w}, "model.state_dict"),
        (lambda w: {"checkpoint": {"state": {"net": w}}}, "checkpoint.state.net"),
        (lambda w: {"generator": w, "discriminator": {"0.w": torch.ones(1)}}, "generator"),
        (lambda w: {"ema": {"module": w, "updates": 5}}, "ema.module"),
    ],
)
def test_weights_are_found_where_scripts_put_them(tmp_path: Path, content: Any, place: str) -> None:
    model = network(1)
    load_saved(content(weights()), model, tmp_path)
    assert_same(model.state_dict(), weights())
    assert load_checkpoint(tmp_path / "a.pt").container == place


def test_the_others_are_named_and_a_key_chooses(tmp_path: Path) -> None:
    model = network(1)
    content = {"state_dict": weights(2), "state_dict_ema": weights(3), "epoch": 7}
    notes = load_saved(content, model, tmp_path)
    assert notes == (
        "took the weights under 'state_dict'; there are others under 'state_dict_ema' (choose with "
        "key=, on the command line --key)",
    )
    assert_same(model.state_dict(), weights(2))
    assert load(tmp_path / "a.pt", model, key="state_dict_ema") == ()
    assert_same(model.state_dict(), weights(3))
    got = load_checkpoint(tmp_path / "a.pt", key="state_dict_ema")
    assert (got.container, got.extra["epoch"]) == ("state_dict_ema", 7)


def test_what_stands_beside_the_weights_at_any_level_is_kept(tmp_path: Path) -> None:
    content = {"state": {"model": weights(), "epoch": 3, "lr": 1}, "lr": 2}
    torch.save(content, tmp_path / "a.pt")
    assert load_checkpoint(tmp_path / "a.pt").extra == {"epoch": 3, "lr": 2}


def test_a_key_leads_anywhere_and_into_names(tmp_path: Path) -> None:
    model = network(1)
    gan = {f"generator.{n}": v for n, v in weights(2).items()}
    gan |= {f"discriminator.{n}": v for n, v in weights(3).items()}
    content = {"my.run": {"policies": [1], "actor": weights(4)}, "state_dict": gan}
    load_saved(content, model, tmp_path, key="my.run.actor")
    assert_same(model.state_dict(), weights(4))
    notes = load(tmp_path / "a.pt", model, key="state_dict.discriminator")
    assert_same(model.state_dict(), weights(3))
    assert notes == ("left out the 11 tensors whose names do not start with 'discriminator.'",)


def test_a_key_into_names_of_a_bare_file(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    state = {f"actor.{n}": v for n, v in weights(2).items()} | {"critic.w": torch.ones(1)}
    save_file(state, tmp_path / "a.safetensors")
    model = network(1)
    load(tmp_path / "a.safetensors", model, key="actor")
    assert_same(model.state_dict(), weights(2))


def test_a_key_that_leads_nowhere_names_what_there_is(tmp_path: Path) -> None:
    torch.save({"state": {"model": weights()}, "ema": weights()}, tmp_path / "a.pt")
    with pytest.raises(NoStateDict, match=r"key='x', got weights under 'ema', 'state\.model'"):
        load_checkpoint(tmp_path / "a.pt", key="x")


def test_weights_under_an_unknown_key_are_named_and_not_guessed(tmp_path: Path) -> None:
    torch.save({"gradients": weights(), "step": 1}, tmp_path / "a.pt")
    with pytest.raises(NoStateDict, match=r"tensors by name are under 'gradients': choose with"):
        load_checkpoint(tmp_path / "a.pt")
    assert load_checkpoint(tmp_path / "a.pt", key="gradients").container == "gradients"


def test_a_dict_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {"step": 1}
    for name in ("model", "net", "state", "ema"):
        content[name] = content
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(NoStateDict):
        load_checkpoint(tmp_path / "a.pt")


# ------------------------------------------------------------------------------------------------
# Names of wrappers


def test_blocks_that_were_compiled_one_by_one(tmp_path: Path) -> None:
    source, target = network(2), network(1)
    source[1] = torch.compile(source[1])  # type: ignore[assignment]
    notes = load_saved(source.state_dict(), target, tmp_path)
    assert notes == ("took names without '_orig_mod' inside them",)
    assert_same(target.state_dict(), weights(2))
    # The model may be the one that is wrapped.
    target = network(1)
    target[1] = torch.compile(target[1])  # type: ignore[assignment]
    load_saved(weights(3), target, tmp_path)
    assert_same(target[1]._orig_mod.state_dict(), network(3)[1].state_dict())


@pytest.mark.parametrize(
    ("front", "inside"),
    [
        ("", "_checkpoint_wrapped_module."),
        ("_fsdp_wrapped_module.", "_fsdp_wrapped_module."),
        ("_fsdp_wrapped_module.", "_fsdp_wrapped_module._checkpoint_wrapped_module."),
        ("module._orig_mod.", "_orig_mod."),
        ("_orig_mod.module.", "_checkpoint_wrapped_module._orig_mod."),
    ],
)
def test_wrapped_parts(tmp_path: Path, front: str, inside: str) -> None:
    model = network(1)
    state = {
        front + (f"1.{inside}{name[2:]}" if name[:2] == "1." else name): value
        for name, value in weights(2).items()
    }
    load_saved({"model": state}, model, tmp_path)
    assert_same(model.state_dict(), weights(2))
    assert load_checkpoint(tmp_path / "a.pt").removed_prefix == front


def test_wrappers_that_were_made_by_torch(tmp_path: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    source, target = network(2), network(1)
    source[1] = checkpoint_wrapper(torch.compile(source[1]))  # type: ignore[arg-type]
    load_saved(nn.DataParallel(source).state_dict(), target, tmp_path)
    assert_same(target.state_dict(), weights(2))


def test_averaged_model(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(network(2))
    averaged.update_parameters(network(2))
    model = network(1)
    notes = load_saved({"model_ema": averaged.state_dict()}, model, tmp_path)
    assert "left out n_averaged, AveragedModel's count of averages" in notes
    assert_same(model.state_dict(), weights(2))
    assert load_checkpoint(tmp_path / "a.pt").extra["n_averaged"] == 1
    # As a model it takes its own file whole, and one of the network inside it.
    other = torch.optim.swa_utils.AveragedModel(network(1))
    load_into(other, load_checkpoint(tmp_path / "a.pt"))
    assert_same(other.state_dict(), averaged.state_dict())
    load_saved(weights(3), other, tmp_path)
    assert_same(other.module.state_dict(), weights(3))


def test_a_count_of_the_networks_own_stays(tmp_path: Path) -> None:
    state = {"n_averaged": torch.tensor(3), "layer.weight": torch.ones(2)}
    torch.save(state, tmp_path / "a.pt")
    assert list(load_checkpoint(tmp_path / "a.pt").state_dict) == list(state)


class WithModule(nn.Module):
    """Has a part that is called `module`."""

    def __init__(self, tower: nn.Module, adapter: nn.Module | None = None) -> None:
        super().__init__()
        self.tower = tower
        self.head = nn.Linear(2, 2)
        if adapter is not None:
            self.adapter = nn.ModuleDict({"module": adapter})


def test_a_part_that_was_wrapped_for_distributed_training(tmp_path: Path) -> None:
    source, target = WithModule(nn.DataParallel(network(2))), WithModule(network(1))
    notes = load_saved(source.state_dict(), target, tmp_path)
    assert notes == ("took names with or without 'module.' inside them, as the model's are",)
    assert_same(target.tower.state_dict(), weights(2))
    back = WithModule(nn.DataParallel(network(1)))
    load_saved(target.state_dict(), back, tmp_path)
    assert_same(back.state_dict(), source.state_dict())


def test_a_part_that_is_called_module_keeps_its_name(tmp_path: Path) -> None:
    source = WithModule(nn.DataParallel(network(2)), nn.Linear(2, 2))
    target = WithModule(network(1), nn.Linear(2, 2))
    assert load_saved(target.state_dict(), WithModule(network(3), nn.Linear(2, 2)), tmp_path) == ()
    load_saved(source.state_dict(), target, tmp_path)
    assert_same(target.tower.state_dict(), weights(2))
    assert_same(target.adapter.state_dict(), source.adapter.state_dict())
    # The whole may be nothing but such a part.
    only = nn.ModuleDict({"module": network(1)})
    assert load_saved(nn.ModuleDict({"module": network(2)}).state_dict(), only, tmp_path) == ()
    assert_same(only["module"].state_dict(), weights(2))


def test_names_that_would_become_one_stay(tmp_path: Path) -> None:
    state = {"a._orig_mod.w": torch.ones(1), "a.w": torch.zeros(1)}
    torch.save(state, tmp_path / "a.pt")
    assert list(load_checkpoint(tmp_path / "a.pt").state_dict) == list(state)
    both = nn.ModuleDict({"a": nn.ModuleDict({"module": nn.Linear(1, 1), "x": nn.Linear(1, 1)})})
    text = mismatch(both, {"a.weight": torch.ones(1, 1), "a.module.weight": torch.ones(1, 1)})
    assert "unexpected in the checkpoint (1): a.weight" in text


# ------------------------------------------------------------------------------------------------
# Modules' own rules for older files


def without(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if part not in name}


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "model._orig_mod."])
def test_batch_norms_of_before_they_counted(tmp_path: Path, prefix: str) -> None:
    state = without(weights(2), "num_batches")
    model = network(1)
    model[1][1].num_batches_tracked.fill_(4)
    load_saved({prefix + name: value for name, value in state.items()}, model, tmp_path)
    assert_same(without(model.state_dict(), "num_batches"), state)
    wanted = network(1)
    wanted[1][1].num_batches_tracked.fill_(4)
    wanted.load_state_dict(state)  # torch's own answer
    assert_same(model.state_dict(), wanted.state_dict())


def test_values_are_copied_whatever_the_file_says(tmp_path: Path) -> None:
    state = network(2).state_dict()
    network(1).load_state_dict(state, assign=True)  # leaves a word in the dict that says so
    model = network(1)
    load_saved(state, model, tmp_path)
    (tmp_path / "a.pt").write_bytes(bytes((tmp_path / "a.pt").stat().st_size))
    assert_same(model.state_dict(), weights(2))


def test_what_torch_refuses_is_refused() -> None:
    state = network(2).state_dict()
    del state["1.1.num_batches_tracked"]  # of a version that counts
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        network(1).load_state_dict(state)
    assert "missing from the checkpoint (1): 1.1.num_batches_tracked" in mismatch(network(1), state)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_older_weight_norm(tmp_path: Path) -> None:
    old = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(3, 2)))
    new = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    load_saved(old.state_dict(), new, tmp_path)
    x = torch.randn(5, 3)
    torch.testing.assert_close(new(x), old(x))


def test_scalars_of_one_dimension() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

    model = Scaled()
    load_into(model, checkpoint_of({"scale": torch.tensor([3.0])}))
    assert model.scale.item() == 3.0
    # torch would take the first of several.
    assert "scale: expected [], got [2]" in mismatch(model, {"scale": torch.tensor([3.0, 4.0])})


class Renamed(nn.Module):
    """Takes files in which its weight had another name, as torchvision's blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        if f"{prefix}kernel" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}kernel")
        super()._load_from_state_dict(state, prefix, *rest)


@pytest.mark.parametrize("hook", [False, True])
def test_a_module_that_renames(tmp_path: Path, hook: bool) -> None:
    model = nn.Sequential(Renamed())
    if hook:
        model = nn.Sequential(nn.ParameterDict({"weight": torch.zeros(2)}))

        def rename(state: Any, prefix: str, *_: Any) -> None:
            if f"{prefix}kernel" in state:
                state[f"{prefix}weight"] = state.pop(f"{prefix}kernel")

        model[0]._register_load_state_dict_pre_hook(rename)
    load_saved({"0.kernel": torch.ones(2)}, model, tmp_path)
    assert model[0].weight.tolist() == [1.0, 1.0]
    # Under the other name it is still no place for codes.
    assert "int8" in mismatch(model, {"0.kernel": torch.ones(2, dtype=torch.int8)})
    assert "unexpected in the checkpoint (1): 0.other" in mismatch(
        model, {"0.other": torch.ones(2)}
    )


class Counts(nn.Linear):
    """Stores what is no tensor beside its weights."""

    seen = 0

    def get_extra_state(self) -> Any:
        return {"seen": self.seen}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]


def test_extra_state_that_is_no_tensor(tmp_path: Path) -> None:
    source, target = nn.Sequential(Counts(2, 2)), nn.Sequential(Counts(2, 2))
    source[0].seen = 5
    load_saved({"model": source.state_dict(), "step": 1}, target, tmp_path)
    assert target[0].seen == 5
    assert torch.equal(target[0].weight, source[0].weight)
    missing = {name: v for name, v in source.state_dict().items() if "extra" not in name}
    with pytest.raises(StateDictMismatch, match=r"0\._extra_state"):
        load_into(target, checkpoint_of(missing))
    assert "unexpected in the checkpoint" in mismatch_with_extra(nn.Sequential(nn.Linear(2, 2)))


def mismatch_with_extra(model: nn.Module) -> str:
    with pytest.raises(StateDictMismatch) as caught:
        load_into(model, checkpoint_of({**model.state_dict(), "0._extra_state": torch.ones(1)}))
    return str(caught.value)


class Breaks(nn.Module):
    """Fails when most of the model has been loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Parameter(torch.zeros(1))

    def _load_from_state_dict(self, *_: Any) -> None:
        raise RuntimeError("not today")


def test_a_failed_load_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(Counts(2, 2), nn.BatchNorm1d(2), nn.LazyLinear(3), Breaks())
    model[0].seen = 7
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    held = {name: id(tensor) for name, tensor in model.named_parameters()}
    before = {name: raw_bytes(p) for name, p in model[:2].named_parameters()}
    state: dict[str, Any] = {
        n: torch.ones_like(v) for n, v in model[:2].state_dict().items() if isinstance(v, Tensor)
    }
    state |= {"2.weight": torch.ones(3, 2), "2.bias": torch.ones(3), "3.last": torch.ones(1)}
    made = checkpoint_of(state)
    made.extra_state["0._extra_state"] = {"seen": 1}
    with pytest.raises(StateDictMismatch, match="the model is unchanged"):
        load_into(model, made)
    assert {name: raw_bytes(p) for name, p in model[:2].named_parameters()} == before
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == held
    assert model[1].num_batches_tracked == 0
    assert model[0].seen == 7
    assert nn.parameter.is_lazy(model[2].weight)


def test_an_older_files_buffer_that_the_model_makes_itself() -> None:
    class Positions(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("position_ids", torch.arange(4)[None], persistent=False)

    model = Positions()
    state = {name: value + 1 for name, value in model.state_dict().items()}
    notes = load_into(model, checkpoint_of({**state, "position_ids": torch.arange(4)[None]}))
    assert notes == ("left out position_ids, which the model does not load",)
    assert_same(model.state_dict(), state)
    text = mismatch(model, {**state, "position_ids": torch.arange(4)[None] + 1})
    assert "position_ids (a non-persistent buffer of the model)" in text


def test_names_that_a_model_says_to_ignore() -> None:
    model = nn.Linear(2, 2)
    model._keys_to_ignore_on_load_unexpected = [r"masked_bias"]  # type: ignore[assignment]
    state = dict(model.state_dict())
    load_into(model, checkpoint_of({**state, "masked_bias": torch.tensor(-1e4)}))
    assert "unexpected" in mismatch(model, {**state, "other": torch.tensor(-1e4)})


# ------------------------------------------------------------------------------------------------
# Kinds of numbers


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64],
)
def test_other_numbers_are_no_floating_point_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    model = nn.Linear(2, 2)
    state = {name: value.to(dtype) for name, value in model.state_dict().items()}
    text = mismatch(model, state)
    assert "of another kind of number (2): weight: expected torch.float32, got " in text
    torch.save(state, tmp_path / "a.pt")
    slab = torch.empty(1 << 14, dtype=torch.uint8)
    found = read_into(tmp_path / "a.pt", slab)
    fitter = Fitter(model)
    assert fitter.fit(found) is None
    with pytest.raises(StateDictMismatch, match="of another kind of number"):
        fitter.load(found, slab, torch.empty(1 << 14, dtype=torch.uint8))


def test_quantized_and_sparse_tensors_are_no_dense_weights() -> None:
    model = nn.Linear(2, 2, bias=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)
    assert "qint8" in mismatch(model, {"weight": quantized})
    assert "sparse_coo" in mismatch(model, {"weight": torch.ones(2, 2).to_sparse()})


class Buffered(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)


@pytest.mark.parametrize(
    ("given", "dtype", "taken"),
    [
        (torch.tensor([3, -4], dtype=torch.int32), torch.int64, True),
        (torch.tensor([3, 4]), torch.int8, True),
        (torch.tensor([3, 400]), torch.int8, False),
        (torch.tensor([-1, 4], dtype=torch.int8), torch.uint8, False),
        (torch.tensor([255, 4], dtype=torch.uint8), torch.int8, False),
        (torch.tensor([1, 0], dtype=torch.uint8), torch.bool, True),
        (torch.tensor([2, 0], dtype=torch.uint8), torch.bool, False),
        (torch.tensor([3.0, 4.0]), torch.int64, True),
        (torch.tensor([3.5, 4.0]), torch.int64, False),
        (torch.tensor([float("nan"), 4.0]), torch.int64, False),
        (torch.tensor([1.0, 2.0], dtype=torch.float64), torch.float32, True),
        (torch.tensor([1.0, 2e5]), torch.float16, False),
        (torch.tensor([1.0, float("inf")]), torch.float16, True),
        (torch.tensor([1e300, 2.0], dtype=torch.float64), torch.float32, False),
        (torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn), torch.float32, True),
        (torch.tensor([1.0, 1e6]), torch.float8_e5m2, False),
        (torch.tensor([1.0, 1e6]), torch.float8_e4m3fn, False),  # torch would take the largest
        (torch.tensor([1.0, 65536.0]).bfloat16(), torch.float16, False),
        (torch.tensor([1.0, 2.0], dtype=torch.complex128), torch.complex64, True),
        (torch.tensor([1.0, 2.0]), torch.complex64, False),
    ],
    ids=str,
)
def test_numbers_are_taken_where_they_stay_what_they_are(
    given: Tensor, dtype: torch.dtype, taken: bool
) -> None:
    model = Buffered(torch.zeros(2).to(dtype))
    if not taken:
        assert "value: expected " in mismatch(model, {"value": given})
        return
    load_into(model, checkpoint_of({"value": given}))
    assert raw_bytes(model.value) == raw_bytes(given.to(dtype))


def test_rounding_is_told() -> None:
    model = nn.Linear(2, 2, dtype=torch.float16)
    state = {name: value.double() for name, value in model.state_dict().items()}
    notes = load_into(model, checkpoint_of(state))
    assert notes == ("rounded from torch.float64 to torch.float16: weight, bias",)
    assert load_into(nn.Linear(2, 2), checkpoint_of(dict(model.state_dict()))) == ()


# ------------------------------------------------------------------------------------------------
# What diagnose and scan say


def test_a_scan_says_which_weights_it_took(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from fadiag_fast.scanning import scan

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(3, 4)
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.out_head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for block in self.blocks:
                x = x + block(x).tanh()
            logits: Tensor = self.out_head(x)
            return logits

    trained, average = Blocks().state_dict(), Blocks().state_dict()
    batches = [(torch.randn(4, 3), torch.randint(0, 2, (4,))) for _ in range(2)]
    both = {f"module.{n}": v.double() for n, v in trained.items()}
    torch.save({"net": both, "ema": average}, tmp_path / "step_1.pt")
    torch.save({"net": {n: v.to(torch.int8) for n, v in trained.items()}}, tmp_path / "step_2.pt")
    paths = sorted(map(str, tmp_path.glob("*.pt")))

    taken, codes = scan(paths, Blocks(), batches, tmp_path / "out").rows
    assert taken["container"] == "net"
    choice, rounded = taken["remarks"]
    assert choice.startswith("took the weights under 'net'; there are others under 'ema'")
    assert rounded.startswith("rounded from torch.float64 to torch.float32: embed.weight")
    assert codes["error_kind"] == "wrong model"
    assert "of another kind of number" in codes["error"]

    # Another key is another configuration: nothing is taken over.
    result = scan(paths[:1], Blocks(), batches, tmp_path / "out", key="ema")
    at, row = next((i, row) for i, row in enumerate(result.rows) if row["container"] == "ema")
    assert (row["path"], row["remarks"]) == (paths[0], [])
    alone = Blocks()
    alone.load_state_dict(average)
    torch.testing.assert_close(
        torch.tensor(list(result.figures())[at].residual_norms),
        torch.tensor(diagnose(alone, batches).figures.residual_norms),
    )


def test_diagnose_takes_a_key_and_says_what_it_took(tmp_path: Path) -> None:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from fadiag_fast import cli
    from fadiag_fast.zoo import build_model

    model = build_model("smallcnn", input_shape=(1, 28, 28), num_classes=10, channels=(2, 2, 2))
    config = {"model": "smallcnn", "model_options": {"channels": (2, 2, 2)}}
    state = model.state_dict()
    file = tmp_path / "a.pt"
    torch.save({"state": {"net": state, "ema": state}, "config": config}, file)
    how = ["diagnose", str(file), "--model", "smallcnn", "--batches", "1", "--batch-size", "2"]
    result = CliRunner().invoke(cli.app, how)
    assert result.exit_code == 2, result.output
    told = " ".join(result.stderr.split())
    assert "took the weights under 'state.net'; there are others under 'state.ema'" in told
    assert "--key" in told
    result = CliRunner().invoke(cli.app, [*how, "--key", "state.ema"])
    assert (result.exit_code, result.stderr) == (2, "")
    result = CliRunner().invoke(cli.app, [*how, "--key", "ema"])
    assert result.exit_code == 3
    assert "expected weights under key='ema', got weights under" in " ".join(result.stderr.split())


# ------------------------------------------------------------------------------------------------
# Values of other classes beside the weights


class Colour(enum.Enum):
    RED = 1


class Settings(dict):  # type: ignore[type-arg]
    """A dict of a project's own, with attributes."""


class Named(list):  # type: ignore[type-arg]
    pass


def beside() -> dict[str, Any]:
    """Return values as training scripts put them beside weights."""
    settings = Settings(lr=0.1, nested=Settings(depth=2))
    settings.source = Path("a.yaml")  # type: ignore[attr-defined]
    return {
        "args": argparse.Namespace(lr=0.1, out=Path("runs"), names=["a"], seen={1, 2}),
        "path": Path("runs/a"),
        "counts": collections.defaultdict(int, a=1),
        "of_lists": collections.defaultdict(list, {"a": [1], "b": [torch.ones(2)]}),
        "best": np.float64(0.5),
        "epochs": np.int64(3),
        "history": np.arange(6.0).reshape(2, 3),
        "strings": np.array(["a", "b"]),
        "when": datetime.datetime(2020, 1, 2, tzinfo=datetime.timezone.utc),
        "took": datetime.timedelta(seconds=3),
        "colour": Colour.RED,
        "settings": settings,
        "named": Named([1, 2]),
        "optimizer_class": torch.optim.Adam,
        "activation": torch.nn.functional.relu,
        "partial": functools.partial(torch.nn.functional.relu, inplace=True),
        "transform": nn.Sequential(nn.Linear(2, 2)),
        "frozen": frozenset({1}),
        "chars": collections.deque([1, 2], maxlen=3),
        "place": decimal.Decimal("1.5"),
        "exact": fractions.Fraction(1, 3),
        "id": uuid.UUID(int=5),
        "slice": slice(1, 2),
        "range": range(3),
    }


FORMS = {"zip": True, "legacy": False}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", beside())
def test_a_value_beside_the_weights_is_not_made(tmp_path: Path, name: str, form: str) -> None:
    content = {"model": weights(2), name: beside()[name], "lr": 0.1, "after": [torch.arange(3)]}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=FORMS[form])
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pt", weights_only=True)
    model = network(1)
    (note,) = load(tmp_path / "a.pt", model)
    assert note.startswith("not loaded beside the weights: ")
    assert_same(model.state_dict(), weights(2))
    extra = load_checkpoint(tmp_path / "a.pt").extra
    assert repr(extra[name]).endswith(", not loaded>")
    assert extra["lr"] == 0.1
    assert extra["after"][0].tolist() == [0, 1, 2]


def test_all_of_them_together_and_further_down(tmp_path: Path) -> None:
    content = {"state": {"net": weights(2), "log": [{"deep": beside()}]}, "args": beside()["args"]}
    notes = load_saved(content, network(1), tmp_path)
    assert "took the weights under 'state.net'" in notes
    extra = load_checkpoint(tmp_path / "a.pt").extra
    assert repr(extra["args"]) == "<argparse.Namespace, not loaded>"
    assert repr(extra["log"][0]["deep"]["colour"]) == f"<{__name__}.Colour, not loaded>"


def test_nothing_is_imported_or_called(tmp_path: Path) -> None:
    (tmp_path / "never_imported.py").write_text("raise SystemExit")
    witness = tmp_path / "ran"

    class Calls:
        def __reduce__(self) -> Any:
            return open, (str(witness), "w")

    torch.save({"model": weights(2), "x": [Calls(), {"y": Calls()}]}, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    load(tmp_path / "a.pt", network(1))
    assert not witness.exists()
    assert data == (tmp_path / "a.pt").read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        lambda w: {"model": collections.defaultdict(list, w)},
        lambda w: Settings(w),
        lambda w: {"model": Settings(w), "args": 1},
        lambda w: {"model": {n: v.numpy() for n, v in w.items()}},
        lambda w: {"model": {**w, "0.weight": Through(w["0.weight"])}},
        lambda w: {"model": {**w, "0.weight": nn.UninitializedParameter()}},
        lambda w: {"model": network(2)},
        lambda w: network(2),
        lambda w: {"model": Named([w])},
    ],
)
def test_weights_inside_other_classes_are_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content(weights()), tmp_path / "a.pt")
    with pytest.raises(UnsafeCheckpoint) as caught:
        load_checkpoint(tmp_path / "a.pt")
    assert caught.value.globals_needed
    with pytest.raises(UnsafeCheckpoint):
        read_into(tmp_path / "a.pt", torch.empty(1 << 18, dtype=torch.uint8))


class Through:
    """Gives a tensor when it is unpickled, through code of its own."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> Any:
        return torch.neg, (self.tensor,)


def test_no_later_place_is_taken_for_one_that_is_not_loaded(tmp_path: Path) -> None:
    torch.save({"model": network(1), "ema": weights(2)}, tmp_path / "a.pt")
    with pytest.raises(NoStateDict, match=r"not loaded\).* are under 'ema': choose with key="):
        load_checkpoint(tmp_path / "a.pt")
    model = network(3)
    load(tmp_path / "a.pt", model, key="ema")
    assert_same(model.state_dict(), weights(2))
    mixed = {**weights(2), "0.weight": Through(torch.ones(1))}
    torch.save({"model": mixed, "ema": weights(2)}, tmp_path / "a.pt")
    with pytest.raises(NoStateDict, match=r"'0\.weight': \S*getattr \(not loaded\)"):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("stream", "shown"),
    [
        (b"cm\nf\n)R", "m.f"),  # a call
        (b"cm\nf\n)Rcm\ng\n\x85b", "m.f"),  # with a state
        (b"cm\nC\n)\x81}X\x01\0\0\0aK\x01sb", "m.C"),  # an object with attributes
        (b"cm\nC\n)\x81X\x01\0\0\0aK\x01s", "m.C"),  # with an item
        (b"cm\nC\n)\x81(X\x01\0\0\0aK\x01u", "m.C"),  # with items
        (b"cm\nC\n)\x81K\x01a", "m.C"),  # with one more
        (b"cm\nC\n)\x81(K\x01K\x02e", "m.C"),  # and several
        (b"cm\nf\n)R)R", "m.f"),  # what was called is called
        (b"ccollections\nOrderedDict\ncm\nf\n)R\x85R", "m.f"),  # something known of it
        (b"cm\nf\n", "m.f"),  # no call at all
    ],
)
def test_what_becomes_of_an_unknown_object(stream: bytes, shown: str) -> None:
    value, _, unknown = read_pickle(b"\x80\x02" + stream + b".", offered())
    assert is_opaque(value)
    assert repr(show(value)) == f"<{shown}, not loaded>"
    assert unknown == {shown} | ({"m.g"} if b"g" in stream else set())


def test_a_call_of_a_known_value_stays_an_error() -> None:
    with pytest.raises(PickleError, match="calls what is no function"):
        read_pickle(b"\x80\x02K\x01)R.", offered())
