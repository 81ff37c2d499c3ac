"""Find the tensors of a torch.save zip file where they lie, without unpacking or loading it.

What torch.save writes is narrow: members that are not compressed, in one folder, one behind the
other, with one directory of them at the end. Only that is read here. Where a file could be read in
two ways (names twice or apart only in case, members in each other's bytes, two directories, bytes
before or behind the archive, a storage of another size than its member) it is refused: what is
measured must be what every other program reads. Compressed members are unpacked first, and what
has the other byte order is left to torch.
"""

from __future__ import annotations

import io
import struct
import sys
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .errors import brief, listed, printable
from .lookalikes import PROGRAMS, SAVE_WEIGHTS, program_in_zip
from .opening import MemorySource, Source, SourceStream
from .restricted_pickle import MOST_BYTES, PickleError, read_pickle
from .torch_pickle import find_storages, follow_tensors, offered

Read = Callable[[int, int], bytes]

_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_END_64_PLACE = struct.Struct("<4sLQL")
_MEMBER = struct.Struct("<4s6H3L5H2L")
_HEADER = struct.Struct("<4s5H3L2H")

_MOST_DIRECTORY = 1 << 28
# Two bits that say how well it was compressed, one that sizes come behind, one of the name.
_FLAGS = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 11
_SIZES_BEHIND = 1 << 3
_IS_FOLDER = 1 << 4
# What follows a member whose sizes come behind.
_MOST_BEHIND = 24
_FULL = 0xFFFFFFFF
_DEFLATED = 8

# A member may be packed to an eighth of what it claims, as torch allocates that.
_MOST_PACKED = 8
_FREE_PACKED = 1 << 26


class ZipError(Exception):
    """Say why a zip file is not read."""


class Member(NamedTuple):
    """Say where a member's bytes lie in the file."""

    start: int
    size: int


class Archive(NamedTuple):
    """Say what a zip file holds.

    Attributes:
        members: by their names without the archive's folder; none if there are several.
        names: all names, whole.
        packed: whether members are compressed.
        foreign: what it is that is not torch.save's, '' if it is.
    """

    members: dict[bytes, Member]
    names: list[bytes]
    packed: bool
    foreign: str


class _Known(NamedTuple):
    """Know an archive again by all bytes of its directory and of its members' headers.

    But for dates and checksums, which say nothing of where members lie, and the folder's name,
    which is the file's own. A scan's files are alike in everything else.
    """

    archive: Archive
    spans: list[slice]
    folders: list[slice]
    mask: int
    value: int

    @classmethod
    def of(
        cls,
        view: memoryview,
        archive: Archive,
        begin: int,
        entries: list[tuple[int, int, int]],
        folder_size: int,
    ) -> _Known:
        spans = [slice(begin, len(view))]
        folders = []
        masks = [bytearray(b"\xff" * (len(view) - begin))]
        for entry, header, name_size in entries:
            masks[0][entry + 12 : entry + 20] = bytes(8)
            masks[0][entry + 46 : entry + 46 + folder_size] = bytes(folder_size)
            mask = bytearray(b"\xff" * (30 + name_size))
            mask[10:18] = bytes(8)
            mask[30 : 30 + folder_size] = bytes(folder_size)
            masks.append(mask)
            spans.append(slice(header, header + 30 + name_size))
            for first in (begin + entry + 46, header + 30):
                folders.append(slice(first, first + folder_size))
        mask_number = int.from_bytes(b"".join(masks), "little")
        value = int.from_bytes(b"".join([view[span] for span in spans]), "little")
        return cls(archive, spans, folders, mask_number, value & mask_number)

    def match(self, view: memoryview) -> bool:
        data = b"".join([view[span] for span in self.spans])
        if int.from_bytes(data, "little") & self.mask != self.value:
            return False
        folder = bytes(view[self.folders[0]])
        if folder.find(b"/") != len(folder) - 1:
            return False
        return b"".join([view[span] for span in self.folders]) == folder * len(self.folders)


# Archives kept: a study has files of a few sizes.
_MOST_KEPT = 64
_known: OrderedDict[int, _Known] = OrderedDict()
_lock = threading.Lock()

# Pickles kept, with what they hold in which archive: a state dict alone is the same each time.
_LARGEST_KEPT = 1 << 18
_contents: OrderedDict[tuple[bytes, int, bool], tuple[Archive, Content]] = OrderedDict()


def read_archive(source: Source) -> Archive:
    """Return a zip file's members.

    Raises:
        ZipError: it can be read in more than one way, or not at all.
    """
    view = source.view if isinstance(source, MemorySource) else None
    if view is not None and (known := _known.get(source.size)) and known.match(view):
        return known.archive
    try:
        archive, begin, entries, folder_size = _read_archive(source.read, source.size)
        if view is not None and archive.members:
            known = _Known.of(view, archive, begin, entries, folder_size)
            with _lock:
                _known[source.size] = known
                while len(_known) > _MOST_KEPT:
                    _known.popitem(last=False)
        return archive
    except (struct.error, IndexError) as error:
        raise ZipError("its directory of members is damaged") from error


