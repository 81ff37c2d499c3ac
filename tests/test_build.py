"""What setup.py decides before it compiles anything, and what it says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HAS_NVCC = shutil.which("nvcc") is not None or Path("/usr/local/cuda/bin/nvcc").exists()


def build(tmp_path, **environment):
    if not (ROOT / "setup.py").exists():
        pytest.skip("no source tree beside the tests")
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    kept = {k: v for k, v in os.environ.items() if k not in ("FORCE_CUDA", "FORCE_ONLY_CPU")}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", *folders],
        cwd=ROOT,
        env={**kept, **environment},
        capture_output=True,
        text=True,
    )


def test_contradicting_wishes(tmp_path):
    result = build(tmp_path, FORCE_CUDA="1", FORCE_ONLY_CPU="1")
    assert result.returncode != 0
    assert "expected one of FORCE_CUDA and FORCE_ONLY_CPU, got both" in result.stderr


@pytest.mark.skipif(HAS_NVCC, reason="nvcc is here")
def test_forced_cuda_without_nvcc(tmp_path):
    result = build(tmp_path, FORCE_CUDA="1")
    assert result.returncode != 0
    assert "FORCE_CUDA is set: expected nvcc in one of CUDA_HOME" in result.stderr


@pytest.mark.skipif(not HAS_NVCC, reason="no nvcc")
@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ("9.x", "expected numbers such as '8.0;9.0+PTX', got '9.x'"),
        ("7.5", "expected 8.0 or later"),
    ],
)
def test_bad_architectures(tmp_path, listed, message):
    result = build(tmp_path, TORCH_CUDA_ARCH_LIST=listed)
    assert result.returncode != 0
    assert message in result.stderr


def test_without_a_compiler_the_package_is_built_and_says_so_at_first_use(tmp_path):
    result = build(tmp_path, PATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    (told,) = [line for line in result.stderr.splitlines() if line.startswith("fadiag-fast build")]
    assert "no libraries, plain PyTorch only" in told
    assert "apt install g++" in told
    native = tmp_path / "lib" / "fadiag_fast" / "_native"
    assert [path.name for path in native.iterdir()] == ["build_info.json"]
    program = (
        "import pathlib, sys, warnings, fadiag_fast.ops as ops, fadiag_fast.ops.native as native\n"
        "native._FOLDER = pathlib.Path(sys.argv[1])\n"
        "native.LIBRARIES.update(native._load_all())\n"
        "native.NATIVE_DEVICES = frozenset()\n"
        "import torch\n"
        "h = torch.tensor([[3.0, 4.0]])\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    norms = [ops.layer_statistics([h], [h]).hidden_norm.item() for _ in range(2)]\n"
        "(warning,) = caught\n"
        "print(norms, warning.message)\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program, str(native)], capture_output=True, text=True, check=True
    ).stdout
    assert shown.startswith("[5.0, 5.0] fadiag_fast: using the slower PyTorch path on cpu")
    assert "built without a C++ compiler; install one (for example: apt install g++)" in shown


def test_a_wish_for_a_compiler_or_for_cuda_is_not_dropped(tmp_path):
    result = build(tmp_path, CXX="no-such-compiler")
    assert result.returncode != 0
    assert (
        "CXX: expected a C++ compiler, got 'no-such-compiler', which is not found" in result.stderr
    )
    result = build(tmp_path, CXX="", FORCE_CUDA="1")
    assert result.returncode != 0
    assert "FORCE_CUDA is set: expected a C++ compiler, found none" in result.stderr


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("ninja", "expected ninja, got none. Install it: "),
        ("torch", "expected torch 2.10 or later, got none ("),
    ],
)
def test_a_missing_build_tool_is_named_with_the_command(tmp_path, module, message):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    program = (
        f"import runpy, sys; sys.modules[{module!r}] = None\n"
        f"sys.argv = ['setup.py', '-q', 'build_ext', *{folders!r}]\n"
        "sys.path.insert(0, '')\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={"PATH": "/nowhere", "CXX": compiler, "FORCE_ONLY_CPU": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert message in result.stderr
    assert f"{sys.executable} -m pip install" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, "expected setuptools, got none. Install it: "),
        ("65.5.0", "expected setuptools 77 or later, got 65.5.0. Upgrade it: "),
    ],
)
def test_setuptools_that_is_missing_or_too_old_is_named(version, message):
    stand_in = "None" if version is None else f"types.SimpleNamespace(__version__={version!r})"
    program = f"import sys, types; sys.modules['setuptools'] = {stand_in}; import build_backend"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert message in line
    assert line.endswith(f"{sys.executable} -m pip install 'setuptools>=77' ninja")


def test_the_vision_extra_leaves_torch_alone():
    """A torchvision demands one torch: pip would install the newest of both."""
    text = (ROOT / "pyproject.toml").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("vision = ")]
    assert not {"torchvision", "timm", "torch"} & set(re.findall(r"[a-z]+", line.partition("[")[2]))


def test_cpu_only_build_says_so_and_loads(tmp_path):
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    result = build(tmp_path, FORCE_ONLY_CPU="1")
    assert result.returncode == 0, result.stderr
    assert "CPU library; no CUDA library: FORCE_ONLY_CPU is set" in result.stderr
    native = tmp_path / "lib" / "fadiag_fast" / "_native"
    assert {path.name for path in native.iterdir()} == {"libfadiag_cpu.so", "build_info.json"}
    program = (
        "import torch, sys\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "h = torch.tensor([[3.0, 4.0]])\n"
        "packed = torch.ops.fadiag.layer_statistics([h], [h])\n"
        "assert packed[:4].view(torch.float64).tolist() == [5.0, 5.0]\n"
    )
    library = str(native / "libfadiag_cpu.so")
    subprocess.run([sys.executable, "-c", program, library], check=True)
