"""Networks and rules of a user's own, by ``package.module:name``, as a command finds them."""

import os
import subprocess
import sys

import pytest
from torch import nn
from typer.testing import CliRunner

from fadiag_fast import cli
from fadiag_fast._common.named import accepted, load_named
from fadiag_fast.cli.networks import build_network
from fadiag_fast.zoo import load_dataset

NETS = """
from torch import nn
def plain(width=3): return nn.Linear(width, 2)
def shaped(num_classes, input_shape, width=0):
    net = nn.Linear(width or input_shape[0], num_classes)
    net.seen = input_shape, num_classes
    return net
def keywords(**options): return nn.Linear(1, 1 + len(options))
class Net(nn.Linear):
    def __init__(self, *, num_classes): super().__init__(2, num_classes)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with nets.py, on no path; as for an installed command."""
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    yield tmp_path
    sys.modules.pop("nets", None)


def test_a_module_of_the_working_directory_is_found_behind_all_others(here):
    (here / "json.py").write_text("raise RuntimeError('not the one of Python')")
    assert isinstance(load_named("nets:plain")(), nn.Linear)
    assert sys.path[-1] == str(here)
    assert load_named("json:loads")("1") == 1
    load_named("nets:Net")
    assert sys.path.count(str(here)) == 1


def test_a_command_that_names_no_code_looks_for_none_there(here):
    result = CliRunner().invoke(cli.app, ["diagnose", "x.pt", "--data", "teacher"])
    assert result.exit_code == 3
    assert str(here) not in sys.path


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.11 has a safe path first")
def test_pythons_safe_path_is_respected(here):
    program = "from fadiag_fast._common.named import load_named; load_named('nets:plain')"
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "is left out by Python's safe path" in result.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("net:plain", r"No module named 'net'; .* the working directory .* included"),
        ("nets.small:plain", r"No module named 'nets.small'"),
        ("nets:plian", r"nets \(.*nets\.py\) has no 'plian'; did you mean nets:plain\?"),
        ("nets.py:plain", "it names a file; write nets:plain"),
        ("./models/nets.py:plain", "it names a file; write models.nets:plain"),
        ("needs:it", "No module named 'nothing_of_this_name'$"),
    ],
)
def test_what_is_not_found_says_where_it_was_looked_for(here, name, message):
    (here / "needs.py").write_text("import nothing_of_this_name")
    with pytest.raises(ImportError, match=message):
        load_named(name)


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("plain", {}, (2, 3)),
        ("plain", {"width": 5}, (2, 5)),
        ("shaped", {}, (10, 1)),
        ("shaped", {"num_classes": 4}, (4, 1)),
        ("keywords", {}, (1, 1)),
        ("Net", {}, (10, 2)),
    ],
)
def test_what_reaches_a_builder(here, name, options, shape):
    dataset = load_dataset("fashion-mnist-mini")
    network, _ = build_network(f"nets:{name}", dataset, options)
    assert tuple(network.weight.shape) == shape
    if name == "shaped" and not options:
        assert network.seen == ((1, 28, 28), 10)


def test_only_named_parameters_are_filled():
    def positional(num_classes, /): ...

    offered = {"input_shape": 1, "num_classes": 2}
    assert accepted(positional, offered) == {}
    assert accepted(print, offered) == {}
    assert accepted(lambda num_classes, *input_shape: 0, offered) == {"num_classes": 2}
