"""Whole files of every format that the package reads or refuses."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import tempfile
import warnings
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

Family = Literal["weights", "program", "manifest", "steps", "tables"]

# What lies before the piece of a tensor in a rank's file.
AHEAD = b"other"


@dataclass(frozen=True)
class Kind:
    """Files that belong together.

    Attributes:
        family: by what they are read.
        files: bytes by name.
        entry: which of them is opened; '' for their folder.
        refused: whether even whole ones are refused, as pickles of modules are.
    """

    family: Family
    files: dict[str, bytes]
    entry: str = ""
    refused: bool = False


def network() -> nn.Module:
    """Return a network whose modules look at the versions in a state dict."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
    return net.eval()


def contents() -> dict[str, Any]:
    """Return objects that torch.save writes and torch.load(weights_only=True) reads."""
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    state = OrderedDict(
        weight=torch.randn(3, 5),
        half=torch.randn(7).half(),
        brain=torch.randn(2, 2).bfloat16(),
        count=torch.tensor(3),
        mask=torch.tensor([True, False]),
        empty=torch.zeros(0, 4),
        small=torch.ones(3).to(torch.float8_e5m2),
        unsigned=torch.arange(3).to(torch.uint16),
        turned=base.t(),
        shared=base[1:],
        tied=base[1:],
        expanded=torch.randn(3, 1).expand(3, 4),
        parameter=nn.Parameter(torch.randn(2)),
    )
    state._metadata = OrderedDict({"": {"version": 2}})  # type: ignore[attr-defined]
    plain = {"epoch": 3, "losses": [0.5, 0.25, 1e-9], "name": "größe", "big": 2**40, "none": None}
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    ddp = OrderedDict((f"module.{name}", value) for name, value in model.state_dict().items())
    return {
        "bare": dict(state),
        "model": {"model": state, **plain},
        "optimizer": {
            **plain,
            "state_dict": model.state_dict(),
            "optimizer": optimizer.state_dict(),
        },
        "nested": {
            "state": {"model": ddp, "optimizer": optimizer.state_dict()},
            "config": {"a": 1},
        },
        "odd": {
            "model": {"w": torch.ones(3)},
            "seen": {1, 2},
            "raw": b"\x00\xff",
            "counts": Counter("aab"),
            "size": torch.Size([1, 2]),
            "dtype": torch.float16,
            "device": torch.device("cpu"),
            "complex": 1 + 2j,
            "sparse": torch.eye(2).to_sparse(),
        },
    }


def contents_beside() -> dict[str, Any]:
    """Return contents of which torch.load(weights_only=True) refuses what is beside the weights."""
    model = network()
    args = argparse.Namespace(lr=0.1, out=Path("runs"), steps=[1, 2])
    return {
        "args": {"model": model.state_dict(), "args": args, "epoch": 2},
        "values": {
            "state_dict": model.state_dict(),
            "best": torch.tensor(0.5).numpy()[()],
            "array": torch.arange(3).numpy(),
            "history": defaultdict(list, loss=[0.5, 0.25]),
            "epoch": 4,
        },
    }


def old_dtypes(content: dict[str, Any]) -> dict[str, Any]:
    """Leave out what has a dtype for which there is no storage class."""
    return {
        key: old_dtypes(value) if type(value) is dict or key == "model" else value
        for key, value in content.items()
        if not isinstance(value, Tensor) or value.dtype not in (torch.uint16, torch.float8_e5m2)
    }


