"""Read damaged files in a process of its own, under limits, and say what came of each."""

from __future__ import annotations

import faulthandler
import io
import json
import math
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from fadiag_fast.checkpoints import (
    CheckpointError,
    StateDictMismatch,
    load_checkpoint,
    load_into,
    read_into,
)
from fadiag_fast.checkpoints.programs import program_kind
from fadiag_fast.programs.loading import load_packaged

from . import marks, oracles
from .damage import DEVICE, EMPTY, FIFO, FOLDER, LOOP, damaged_files
from .files import Kind, whole_kinds
from .hostile import hostile_files

# Of reading one file in all ways. A file here has some kilobytes.
MOST_SECONDS = 5.0
MOST_BYTES = 1 << 30
# Files of which the times are too young are waited for, so many are written at once.
_BATCH = 25
_SLAB = 1 << 22

_Content = Mapping[str, bytes | str]


class FindingError(Exception):
    """Say what is wrong with what the package did."""


# ------------------------------------------------------------------------------------------------
# What the package must not do while it reads

_FORBIDDEN = (
    *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.kill"),
    *("subprocess.Popen", "pty.spawn", "socket.", "ctypes.", "pickle.find_class", "webbrowser."),
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.chown", "os.utime", "os.putenv", "os.unsetenv", "shutil.", "tempfile."),
    *("urllib.", "http.", "ftplib.", "smtplib.", "code.__new__", "sys.settrace", "exec", "compile"),
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC


class Watch:
    """Refuse and note what a process is about to do that reading a file has no need of."""

    def __init__(self) -> None:
        # Armed once all that reading needs has been imported.
        self.on = self.armed = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            _, mode, flags = arguments
            bad = isinstance(flags, int) and flags & _WRITING
            bad = bad or (isinstance(mode, str) and set(mode) & set("wax+"))
        elif event == "import":
            bad = arguments[0] not in sys.modules
        else:
            bad = event.startswith(_FORBIDDEN)
        if bad:
            self.on = False
            self.seen.append(f"{event} {arguments!r:.200}")
            self.on = True
            raise PermissionError(f"{event} while a file is read")

    @contextmanager
    def watching(self) -> Any:
        self.on = self.armed
        try:
            yield
        finally:
            self.on = False

    def check(self) -> None:
        seen, left = list(self.seen), list(marks.MARKS)
        self.seen.clear()
        marks.MARKS.clear()
        if seen or left or os.path.exists("fuzz_mark"):
            with_mark = ["the file fuzz_mark"] if os.path.exists("fuzz_mark") else []
            raise FindingError(f"ran something: {[*seen, *left, *with_mark]}")


def _memory(field: str) -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) << 10
    raise AssertionError(field)


