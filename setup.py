"""Build the native libraries of fadiag_fast.

Two libraries without a Python module in them, so that one binary serves every Python and, through
torch's stable ABI, every torch >= 2.10:

    libfadiag_cpu    schemas and CPU kernels; always built
    libfadiag_cuda   CUDA kernels; built where nvcc is found, also without a GPU and beside a CPU
                     build of torch; loaded only where torch has CUDA

Environment:
    FORCE_CUDA=1           fail where nvcc is missing
    FORCE_ONLY_CPU=1       do not build the CUDA library
    CUDA_HOME              where to look for bin/nvcc first
    TORCH_CUDA_ARCH_LIST   for example "8.0;9.0+PTX"
    CXX                    the C++ compiler; empty for none

Without a C++ compiler the package is built without libraries and runs in plain PyTorch.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# The oldest torch whose stable ABI has what we use: 2.10.
TORCH_TARGET = "0x020a000000000000"
# Real code for the data-centre generations, which every chip of a generation runs, and PTX for
# those to come. The float64 tensor-core instruction of direction_cosines needs 8.0.
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
CPU_VARIANTS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}


def is_set(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "false", "no", "off")


@dataclass(frozen=True)
class CudaPlan:
    """Whether the CUDA library is built, with what, for which chips, and why."""

    nvcc: Path | None
    version: str
    architectures: list[str]
    reason: str


def find_nvcc() -> Path | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((path for path in candidates if path.is_file()), None)


def nvcc_version(nvcc: Path) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    return match.group(1) if match else "unknown"


def find_compiler() -> str | None:
    """Return the C++ compiler's command, None where there is none."""
    asked = os.environ.get("CXX")
    command = "c++" if asked is None else asked
    if command.strip() and shutil.which(shlex.split(command)[0]):
        return command
    if asked and asked.strip():
        raise SystemExit(f"CXX: expected a C++ compiler, got {asked!r}, which is not found")
    return None


def find_ninja() -> list[str]:
    """Return the command of the ninja package of this Python, or of the one on PATH."""
    try:
        import ninja  # noqa: F401
    except ImportError:
        if found := shutil.which("ninja"):
            return [found]
        raise SystemExit(
            f"fadiag-fast build: expected ninja, got none. Install it: {sys.executable} -m pip "
            f"install 'setuptools>=77' ninja"
        ) from None
    return [sys.executable, "-m", "ninja"]


def torch_folder() -> Path:
    """Return the folder of the torch whose headers are compiled against."""
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            f"fadiag-fast build: expected torch 2.10 or later, got none ({error}). Install it "
            f"first: {sys.executable} -m pip install torch"
        ) from None
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        raise SystemExit(
            f"fadiag-fast build: expected torch 2.10 or later, got {torch.__version__}"
        )
    return Path(torch.__file__).parent


def choose_architectures() -> tuple[list[str], str]:
    import torch

    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        text, source = listed, "TORCH_CUDA_ARCH_LIST"
    elif torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        text = ";".join(f"{major}.{minor}" for major, minor in sorted(found))
        source = "the GPUs found"
    else:
        text, source = DEFAULT_ARCHITECTURES, "the default list"
    architectures = [word for word in re.split(r"[;,\s]+", text) if word]
    for word in architectures:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", word):
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: expected numbers such as '8.0;9.0+PTX', got {word!r}"
            )
        if int(word.split(".")[0]) < 8:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected 8.0 or later, got {word!r}")
    return architectures, source


def plan_cuda() -> CudaPlan:
    if is_set("FORCE_ONLY_CPU"):
        if is_set("FORCE_CUDA"):
            raise SystemExit("expected one of FORCE_CUDA and FORCE_ONLY_CPU, got both")
        return CudaPlan(None, "", [], "no CUDA library: FORCE_ONLY_CPU is set")
    nvcc = find_nvcc()
    if nvcc is None:
        looked = "CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda"
        if is_set("FORCE_CUDA"):
            raise SystemExit(f"FORCE_CUDA is set: expected nvcc in one of {looked}, found none")
        return CudaPlan(
            None,
            "",
            [],
            f"no CUDA library: no nvcc in {looked}; install the CUDA toolkit, then fadiag-fast "
            f"again",
        )
    architectures, source = choose_architectures()
    version = nvcc_version(nvcc)
    names = ";".join(architectures)
    return CudaPlan(
        nvcc,
        version,
        architectures,
        f"CUDA library for {names} ({source}), with nvcc {version}",
    )