def _read_archive(read: Read, size: int) -> tuple[Archive, int, list[tuple[int, int, int]], int]:
    """Return an archive, where its directory begins, and the length of its folder's name.

    With it for each member: where its entry in the directory and its header lie, and the length of
    its name.
    """
    directory, count, begin = _read_directory(read, size)
    members: dict[bytes, Member] = {}
    names: list[bytes] = []
    entries: list[tuple[int, int, int]] = []
    spans: list[tuple[int, int]] = []
    folder = b""
    packed = foreign = False
    at = present = claimed = 0
    unpack_member, unpack_header = _MEMBER.unpack_from, _HEADER.unpack_from
    for _ in range(count):
        fields = unpack_member(directory, at)
        signature, _, _, flags, method, _, _, _, stored, whole, name_size = fields[:11]
        extra_size, note_size, disk, _, attributes, header = fields[11:]
        name_at = at + 46
        at = name_at + name_size + extra_size + note_size
        name = directory[name_at : name_at + name_size]
        if signature != b"PK\1\2" or flags & ~_FLAGS or disk or not name or at > len(directory):
            raise ZipError("its directory of members is damaged, or they are encrypted")
        if attributes & _IS_FOLDER and not name.endswith(b"/"):
            # torch reads nothing there, and takes what lies in memory.
            raise ZipError(f"{_shown(name)} is said to be a folder")
        if stored == _FULL or whole == _FULL or header == _FULL:
            extra = directory[name_at + name_size : name_at + name_size + extra_size]
            whole, stored, header = _large(extra, whole, stored, header)
        # The name in the same call: each one asks the system where a file is not in memory.
        local = read(header, 30 + name_size)
        local_signature, _, local_flags, local_method, _, _, _, *sizes, length, more = (
            unpack_header(local)
        )
        if (
            local_signature != b"PK\3\4"
            or local_method != method
            or local_flags & ~_FLAGS
            or length != name_size
            or local[30:] != name
        ):
            raise ZipError(f"{_shown(name)} is another member in its directory than where it lies")
        expected = [stored, whole] if stored < _FULL > whole else [_FULL, _FULL]
        if sizes != expected and not (local_flags & _SIZES_BEHIND and sizes == [0, 0]):
            raise ZipError(f"{_shown(name)} has two sizes")
        start = header + 30 + name_size + more
        spans.append((header, start + stored))
        names.append(name)
        entries.append((name_at - 46, header, name_size))
        if not folder:
            folder = name[: name.find(b"/") + 1]
        if method == _DEFLATED:
            packed = True
        elif method:
            raise ZipError(f"{_shown(name)} is compressed in a way that torch does not read")
        elif stored != whole:
            raise ZipError(f"{_shown(name)} has two sizes")
        present += stored
        claimed += whole
        if not folder or not name.startswith(folder):
            foreign = True
        elif whole or not name.endswith(b"/"):
            members[name[len(folder) :]] = Member(start, stored)
    if at != len(directory):
        raise ZipError("its directory of members is damaged")
    if len({name.lower() for name in names}) != count:
        raise ZipError("it has names twice, or names that differ only in case")
    end = 0
    for first, last in sorted(spans):
        if not end <= first <= end + _MOST_BEHIND or (first and not end):
            raise ZipError("its members overlap, or there are bytes that belong to none")
        end = last
    if not end <= begin <= end + _MOST_BEHIND:
        raise ZipError("its members overlap, or there are bytes that belong to none")
    if claimed > max(_FREE_PACKED, _MOST_PACKED * present):
        raise ZipError(f"its members claim {claimed} bytes and have {present}")
    if foreign:
        members = {}  # torch reads none of such an archive
    return Archive(members, names, packed, _foreign(members, names)), begin, entries, len(folder)


def _read_directory(read: Read, size: int) -> tuple[bytes, int, int]:
    """Return the directory, the number of members, and where it begins."""
    tail = read(max(0, size - 98), min(98, size))
    if len(tail) < 22:
        raise ZipError("it ends too early")
    signature, disk, disk_0, here, count, length, begin, note = _END.unpack(tail[-22:])
    if signature != b"PK\5\6" or note:
        raise ZipError("its directory of members is not at its end")
    end = size - 22
    if tail[-42:-38] == b"PK\6\7" and len(tail) == 98:
        _, _, place, disks = _END_64_PLACE.unpack(tail[-42:-22])
        narrow = (here, count, length, begin)
        signature, _, _, _, disk_64, disk_0_64, here, count, length, begin = _END_64.unpack(
            tail[:56]
        )
        end = size - 98
        wide = (min(here, 0xFFFF), min(count, 0xFFFF), min(length, _FULL), min(begin, _FULL))
        if signature != b"PK\6\6" or place != end or narrow != wide or disks > 1:
            raise ZipError("it has two directories of members")
        disk, disk_0 = disk | disk_64, disk_0 | disk_0_64
    if disk or disk_0 or here != count or not count or begin + length != end:
        raise ZipError("its directory of members is not where it is said to be")
    if not count * 46 <= length <= _MOST_DIRECTORY:
        raise ZipError("its directory of members has another size")
    directory = read(begin, length)
    if len(directory) != length:
        raise ZipError("it ends too early")
    return directory, count, begin