def _forget_the_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _out_of_memory(error: BaseException | None) -> bool:
    """Say whether an error comes from one that more memory was asked for than is allowed."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


# ------------------------------------------------------------------------------------------------
# Values


def raw_bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).tolist())


def check_same(what: str, got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    if set(got) != set(wanted):
        raise FindingError(f"{what}: names {sorted(got)}, and not {sorted(wanted)}")
    for name, tensor in got.items():
        other = wanted[name]
        if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
            raise FindingError(f"{what}: {name}: {tensor.dtype} {tensor.shape}, and not {other!r}")
        if raw_bytes(tensor) != raw_bytes(other):
            raise FindingError(f"{what}: {name}: {tensor!r}, and not {other!r}")


def plain(value: Any, depth: int = 0) -> Any:
    """Return what of a value beside weights can be compared: numbers and text in containers."""
    if depth > 20:
        return ""
    if isinstance(value, dict):
        # Past methods that a file may have put in place of the dict's own.
        return {repr(k): plain(v, depth + 1) for k, v in dict.items(value)}
    if type(value) in (list, tuple):
        return [plain(part, depth + 1) for part in value]
    return repr(value) if type(value) in (int, float, str, bool, complex) else ""


def check_beside(got: Mapping[str, Any], wanted: Any, container: str) -> None:
    """Compare what stands beside the weights, on the levels above them."""
    if not isinstance(wanted, dict) or container == "bare":
        return
    for name in container.split("."):
        for key, value in dict.items(wanted):
            if key == name or not isinstance(key, str) or key not in got:
                continue
            if _differ(plain(got[key]), plain(value)):
                raise FindingError(f"beside the weights: {key}: {got[key]!r}, and not {value!r}")
        wanted = wanted[name]


def _differ(got: Any, wanted: Any) -> bool:
    if "" in (got, wanted):  # an object that is not loaded
        return False
    if isinstance(got, dict) and isinstance(wanted, dict):
        return any(_differ(value, wanted.get(key, "")) for key, value in got.items())
    if isinstance(got, list) and isinstance(wanted, list):
        return len(got) != len(wanted) or any(map(_differ, got, wanted))
    return bool(got != wanted)


class Part(nn.Module):
    """A network that has just the names and shapes of a state dict."""


def model_of(state: Mapping[str, Tensor]) -> nn.Module:
    model = Part()
    for name, tensor in state.items():
        *outer, last = name.split(".")
        module: nn.Module = model
        for part in outer:
            if part not in module._modules:
                module.add_module(part, Part())
            module = module._modules[part]  # type: ignore[assignment]
        filled = torch.zeros(tensor.shape, dtype=tensor.dtype)
        # Past the checks: names such as 'half' are also a module's methods.
        if tensor.dtype.is_floating_point:
            module._parameters[last] = nn.Parameter(filled)
        else:
            module._buffers[last] = filled
    return model


# ------------------------------------------------------------------------------------------------
# One file


class Reader:
    """Read files of each family as the package does, and compare.

    Attributes:
        kinds: whole ones.
    """

    def __init__(self) -> None:
        import copyreg

        copyreg.add_extension("fuzzing.marks", "Mark", 1)
        self.kinds = whole_kinds()
        self._slab = torch.zeros(_SLAB, dtype=torch.uint8)
        self._models: dict[str, nn.Module] = {}
        self._rows: dict[str, Any] = {}
        self.watch = Watch()

    def learn(self, folder: Path) -> None:
        """Read all whole files, which also imports what reading needs."""
        for number, (name, kind) in enumerate(self.kinds.items()):
            path = folder / f"whole{number}"
            write_files(path, kind.files)
            outcome = self.read(name, path, whole=True)
            if (outcome == "refused") != kind.refused:
                raise FindingError(f"{name}: whole files: {outcome}")
        for codec in ("unicode_escape", "raw_unicode_escape"):  # that Python imports when used
            b"a".decode(codec)
        self.watch.armed = True

    def read(self, name: str, folder: Path, whole: bool = False) -> str:
        """Return how reading ended: 'refused', 'read', or 'read in part'.

        Raises:
            FindingError: not as it should.
        """
        kind = self.kinds[name]
        path = folder / kind.entry if kind.entry else folder
        self.watch.seen.clear()
        _forget_the_peak()
        before, began = _memory("VmRSS"), time.process_time()
        family: Callable[..., tuple[Any, Callable[[], str]]] = getattr(self, f"_{kind.family}")
        found, compare = family(name, path, whole)
        took = time.process_time() - began
        if took > MOST_SECONDS and not whole:
            raise FindingError(f"took {took:.1f} s")
        if _memory("VmHWM") - before > MOST_BYTES:
            raise FindingError(f"took {(_memory('VmHWM') - before) >> 20} MB")
        if not whole:
            self.watch.check()
        return "refused" if found is None else compare()

    def _tried(
        self, what: str, errors: tuple[type[BaseException], ...], call: Callable[[], Any]
    ) -> tuple[Any, BaseException | None]:
        """Return what a call returns, or the error by which it is to refuse a file."""
        try:
            with self.watch.watching(), redirect_stderr(io.StringIO()):
                return call(), None
        except errors as error:
            if _out_of_memory(error):
                raise FindingError(f"{what} asked for more memory than {MOST_BYTES}") from error
            if not str(error):
                raise FindingError(f"{what} refuses without a word") from error
            return None, error
        except Exception as error:
            text = "".join(traceback.format_exception(error)[-12:])
            raise FindingError(f"{what} ends with {type(error).__name__}:\n{text}") from error

    # -- weights and programs

    def _weights(self, name: str, path: Path, whole: bool) -> tuple[Any, Callable[[], str]]:
        refusals = (CheckpointError,)
        got, error = self._tried("load_checkpoint", refusals, lambda: load_checkpoint(path))
        slab, again = self._tried("read_into", refusals, lambda: read_into(path, self._slab))
        if type(error) is not type(again):
            raise FindingError(f"load_checkpoint: {error!r}; read_into: {again!r}")
        if path.is_file():
            self._tried("program_kind", refusals, lambda: program_kind(path))
        network, _ = self._tried("load_packaged", refusals, lambda: load_packaged(path))
        if network is not None:
            raise FindingError("load_packaged opened it without trust")
        applied = model = None
        if got is not None:
            if whole:
                self._models[name] = model_of(got.state_dict)
            # A foreign file may have come in the place of one that is refused.
            like = self._models[name].state_dict() if name in self._models else got.state_dict
            model = model_of(like)
            applied, _ = self._tried(
                "load_into", (StateDictMismatch,), lambda: load_into(model, got)
            )

        def compare() -> str:
            return self._compare(path, got, slab, model if applied is not None else None, model)

        return got, compare

    def _compare(
        self, path: Path, got: Any, slab: Any, applied: nn.Module | None, model: Any
    ) -> str:
        outcome = "read"
        front = got.removed_prefix
        ours = {front + key: tensor for key, tensor in got.state_dict.items()}
        check_same("read_into", slab.tensors(self._slab), got.state_dict)
        if slab.notes != got.notes or repr(slab.extra.keys()) != repr(got.extra.keys()):
            raise FindingError("read_into and load_checkpoint disagree beside the weights")
        content: Any
        if got.format == "distributed":
            last = got.container.rpartition(".")[2]
            content = wanted = oracles.distributed_content(path, last)
        elif got.format.endswith("-sharded"):
            index = path if path.is_file() else next(path.glob("*.index.json"))
            content = wanted = oracles.sharded_content(index)
        else:
            if path.is_dir():
                names = ("model.safetensors", "pytorch_model.bin")
                path = next(path / name for name in names if (path / name).exists())
            data = path.read_bytes()
            if got.format == "safetensors":
                content = wanted = oracles.safetensors_content(data)
            else:
                content = oracles.torch_content(data)
                if content is None and any("not loaded beside" in note for note in got.notes):
                    # A leniency: what torch does not know is left out where it is not a weight.
                    content, outcome = oracles.stubbed_content(data), "read in part"
                elif content is None and oracles.has_other_instructions(data):
                    # A leniency: torch's reader follows protocol 2 only, and torch writes them all.
                    content = oracles.stubbed_content(data)
                wanted = oracles.tensors_of(oracles.at_key(content, got.container))
        if (trainer := path.parent / "trainer_state.json").exists() and isinstance(content, dict):
            said = json.loads(trainer.read_bytes())
            content = content | {k: said[k] for k in ("global_step", "epoch") if k in said}
        if wanted is None:
            raise FindingError("read although the format's own library refuses it")
        check_same("load_checkpoint", ours, wanted)
        if got.format.startswith("torch-"):
            check_beside(got.extra, content, got.container)
        if applied is not None:
            self._compare_applied(applied, {k.removeprefix(front): v for k, v in wanted.items()})
        elif any(bool(tensor.to(torch.float32).any()) for tensor in model.state_dict().values()):
            raise FindingError("load_into changed a model that it refused")
        return outcome

    def _compare_applied(self, applied: nn.Module, wanted: dict[str, Tensor]) -> None:
        other = model_of(applied.state_dict())
        try:
            other.load_state_dict(wanted)
        except Exception as error:
            raise FindingError(f"load_into took what load_state_dict refuses: {error}") from error
        check_same("load_into", applied.state_dict(), other.state_dict())

    def _program(self, name: str, path: Path, whole: bool) -> tuple[Any, Callable[[], str]]:
        return self._weights(name, path, whole)

    # -- a scan's other files

    def _manifest(self, name: str, path: Path, whole: bool) -> tuple[Any, Callable[[], str]]:
        from fadiag_fast.scanning import read_manifest
        from fadiag_fast.scanning.run_names import SeriesError

        got, error = self._tried(
            "read_manifest", (SeriesError, OSError), lambda: read_manifest(path)
        )
        if isinstance(error, SeriesError) and str(path) not in str(error):
            raise FindingError(f"read_manifest does not name the file: {error}")

        def compare() -> str:
            wanted = sorted(
                _cells_text({**row, "path": path.parent / row["path"]}) for row in _rows_of(path)
            )
            ours = sorted(
                _cells_text(
                    {
                        "path": e.path,
                        "step": e.step,
                        "accuracy": e.accuracy,
                    }
                )
                for e in got
            )
            if ours != wanted:
                raise FindingError(f"read_manifest: {ours}, and not {wanted}")
            return "read"

        return got, compare

    def _steps(self, name: str, path: Path, whole: bool) -> tuple[Any, Callable[[], str]]:
        from fadiag_fast.training.sinks import read_jsonlines
        from fadiag_fast.training.watch import Tail, scan_result_of, view

        refusals = (ValueError, OSError)

        def watched() -> list[str]:
            tail = Tail(path)
            tail.read()
            return [line.text for line in view(tail)]

        def rows() -> list[Any]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of lines that could not be read
                found: list[Any] = scan_result_of([path]).rows
                return found

        got, error = self._tried("read_jsonlines", refusals, lambda: read_jsonlines(path))
        self._tried("watch", refusals, watched)
        self._tried("scan_result_of", refusals, rows)
        if error is not None and str(path) not in str(error):
            raise FindingError(f"read_jsonlines does not name the file: {error}")

        def compare() -> str:
            held = set()
            for line in path.read_bytes().split(b"\n"):
                try:
                    held.add(_figures(json.loads(line)))
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue
            for record in got.records:
                if _figures(json.loads(record.to_json())) not in held:
                    raise FindingError(f"read_jsonlines: {record} is in no line")
            return "read"

        return got, compare

    def _tables(self, name: str, path: Path, whole: bool) -> tuple[Any, Callable[[], str]]:
        from fadiag_fast.scanning import ScanResult
        from fadiag_fast.scanning.errors import ResultsError

        def rows() -> list[Any]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of tables without a checksum
                found = ScanResult.load(path)
                layers: list[Any] = found.to_arrow("layers").to_pylist()
                return [*found.rows, *layers]

        got, _ = self._tried("ScanResult.load", (ResultsError,), rows)
        if whole:
            self._rows[name] = list(map(repr, got or []))

        def compare() -> str:
            known = set(self._rows[name])
            for row in map(repr, got):
                if row not in known:
                    raise FindingError(f"ScanResult.load: {row} was never written")
            return "read"

        return got, compare


def _figures(values: Any) -> str:
    names = ("step", "hidden_norms", "grad_norms", "credit_gains", "output_grad_norm")
    return repr([_number(values[name]) for name in names])


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return list(map(_number, value))
    return repr(float("nan") if value is None else float(value))


def _cells_text(cells: Mapping[str, Any]) -> str:
    def number(value: Any) -> str:
        # A step of -0.0 is step 0.
        return "" if value in (None, "") or value != value else repr(float(value) + 0.0)

    path = os.path.normpath(str(cells["path"]))
    return repr((path, number(cells.get("step")), number(cells.get("accuracy"))))


def _rows_of(path: Path) -> Iterable[Mapping[str, Any]]:
    """Return a manifest's rows as its format's own library reads them."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        found: list[Any] = pq.read_table(path).to_pylist()
        return found
    if path.suffix == ".toml":
        import tomllib

        rows: list[Any] = tomllib.loads(path.read_text("utf-8-sig"))["checkpoint"]
        return rows
    import pandas

    frame = pandas.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True)
    frame.columns = [name.strip() for name in frame.columns]
    return [{k: v.strip() for k, v in row.items()} for row in frame.to_dict("records")]