def nvcc_target_flags(architectures: list[str]) -> list[str]:
    flags = []
    for word in architectures:
        number = word.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if word.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class NinjaFile:
    """The few lines of ninja's language that two libraries need."""

    def __init__(self) -> None:
        self.lines = ["ninja_required_version = 1.5"]

    def rule(self, name: str, command: list[str], depfile: bool = False) -> None:
        self.lines += [f"rule {name}", f"  command = {' '.join(command)}"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def build(self, output: Path, rule: str, inputs: list[Path], **variables: str) -> None:
        def escape(path: Path) -> str:
            return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        sources = " ".join(escape(path) for path in inputs)
        self.lines.append(f"build {escape(output)}: {rule} {sources}")
        self.lines += [f"  {name} = {value}" for name, value in variables.items()]

    def write(self, path: Path) -> None:
        path.write_text("\n".join([*self.lines, ""]))


class BuildNative(build_ext):
    """Compile csrc with ninja instead of setuptools' one-file-at-a-time compiler."""

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        package = (ROOT if in_place else Path(self.build_lib)) / "fadiag_fast"
        target = package / "_native"
        target.mkdir(parents=True, exist_ok=True)
        cxx = find_compiler()
        if cxx is None:
            self.leave_out(target)
            return
        torch_folder()
        ninja = find_ninja()
        cuda = plan_cuda()
        print(f"fadiag-fast build: CPU library; {cuda.reason}", file=sys.stderr, flush=True)
        self.compile(target.resolve(), cuda, cxx, ninja)

    def leave_out(self, target: Path) -> None:
        """Build the package without libraries: everything then runs in plain PyTorch."""
        if is_set("FORCE_CUDA"):
            raise SystemExit("FORCE_CUDA is set: expected a C++ compiler, found none")
        decision = (
            "it was built without a C++ compiler; install one (for example: apt install g++), then "
            "fadiag-fast again"
        )
        print(
            f"fadiag-fast build: no libraries, plain PyTorch only, which is slower: {decision}",
            file=sys.stderr,
            flush=True,
        )
        for library in target.glob("libfadiag_*.so"):
            library.unlink()
        info = {"version": self.distribution.get_version(), "decision": decision}
        (target / "build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    def compile(self, target: Path, cuda: CudaPlan, cxx: str, command: list[str]) -> None:
        import torch

        work = Path(self.build_temp).resolve() / "native"
        work.mkdir(parents=True, exist_ok=True)
        include = torch_folder() / "include"
        defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-DTORCH_STABLE_ONLY"]
        common = ["-std=c++17", "-O3", *defines, "-isystem", shlex.quote(str(include))]
        host = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", "-g0"]
        ninja = NinjaFile()
        # -ffp-contract=off: the same bits with and without fused multiply-add.
        ninja.rule(
            "cxx",
            [cxx, "-MD -MF $out.d", *common, *host, "-ffp-contract=off $flags -c $in -o $out"],
            depfile=True,
        )
        link = ["-shared", "-o $out $in"]
        if sys.platform == "darwin":
            link.append("-undefined dynamic_lookup")
        else:
            self.make_stubs(work / "stubs", cxx)
            link += [f"-L{shlex.quote(str(work / 'stubs'))}", "-Wl,--no-as-needed", "-ltorch_cpu"]
        ninja.rule("link_cpu", [cxx, *link])

        cpu_objects = self.add_cpu_objects(ninja, work)
        cpu_library = target / "libfadiag_cpu.so"
        ninja.build(cpu_library, "link_cpu", cpu_objects)
        libraries = [cpu_library]
        if cuda.nvcc is not None:
            libraries.append(self.add_cuda(ninja, work, target, cuda, common, host))
        ninja.write(work / "build.ninja")
        self.run_ninja(command, work)

        info = {
            "version": self.distribution.get_version(),
            "torch_built_with": str(torch.__version__),
            "torch_minimum": "2.10",
            "cpu_variants": list(self.cpu_variants()),
            "cuda": cuda.version or None,
            "cuda_architectures": cuda.architectures,
            "decision": cuda.reason,
        }
        (target / "build_info.json").write_text(json.dumps(info, indent=2) + "\n")
        stale = target / "libfadiag_cuda.so"
        if cuda.nvcc is None and stale.exists():
            stale.unlink()

    @staticmethod
    def cpu_variants() -> dict[str, list[str]]:
        if platform.machine().lower() in ("x86_64", "amd64"):
            return CPU_VARIANTS
        return {"generic": []}

    def add_cpu_objects(self, ninja: NinjaFile, work: Path) -> list[Path]:
        objects = []
        kernels = CSRC / "cpu" / "kernels.cpp"
        for source in [CSRC / "library.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]:
            if source != kernels:
                objects.append(work / f"{source.stem}.o")
                ninja.build(objects[-1], "cxx", [source], flags="")
        for name, flags in self.cpu_variants().items():
            defines = [
                f"-DFADIAG_KERNELS=k{name.capitalize()}Kernels",
                f"-DFADIAG_INSTRUCTION_SET='\"{name}\"'",
            ]
            objects.append(work / f"kernels_{name}.o")
            ninja.build(objects[-1], "cxx", [kernels], flags=" ".join([*flags, *defines]))
        return objects

    @staticmethod
    def add_cuda(
        ninja: NinjaFile,
        work: Path,
        target: Path,
        cuda: CudaPlan,
        common: list[str],
        host: list[str],
    ) -> Path:
        nvcc = shlex.quote(str(cuda.nvcc))
        # The warnings are for our sources; nvcc's own generated code does not pass them.
        host_flags = ",".join(flag for flag in host if not flag.startswith("-W"))
        command = [nvcc, "-MD -MF $out.d", *common, "-DUSE_CUDA", f"-Xcompiler {host_flags}"]
        command += ["--threads 2", *nvcc_target_flags(cuda.architectures), "-c $in -o $out"]
        ninja.rule("nvcc", command, depfile=True)
        # The current stream and the CUDA error check live in libtorch_cuda, which a CPU build of
        # torch lacks: a stub with its name is enough to record the dependency.
        stubs = shlex.quote(str(work / "stubs"))
        ninja.rule(
            "link_cuda",
            [
                f"{nvcc} -shared -cudart static -o $out $in",
                f"-L{stubs} -Xlinker --no-as-needed -ltorch_cpu -ltorch_cuda",
            ],
        )
        objects = []
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            objects.append(work / f"cuda_{source.stem}.o")
            ninja.build(objects[-1], "nvcc", [source])
        library = target / "libfadiag_cuda.so"
        ninja.build(library, "link_cuda", objects)
        return library

    @staticmethod
    def make_stubs(folder: Path, cxx: str) -> None:
        folder.mkdir(exist_ok=True)
        source = folder / "empty.cpp"
        source.write_text("")
        for name in ("libtorch_cpu.so", "libtorch_cuda.so"):
            if not (folder / name).exists():
                command = [*shlex.split(cxx), "-shared", "-fPIC", f"-Wl,-soname,{name}"]
                command += ["-o", str(folder / name), str(source)]
                if subprocess.run(command).returncode:
                    raise SystemExit(
                        f"fadiag-fast build: expected a C++ compiler that can link, got {cxx!r}; "
                        f"its messages stand above. CXX= (empty) builds without it"
                    )

    @staticmethod
    def run_ninja(ninja: list[str], work: Path) -> None:
        command = [*ninja, "-C", str(work)]
        if jobs := os.environ.get("MAX_JOBS"):
            command += ["-j", jobs]
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                "fadiag-fast build: the native libraries did not compile; the compiler's messages "
                "stand above. FORCE_ONLY_CPU=1 leaves the CUDA library out, CXX= (empty) both: "
                "everything then runs in plain PyTorch."
            ) from error

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / "fadiag_fast" / "_native"
        return [str(path) for path in sorted(folder.glob("*"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """Tag the wheel py3-none-<platform>: it holds machine code, but none that knows Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("fadiag_fast._native", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
