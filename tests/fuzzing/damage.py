"""Ways to damage files: each makes other bytes of a whole file's, with a random generator."""

from __future__ import annotations

import io
import random
import re
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from .files import with_members

Mutation = Callable[[bytes, random.Random], bytes]

# Random bytes that mean something to zip files and pickles.
_TOKENS = (
    *(
        b"PK\1\2",
        b"PK\3\4",
        b"PK\5\6",
        b"PK\6\6",
        b"PK\6\7",
        b"\xff\xff\xff\xff",
        bytes(4),
        bytes(8),
    ),
    *(b"K\x00", b"K\xff", b"M\xff\xff", b"J\xff\xff\xff\xff", b"r\xff\xff\xff\x0a", b"\x85", b"R"),
    *(b"cos\nsystem\n", b"c__builtin__\nset\n", b"ctorch\nBoolStorage\n", b"data/1", b"DATA/0"),
    *(
        b"\x88",
        b"\x89",
        b"(",
        b"t",
        b"Q",
        b")",
        b".",
        b"h\x00",
        b"q\x00",
        b"\x8a\x08",
        b"ctorch\nbits8\n",
    ),
)


def flip_bits(whole: bytes, rng: random.Random) -> bytes:
    """Flip one to three bits anywhere."""
    data = bytearray(whole)
    for _ in range(rng.randint(1, 3)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def damage_the_pickle(whole: bytes, rng: random.Random) -> bytes:
    """Change, insert or remove bytes of the pickle, the member's sizes being made right again."""
    if not whole.startswith(b"PK"):
        at = rng.randrange(min(len(whole), 2000))
        return whole[:at] + rng.choice(_TOKENS) + whole[at + rng.randint(0, 4) :]

    def change(pickle: bytes) -> bytes:
        for _ in range(rng.randint(1, 2)):
            at = rng.randrange(len(pickle))
            new = rng.choice((*_TOKENS, rng.randbytes(1), rng.randbytes(1), b""))
            pickle = pickle[:at] + new + pickle[at + rng.choice((0, 1, len(new))) :]
        return pickle

    return with_members(whole, lambda name, data: (name, change(data) if is_pickle(name) else data))


def damage_the_structure(whole: bytes, rng: random.Random) -> bytes:
    """Write over bytes at the end, where a zip file's directory is."""
    data = bytearray(whole)
    at = rng.randrange(max(0, len(data) - 1200), len(data))
    token = rng.choice((*_TOKENS, struct.pack("<L", rng.randrange(len(data)))))
    data[at : at + len(token)] = token
    return bytes(data)


def cut(whole: bytes, rng: random.Random) -> bytes:
    """Leave out a piece: the end, the beginning, or from the middle."""
    a, b = sorted((rng.randrange(len(whole) + 1), rng.randrange(len(whole) + 1)))
    return rng.choice((whole[:b], whole[a:], whole[:a] + whole[b:]))


def double(whole: bytes, rng: random.Random) -> bytes:
    """Put something before, behind or in a file."""
    at = rng.choice((0, len(whole), rng.randrange(len(whole))))
    new = rng.choice((whole, rng.randbytes(30), bytes(64), whole[-120:], whole[:60]))
    return whole[:at] + new + whole[at:]


def swap_members(whole: bytes, rng: random.Random) -> bytes:
    """Rename members of a zip file to each other's names, leave some out or write them twice."""
    if not whole.startswith(b"PK"):
        return flip_bits(whole, rng)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        names = archive.namelist()
    new = dict(zip(names, rng.sample(names, len(names)), strict=True))
    chosen = set(rng.sample(names, 2))

    def change(name: str, data: bytes) -> Any:
        if name not in chosen:
            return name, data
        return rng.choice(((new[name], data), (name.upper(), data), (name, data[:-1]), None))

    return with_members(whole, change)


def is_pickle(name: str) -> bool:
    return name.endswith(".pkl")


# Numbers and names that a text should not hold where a count or a file's name is looked for.
_NUMBERS = (
    *("0", "-1", "1", "1e400", "-0.0", "NaN", "Infinity", "true", "null", "[]", "{}", '"3"'),
    *(str(2**31), str(2**32), str(2**62), str(2**63), str(2**64), "9" * 5000, "1.5", "0x10"),
)
_NAMES = ("", ".", "..", "../a.pt", "/dev/zero", "a/b", "a\\u0000b", "\\ud800", "größe", "C:x")
_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
_TEXT = re.compile(rb'"[^"\n]{0,200}"')


def change_the_text(whole: bytes, rng: random.Random) -> bytes:
    """Put other numbers, names or brackets into a text."""
    for _ in range(rng.randint(1, 2)):
        pattern = rng.choice((_NUMBER, _NUMBER, _TEXT))
        found = list(pattern.finditer(whole))
        if not found or rng.random() < 0.15:
            at = rng.randrange(len(whole) + 1)
            new = rng.choice(
                (b"[" * 3000, b'{"a":' * 3000, b"\xff", b"\0", b"\n", b",", b'"', b"=", b"}", b"]")
            )
            whole = whole[:at] + new + whole[at:]
            continue
        match = rng.choice(found)
        if pattern is _NUMBER:
            new = rng.choice((rng.choice(_NUMBERS).encode(), rng.choice(found)[0]))
        else:
            name = b'"' + rng.choice(_NAMES).encode() + b'"'
            new = rng.choice((rng.choice(found)[0], rng.choice(found)[0], name))
        whole = whole[: match.start()] + new + whole[match.end() :]
    return whole


def change_the_header(whole: bytes, rng: random.Random) -> bytes:
    """Change a safetensors file's header, its length being made right again."""
    length = int.from_bytes(whole[:8], "little")
    header = change_the_text(whole[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + whole[8 + length :]


def change_the_values(whole: bytes, rng: random.Random) -> bytes:
    """Flip bits of one member of a zip file, or behind a header, so that the file stays whole."""
    if not whole.startswith(b"PK"):
        first = 8 + int.from_bytes(whole[:8], "little") if whole[8:9] == b"{" else len(whole) // 2
        return whole[:first] + (flip_bits(whole[first:], rng) if whole[first:] else b"")
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        names = [info.filename for info in archive.infolist() if info.file_size]
    chosen = rng.choice([name for name in names if "/data/" in name] or names)
    return with_members(
        whole, lambda name, data: (name, flip_bits(data, rng) if name == chosen else data)
    )


_OF_BYTES: tuple[Mutation, ...] = (
    *(flip_bits, flip_bits, cut, double, damage_the_structure),
    *(change_the_values, change_the_values),
)
_OF_TEXTS: tuple[Mutation, ...] = (change_the_text, change_the_text, change_the_text)
_OF_PICKLES: tuple[Mutation, ...] = (damage_the_pickle, damage_the_pickle, damage_the_pickle)


def mutations_of(name: str, whole: bytes) -> tuple[Mutation, ...]:
    """Return what may be done to a file."""
    if name.endswith((".json", ".jsonl", ".csv", ".toml")):
        return _OF_BYTES + _OF_TEXTS
    if whole[8:9] == b"{":
        return (*_OF_BYTES, change_the_header, change_the_header, change_the_header)
    if whole.startswith(b"PK"):
        return (*_OF_BYTES, *_OF_PICKLES, swap_members, swap_members)
    if name.endswith((".parquet", ".arrow")):
        return _OF_BYTES
    return _OF_BYTES + _OF_PICKLES


# What stands in a file's place instead of bytes.
FIFO, FOLDER, LOOP, DEVICE, EMPTY = "a FIFO", "a folder", "a loop", "a device", "an empty file"


def damaged_files(
    files: dict[str, bytes], others: list[dict[str, bytes]], rng: random.Random
) -> tuple[str, dict[str, bytes | str]]:
    """Damage one of some files, or what files there are; say how.

    Args:
        files: whole ones.
        others: of other kinds, one of which may come in a file's place.
        rng: draws.
    """
    made: dict[str, bytes | str] = dict(files)
    names = sorted(name for name in files if files[name])
    name = rng.choice(names)
    if rng.random() < (0.05 if len(names) == 1 else 0.2):
        how = rng.choice(("special", "special", "gone", "swapped", "foreign"))
        if how == "special":
            made[name] = rng.choice((FIFO, FOLDER, LOOP, DEVICE, EMPTY))
            return f"{name} is {made[name]}", made
        if how == "gone":
            del made[name]
        elif how == "swapped":
            other = rng.choice(names)
            made[name], made[other] = files[other], files[name]
        else:
            made[name] = rng.choice(sorted(rng.choice(others).values()))
        return f"{name} is {how}", made
    mutation = rng.choice(mutations_of(name, files[name]))
    made[name] = mutation(files[name], rng)
    return f"{mutation.__name__} of {name}", made
