"""What setup.py decides before it compiles anything, and what it says."""

import os
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