def saved(content: Any, zipped: bool = True, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def repacked(whole: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    """Write a zip file's members anew with Python's zipfile."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(buffer, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return buffer.getvalue()


def with_members(whole: bytes, change: Callable[[str, bytes], Any]) -> bytes:
    """Write a zip file anew with other members; None leaves one out."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            made = change(info.filename, old.read(info))
            if made is not None:
                new.writestr(zipfile.ZipInfo(made[0]), made[1])
    return buffer.getvalue()


def in_folder(write: Callable[[Path], object]) -> dict[str, bytes]:
    """Return the files that a function writes into a folder, by their names in it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }


def _torch_files() -> dict[str, Kind]:
    found = {}
    for name, content in contents().items():
        for form, zipped in (("zip", True), ("legacy", False)):
            if not zipped and name in ("bare", "model"):
                # torch does not read tensors of newer dtypes that it wrote in this format.
                content = old_dtypes(content)
            found[f"{form} {name}"] = Kind("weights", {"a.pt": saved(content, zipped)}, "a.pt")
    for name, content in contents_beside().items():
        for form, zipped in (("zip", True), ("legacy", False)):
            found[f"{form} with {name}"] = Kind("weights", {"a.pt": saved(content, zipped)}, "a.pt")
    # Containers of every kind. A tensor that only torch makes is one more case, and is not weights.
    content = (
        contents()["odd"] | contents()["optimizer"] | {"few": frozenset({1}), "b": bytearray(b"b")}
    )
    for form, zipped in (("zip", True), ("legacy", False)):
        for protocol in (0, 1, 3, 4, 5):
            found[f"{form} of protocol {protocol}"] = Kind(
                "weights", {"a.pt": saved(content, zipped, protocol)}, "a.pt"
            )
    model = found["zip model"].files["a.pt"]
    other_order = with_members(
        model, lambda name, data: (name, b"big" if name.endswith("byteorder") else data)
    )
    for name, data in {
        "zip by zipfile": repacked(model),
        "zip packed": repacked(model, zipfile.ZIP_DEFLATED),
        "zip big-endian": other_order,
    }.items():
        found[name] = Kind("weights", {"a.pt": data}, "a.pt")
    for form, zipped in (("zip", True), ("legacy", False)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[f"{form} module"] = Kind(
                "weights", {"a.pt": saved(network(), zipped)}, "a.pt", refused=True
            )
    return found


def _pickles() -> dict[str, Kind]:
    content = contents()["odd"] | {"model": {"w": [0.5, 1.5]}, "sparse": None}
    return {
        f"pickle of protocol {protocol}": Kind(
            "weights", {"a.pkl": pickle.dumps(content, protocol)}, "a.pkl", refused=True
        )
        for protocol in range(6)
    }


def _folders() -> dict[str, Kind]:
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import save

    torch.manual_seed(2)
    state = {
        "embed.weight": torch.randn(4, 3),
        "blocks.0.weight": torch.randn(3, 3).bfloat16(),
        "blocks.0.bias": torch.zeros(3),
        "blocks.1.scale": torch.tensor(2.0),
        "empty": torch.zeros(0, 2),
        "ids": torch.arange(5),
    }
    flat = {"a.safetensors": save(state | {"e": torch.ones(3).to(torch.float8_e4m3fn)})}
    described = {"a.bin": save(state, {"format": "pt", "note": "größe"})}
    found = {
        "safetensors bare": Kind("weights", flat, "a.safetensors"),
        "safetensors with metadata": Kind("weights", described, "a.bin"),
    }
    trainer = json.dumps({"global_step": 30, "epoch": 1.5, "log_history": [{"loss": 0.5}]}).encode()
    for form, stem, end in (
        ("safetensors", "model", "safetensors"),
        ("torch", "pytorch_model", "bin"),
    ):
        files, weight_map = {}, {}
        for i in range(2):
            name = f"{stem}-{i + 1:05}-of-00002.{end}"
            part = dict(list(state.items())[i::2])
            files[name] = save(part) if form == "safetensors" else saved(part)
            weight_map |= dict.fromkeys(part, name)
        index = f"{stem}.{end}.index.json"
        text = json.dumps({"metadata": {"total_size": 99}, "weight_map": weight_map}, indent=1)
        files[index] = text.encode()
        found[f"sharded {form}"] = Kind("weights", files, index)
        found[f"sharded {form} of a trainer"] = Kind(
            "weights", {**files, "trainer_state.json": trainer}
        )
        whole = {f"{stem}.{end}": save(state) if form == "safetensors" else saved(state)}
        found[f"trainer {form}"] = Kind("weights", {**whole, "trainer_state.json": trainer})

    def quietly(content: dict[str, Any]) -> dict[str, bytes]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of running without a process group
            return in_folder(lambda p: dcp.save(content, checkpoint_id=p, no_dist=True))

    content = contents()["optimizer"]
    found["distributed bare"] = Kind("weights", quietly(dict(state)))
    found["distributed model"] = Kind(
        "weights", quietly({"model": content["state_dict"], "optimizer": content["optimizer"]})
    )
    found["distributed pieces"] = Kind("weights", _of_two_ranks(quietly))
    return found


def _of_two_ranks(save: Callable[[dict[str, Any]], dict[str, bytes]]) -> dict[str, bytes]:
    """Return what two ranks would have written: rows 0 to 3 and 4 to 5, in a file each."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    whole = torch.arange(24.0).reshape(6, 4)
    files = save({"w": whole})
    metadata = pickle.loads(files[".metadata"])
    metadata.storage_data.clear()
    chunks = metadata.state_dict_metadata["w"].chunks
    chunks.clear()
    for rank, (start, stop) in enumerate([(0, 4), (4, 6)]):
        data, offset = saved(whole[start:stop].clone()), torch.Size([start, 0])
        name = f"__{rank}_0.distcp"
        files[name] = AHEAD + data
        chunks.append(ChunkStorageMetadata(offset, torch.Size([stop - start, 4])))
        metadata.storage_data[MetadataIndex("w", offset)] = _StorageInfo(
            name, len(AHEAD), len(data)
        )
    return files | {".metadata": pickle.dumps(metadata)}


def _programs() -> dict[str, Kind]:
    net, example = network(), (torch.ones(2, 3),)
    script, exported = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(net, example), script)
        torch.export.save(torch.export.export(net, example), exported)
        packaged = io.BytesIO()
        with torch.package.PackageExporter(packaged) as exporter:
            exporter.save_source_string("hostile", "import os\nos.system('touch fuzz_mark')\n")
            exporter.save_pickle("weights", "data.pkl", {"w": torch.ones(2)})
    # Before torch 2.8 all members lay at the top.
    old = repacked_flat(exported.getvalue())
    compiled = with_members(
        exported.getvalue(),
        lambda name, data: (name.replace("/models/", "/data/aotinductor/model/"), data),
    )
    return {
        name: Kind("program", {"a.pt2": data}, "a.pt2", refused=True)
        for name, data in {
            "program of TorchScript": script.getvalue(),
            "program exported": exported.getvalue(),
            "program exported without a folder": old,
            "program compiled": compiled,
            "program of torch.package": packaged.getvalue(),
        }.items()
    }


def repacked_flat(whole: bytes) -> bytes:
    return with_members(whole, lambda name, data: (name.partition("/")[2] or name, data))


def manifest_rows() -> list[dict[str, Any]]:
    return [
        {"path": f"runs/{run}/{step}.pt", "run": run, "step": step, "accuracy": 0.5 + step / 100}
        for run in ("bp", "dfa")
        for step in (0, 10, 20)
    ]


def _manifests() -> dict[str, Kind]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = manifest_rows()
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), table, write_page_checksum=True)
    toml = "".join(
        "[[checkpoint]]\n" + "".join(f"{name} = {json.dumps(v)}\n" for name, v in row.items())
        for row in rows
    )
    lines = [json.dumps(row) for row in rows]
    made = {
        "csv": "path,run,step,accuracy\n"
        + "".join(",".join(map(str, row.values())) + "\n" for row in rows),
        "toml": toml + "[runs.bp]\nseed = 3\n",
        # Refused by their names.
        "json": "[" + ",\n".join(lines) + "]",
        "jsonl": "\n".join(lines) + "\n",
    }
    found = {
        f"manifest in {end}": Kind(
            "manifest", {f"m.{end}": text.encode()}, f"m.{end}", refused=end.startswith("json")
        )
        for end, text in made.items()
    }
    found["manifest in parquet"] = Kind("manifest", {"m.parquet": table.getvalue()}, "m.parquet")
    return found


def _steps() -> dict[str, Kind]:
    from written import step_records

    name = "steps.jsonl"
    return {"step records": Kind("steps", in_folder(lambda at: step_records(at / name)), name)}


def _tables() -> dict[str, Kind]:
    from written import finished_scan, stopped_scan

    return {
        "scan's tables": Kind("tables", in_folder(lambda at: finished_scan(at, 6))),
        "scan's parts": Kind("tables", in_folder(lambda at: stopped_scan(at, 6, flush_rows=3))),
    }


def whole_kinds() -> dict[str, Kind]:
    """Return whole files of every kind, by its name."""
    return {
        **_torch_files(),
        **_pickles(),
        **_folders(),
        **_programs(),
        **_manifests(),
        **_steps(),
        **_tables(),
    }