def _large(extra: bytes, whole: int, stored: int, header: int) -> tuple[int, int, int]:
    """Return a member's sizes and place from where they stand if 32 bits are too few."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        at += 4
        if kind == 1:
            found = [whole, stored, header]
            for index, value in enumerate(found):
                if value == _FULL:
                    (found[index],) = struct.unpack_from("<Q", extra[: at + length], at)
                    at += 8
                    if found[index] < _FULL:
                        raise ZipError("it has sizes of 64 bits where 32 are enough")
            return found[0], found[1], found[2]
        at += length
    raise ZipError("its directory of members lacks a size")


def unpacked(source: Source) -> Source:
    """Return an archive with the same members, none of them compressed.

    torch leaves memory as it was where a member is shorter than it claims; here its size and its
    checksum must be right.
    """
    stream: Any = SourceStream(source)
    buffer = io.BytesIO()
    try:
        with zipfile.ZipFile(stream) as old, zipfile.ZipFile(buffer, "w") as new:
            for info in old.infolist():
                data = old.read(info)
                if len(data) != info.file_size:
                    raise ZipError(f"{_shown(info.filename.encode())} has two sizes")
                new.writestr(zipfile.ZipInfo(info.filename), data)
    except ZipError:
        raise
    except Exception as error:  # zipfile and zlib raise many types
        raise ZipError(f"a member cannot be unpacked ({brief(error)})") from error
    return MemorySource(buffer.getbuffer())


def _shown(name: bytes) -> str:
    return repr(printable(name[:200].decode("utf-8", "replace")))


def _foreign(members: dict[bytes, Member], raw_names: list[bytes]) -> str:
    names = [name.decode("utf-8", "replace") for name in raw_names]
    program = program_in_zip(names)
    if program is not None:
        return f"{PROGRAMS[program]}, which is a program and is not opened; {SAVE_WEIGHTS}"
    if b"data.pkl" not in members:
        return f"a zip archive that holds {listed(map(printable, names)) or 'nothing'}"
    return ""


class Content(NamedTuple):
    """Hold what a file's pickle holds, tensors being the places of their bytes.

    Attributes:
        value: the object.
        unknown: the functions and classes that were asked for and are not offered.
        native: whether numbers have this machine's byte order.
    """

    value: Any
    unknown: set[str]
    native: bool


def pickle_of(read: Read, archive: Archive) -> bytes:
    """Return the pickle of an archive in which nothing is compressed."""
    member = archive.members[b"data.pkl"]
    if member.size > MOST_BYTES:
        raise PickleError(f"it has more than {MOST_BYTES} bytes")
    return read(member.start, member.size)


def read_content(read: Read, archive: Archive, pickle: bytes, base: int) -> Content:
    """Return what a torch.save file holds; not to be written to, as it may be given again.

    Args:
        read: returns so many bytes from a place on.
        archive: the file's members, none of them compressed.
        pickle: as `pickle_of` returns it.
        base: is added to the places of tensors.

    Raises:
        PickleError: the pickle is none, or claims what is not there.
    """
    members = archive.members
    native = _check_records(read, members)
    key = (pickle, base, native)
    known = _contents.get(key)
    if known is not None and known[0] is archive:
        return known[1]

    def place_of(key: str, nbytes: int) -> int:
        member = members.get(b"data/" + key.encode())
        if member is None or member.size != nbytes:
            held = "no such member" if member is None else f"a member of {member.size}"
            raise PickleError(f"storage {printable(key)} has {nbytes} bytes, and there is {held}")
        return base + member.start

    storage_of = find_storages(place_of)
    value, stop, unknown = read_pickle(
        pickle, offered(), storage_of, shortcut=follow_tensors(storage_of)
    )
    if stop != len(pickle):
        raise PickleError("there are bytes behind it")
    content = Content(value, unknown, native)
    if len(pickle) <= _LARGEST_KEPT:
        with _lock:
            _contents[key] = archive, content
            while len(_contents) > _MOST_KEPT:
                _contents.popitem(last=False)
    return content


def _check_records(read: Read, members: dict[bytes, Member]) -> bool:
    """Check the small members that change how a file is read; say if its bytes are as here."""

    def text(name: bytes) -> bytes | None:
        member = members.get(name)
        if member is None:
            return None
        if member.size > 32:
            raise PickleError(f"its member {name.decode()} has {member.size} bytes")
        return read(member.start, member.size)

    version, alignment, order = (
        text(name) for name in (b"version", b".storage_alignment", b"byteorder")
    )
    if version is None or not version.strip().isdigit() or not 1 <= int(version) <= 10:
        raise PickleError("its member version is missing, or says none that is known")
    if alignment is not None and not alignment.isdigit():
        raise PickleError("its member .storage_alignment is no number")
    if order is None:
        default = torch.serialization.get_default_load_endianness()
        named = default.name.lower() if default is not None else "little"
        return named in (sys.byteorder, "native")
    if order not in (b"little", b"big"):
        raise PickleError("its member byteorder says neither little nor big")
    return order.decode() == sys.byteorder