# ------------------------------------------------------------------------------------------------
# Many files


def write_files(folder: Path, files: _Content) -> None:
    """Write files into a new folder; some are no files but what may stand in one's place."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(data, bytes):
            path.write_bytes(data)
        elif data == FIFO:
            os.mkfifo(path)
        elif data == FOLDER:
            path.mkdir()
        elif data == LOOP:
            path.symlink_to(path.name)
        elif data == DEVICE:
            path.symlink_to("/dev/zero")
        elif data == EMPTY:
            path.touch()
    folder.mkdir(exist_ok=True)


def made(kinds: Mapping[str, Kind], seed: int, number: int) -> tuple[str, str, _Content]:
    """Return the kind, the damage and the files of one number: the same each time."""
    rng = random.Random(f"{seed} {number}")
    names = sorted(kinds)
    # All kinds in turn, so that each has its share of however few.
    name = (
        names[(number * 7 + seed) % len(names)]
        if math.gcd(7, len(names)) == 1
        else (names[(number + seed) % len(names)])
    )
    kind = kinds[name]
    if rng.random() < 0.35 and (hostile := hostile_files(kind, rng)) is not None:
        return name, hostile[0], hostile[1]
    others = [kinds[other].files for other in names if other != name]
    how, files = damaged_files(kind.files, others, rng)
    return name, how, files


def main(seed: int, numbers: list[int], keep: Path | None, out: TextIO) -> None:
    """Make and read files, and write a line of JSON before and after each."""

    def say(**what: Any) -> None:
        out.write(json.dumps(what) + "\n")
        out.flush()

    warnings.simplefilter("ignore")  # torch's, on pickles of other protocols
    torch.set_num_threads(1)
    faulthandler.enable()
    folder = Path(tempfile.mkdtemp()) if keep is None else keep.absolute()
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    try:
        say(kind="all", how="whole files", number=-1)
        reader = Reader()
        reader.learn(folder)
        say(outcome="read")
        # Of a forbidden amount not more is taken than this, whatever a file asks for.
        most = _memory("VmSize") + MOST_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for first in range(0, len(numbers), _BATCH):
            batch = [(n, *made(reader.kinds, seed, n)) for n in numbers[first : first + _BATCH]]
            for number, _, _, files in batch:
                write_files(folder / str(number), files)
            for number, name, how, _ in batch:
                say(kind=name, how=how, number=number)
                try:
                    say(outcome=reader.read(name, folder / str(number)))
                except FindingError as error:
                    say(outcome="wrong", what=str(error))
                if keep is None:
                    shutil.rmtree(folder / str(number))
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
