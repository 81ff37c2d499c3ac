"""Read pickles without running anything: plain containers, and calls that are only recorded.

Python's own unpicklers are no place for a stranger's bytes, even where every class is refused: the
C one allocates whatever index an instruction names (8 bytes took 2.7 GB). Here what is made is
bounded by the bytes that are there, a name leads to what its reader offers for it and never to an
import, and a key is looked at before it is hashed.
"""

from __future__ import annotations

import re
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .errors import printable

# Beyond these a file is no checkpoint but an attempt on somebody's memory. An empty container
# takes one to four bytes of a pickle and up to 500 of memory.
MOST_BYTES = 1 << 26
MOST_OBJECTS = 1_000_000
_MOST_MARKS = 10_000
# One byte remembers an object and takes a hundred of memory.
_MOST_REMEMBERED = 1 << 23
_MOST_NESTED_KEY = 4
_MOST_OF_A_KEY = 64
# Larger whole numbers can be chosen so that all of them fall into one place of a dict.
_LARGEST_KEY = 1 << 60

_FLOAT = struct.Struct(">d")
_UNSIGNED = struct.Struct("<L")
_SIGNED = struct.Struct("<l")
_UNSIGNED_8 = struct.Struct("<Q")
# The time to read or print a number in decimal digits grows with its square.
_MOST_DIGITS = 1000
_MOST_BYTES_OF_A_NUMBER = 415
_DECIMAL = re.compile(rb"-?(?:0|[1-9][0-9]*)")
# What stands in a persistent id: a name, a class, a number or nothing.
_PART_OF_AN_ID = re.compile(r"'([^'\\]*)'|<class '([A-Za-z0-9_.]+)'>|(0|[1-9][0-9]{0,18})|None")


class PickleError(Exception):
    """Say what is wrong with a pickle."""


class EndsEarly(PickleError):
    """Report a pickle of which the end is missing, or that takes what is not there."""


class UnknownInstruction(PickleError):
    """Report an instruction that pickles of plain values do not have."""


# Is given a pickle, the place after a mark, the stack and the memo; returns where to go on, or 0.
Shortcut = Callable[[bytes, int, list[Any], dict[int, Any]], int]


class Call:
    """Offer a function under a pickle's name for it."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function


class Made:
    """Be made by a Call, and take what a pickle gives it afterwards."""

    __slots__ = ()

    def build(self, state: Any) -> None:
        raise NotImplementedError


class Unknown:
    """Stand for a function or class that is not offered."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Shell:
    """Keep what a pickle would have made an object from.

    Attributes:
        name: the function or class.
        arguments: what it would have been called with.
        state: what it would have been given afterwards.
        extended: whether items would have been put into it, as into a dict, a list or a set.
    """

    __slots__ = ("arguments", "extended", "name", "state")

    def __init__(self, name: str, arguments: Any) -> None:
        self.name = name
        self.arguments = arguments
        self.state: Any = None
        self.extended = False

    def get(self, key: str) -> Any:
        return self.state.get(key) if isinstance(self.state, dict) else None


_PLAIN_KEYS = frozenset(
    {str, bool, float, bytes, type(None), torch.dtype, torch.device, Shell, Unknown}
)
_DICTS = (dict, OrderedDict, Counter)


def check_key(key: Any) -> None:
    """Refuse a dict's key that is not plain, as hashing may take the stack or for ever."""
    _check_part(key, 0, _MOST_OF_A_KEY)


def _check_part(key: Any, depth: int, left: int) -> int:
    """Return how many parts a key may still have, all tuples in it counted as trees."""
    kind = type(key)
    if kind in _PLAIN_KEYS:
        return left
    if kind is int and -_LARGEST_KEY < key < _LARGEST_KEY:
        return left
    if kind is tuple and depth < _MOST_NESTED_KEY and len(key) <= left:
        left -= len(key)
        for part in key:
            left = _check_part(part, depth + 1, left)
        return left
    raise PickleError(f"a key of a dict is a {kind.__name__} that no checkpoint has there")


def read_pickle(
    data: bytes,
    offered: Mapping[str, Any],
    persistent: Callable[[Any], Any] | None = None,
    start: int = 0,
    *,
    byte_strings: bool = False,
    shortcut: Shortcut | None = None,
) -> tuple[Any, int, set[str]]:
    """Return what a pickle holds, where it ends, and the names that are not offered.

    Args:
        data: holds the pickle.
        offered: what names as "module.name" lead to; a Call is called by the instructions that
            call, and everything else is a value. What is not offered becomes a Shell.
        persistent: what persistent ids, such as those of storages, lead to.
        start: where it begins.
        byte_strings: whether the strings of Python 2 stay bytes. Else they are text in UTF-8.
        shortcut: follows several instructions at once where two marks come one after the other.

    Raises:
        PickleError: it is none, or damaged, or holds what no checkpoint does.
    """
    if len(data) - start > MOST_BYTES:
        raise PickleError(f"it has more than {MOST_BYTES} bytes")
    try:
        return _read(data, offered, persistent, start, byte_strings, shortcut)
    except PickleError:
        raise
    except (IndexError, struct.error) as error:
        raise EndsEarly("it ends too early, or takes what is not there") from error
    except Exception as error:
        # What a value of the wrong type does: TypeError, KeyError, UnicodeDecodeError and others.
        kind = type(error).__name__
        raise PickleError(f"its instructions do not fit together ({kind})") from error


def _read(
    data: bytes,
    offered: Mapping[str, Any],
    persistent: Callable[[Any], Any] | None,
    at: int,
    byte_strings: bool,
    shortcut: Shortcut | None,
) -> tuple[Any, int, set[str]]:
    names: dict[bytes, Any] = {}
    unknown: set[str] = set()
    memo: dict[int, Any] = {}
    outer: list[list[Any]] = []
    stack: list[Any] = []
    push = stack.append
    left = MOST_OBJECTS
    # Reading four bytes with int.from_bytes takes seven times as long.
    unsigned_4, signed_4 = _UNSIGNED.unpack_from, _SIGNED.unpack_from
    unsigned_8 = _UNSIGNED_8.unpack_from
    while True:
        code = data[at]
        at += 1
        # What torch.save writes, in the order of how often, on either side of a hundred.
        if code > 100:
            if code == 113:  # BINPUT
                memo[data[at]] = stack[-1]
                at += 1
            elif code == 104:  # BINGET
                push(memo[data[at]])
                at += 1
            elif code == 114:  # LONG_BINPUT
                memo[unsigned_4(data, at)[0]] = stack[-1]
                at += 4
            elif code == 116:  # TUPLE
                items = tuple(stack)
                stack = outer.pop()
                push = stack.append
                push(items)
            elif code == 133:  # TUPLE1
                stack[-1] = (stack[-1],)
            elif code == 134:  # TUPLE2
                last = stack.pop()
                stack[-1] = (stack[-1], last)
            elif code == 137:  # NEWFALSE
                push(False)
            elif code == 106:  # LONG_BINGET
                push(memo[unsigned_4(data, at)[0]])
                at += 4
            elif code == 115:  # SETITEM
                last = stack.pop()
                _set_items(stack, [stack.pop(), last])
            elif code == 125:  # EMPTY_DICT
                if not (left := left - 1):
                    raise _too_many()
                push({})
            elif code == 117:  # SETITEMS
                values = stack
                stack = outer.pop()
                push = stack.append
                _set_items(stack, values)
            elif code == 135:  # TUPLE3
                last, middle = stack.pop(), stack.pop()
                stack[-1] = (stack[-1], middle, last)
            elif code == 101:  # APPENDS
                values = stack
                stack = outer.pop()
                push = stack.append
                _extend(stack[-1], values)
            elif code == 136:  # NEWTRUE
                push(True)
            elif code == 138:  # LONG1
                stop = at + 1 + data[at]
                push(int.from_bytes(data[at + 1 : stop], "little", signed=True))
                at = stop
            elif code == 129:  # NEWOBJ
                if not (left := left - 1):
                    raise _too_many()
                last = stack.pop()
                stack[-1] = _call(stack[-1], last, unknown)
            elif code == 143:  # EMPTY_SET
                if not (left := left - 1):
                    raise _too_many()
                push(set())
            elif code == 128:  # PROTO
                at += 1
            elif code == 140:  # SHORT_BINUNICODE
                stop = at + 1 + data[at]
                push(_text(data, at + 1, stop))
                at = stop
            elif code == 148:  # MEMOIZE
                if len(memo) >= _MOST_REMEMBERED:
                    raise _too_many()
                memo[len(memo)] = stack[-1]
            elif code == 147:  # STACK_GLOBAL
                last = stack.pop()
                push(_named(f"{stack.pop()}.{last}", offered, unknown))
            elif code == 149:  # FRAME
                (length,) = unsigned_8(data, at)
                at += 8
                # As for the unpickler in C: it lies within the file, and means nothing else.
                if length > len(data) - at:
                    raise EndsEarly("it ends too early")
            elif code == 112:  # PUT
                stop = _line_end(data, at)
                if data[at] == 45:
                    raise PickleError("it remembers something under a negative number")
                memo[_decimal(data[at:stop])] = stack[-1]
                at = stop + 1
            elif code == 103:  # GET
                stop = _line_end(data, at)
                push(memo[_decimal(data[at:stop])])
                at = stop + 1
            elif code == 108:  # LIST
                values = stack
                stack = outer.pop()
                push = stack.append
                if not (left := left - 1):
                    raise _too_many()
                push(values)
            elif code == 144:  # ADDITEMS
                values = stack
                stack = outer.pop()
                push = stack.append
                _add_items(stack[-1], values)
            elif code == 145:  # FROZENSET
                values = stack
                stack = outer.pop()
                push = stack.append
                if not (left := left - 1):
                    raise _too_many()
                members: set[Any] = set()
                _add_items(members, values)
                push(frozenset(members))
            elif code == 146:  # NEWOBJ_EX
                if not (left := left - 1):
                    raise _too_many()
                named, last = stack.pop(), stack.pop()
                if type(stack[-1]) is Call:
                    raise PickleError("it calls with names what takes none")
                stack[-1] = _call(stack[-1], (last, named), unknown)
            elif code == 141:  # BINUNICODE8
                stop = at + 8 + unsigned_8(data, at)[0]
                push(_text(data, at + 8, stop))
                at = stop
            elif code == 142:  # BINBYTES8
                stop = at + 8 + unsigned_8(data, at)[0]
                push(data[at + 8 : stop])
                at = stop
            elif code == 150:  # BYTEARRAY8
                if not (left := left - 1):
                    raise _too_many()
                stop = at + 8 + unsigned_8(data, at)[0]
                push(bytearray(data[at + 8 : stop]))
                at = stop
            elif code == 139:  # LONG4
                size = signed_4(data, at)[0]
                if not 0 <= size <= _MOST_BYTES_OF_A_NUMBER:
                    raise PickleError(f"it has a number of {size} bytes")
                at += 4
                push(int.from_bytes(data[at : at + size], "little", signed=True))
                at += size
            else:
                raise UnknownInstruction(f"it has the instruction {code}")
        elif code == 75:  # BININT1
            push(data[at])
            at += 1
        elif code == 40:  # MARK
            if (
                shortcut is not None
                and data[at] == 40
                and (stop := shortcut(data, at, stack, memo))
            ):
                at = stop
                continue
            outer.append(stack)
            if len(outer) > _MOST_MARKS:
                raise PickleError("it is nested too deeply")
            stack = []
            push = stack.append
        elif code == 88:  # BINUNICODE
            stop = at + 4 + unsigned_4(data, at)[0]
            push(_text(data, at + 4, stop))
            at = stop
        elif code == 82:  # REDUCE
            if not (left := left - 1):
                raise _too_many()
            last = stack.pop()
            stack[-1] = _call(stack[-1], last, unknown)
        elif code == 41:  # EMPTY_TUPLE
            push(())
        elif code == 81:  # BINPERSID
            if persistent is None:
                raise PickleError("it refers to an object outside of it")
            stack[-1] = persistent(stack[-1])
        elif code == 77:  # BININT2
            push(data[at] | data[at + 1] << 8)
            at += 2
        elif code == 74:  # BININT
            push(signed_4(data, at)[0])
            at += 4
        elif code == 71:  # BINFLOAT
            push(_FLOAT.unpack_from(data, at)[0])
            at += 8
        elif code == 99:  # GLOBAL
            stop = _line_end(data, _line_end(data, at) + 1)
            name = data[at:stop]
            at = stop + 1
            if name not in names:
                names[name] = _named(str(name, "utf-8").replace("\n", ".", 1), offered, unknown)
            push(names[name])
        elif code == 78:  # NONE
            push(None)
        elif code == 93:  # EMPTY_LIST
            if not (left := left - 1):
                raise _too_many()
            push([])
        elif code == 97:  # APPEND
            last = stack.pop()
            _extend(stack[-1], [last])
        elif code == 98:  # BUILD
            last = stack.pop()
            _build(stack[-1], last)
        elif code == 85:  # SHORT_BINSTRING
            stop = at + 1 + data[at]
            push(data[at + 1 : stop] if byte_strings else str(data[at + 1 : stop], "utf-8"))
            at = stop
        elif code == 46:  # STOP
            return stack.pop(), at, unknown
        elif code == 67:  # SHORT_BINBYTES
            stop = at + 1 + data[at]
            push(data[at + 1 : stop])
            at = stop
        elif code == 66:  # BINBYTES
            stop = at + 4 + unsigned_4(data, at)[0]
            push(data[at + 4 : stop])
            at = stop
        elif code == 84:  # BINSTRING
            stop = at + 4 + unsigned_4(data, at)[0]
            push(data[at + 4 : stop] if byte_strings else str(data[at + 4 : stop], "utf-8"))
            at = stop
        elif code == 48 or code == 49:  # POP, POP_MARK
            if code == 48 and stack:
                stack.pop()
            else:
                stack = outer.pop()
                push = stack.append
        elif code == 50:  # DUP
            push(stack[-1])
        elif code == 73 or code == 76:  # INT, LONG
            stop = _line_end(data, at)
            text = data[at:stop]
            at = stop + 1
            if code == 73 and text in (b"00", b"01"):
                push(text == b"01")
            else:
                push(_decimal(text.removesuffix(b"L") if code == 76 else text))
        elif code == 70:  # FLOAT
            stop = _line_end(data, at)
            push(float(data[at:stop]))
            at = stop + 1
        elif code == 86:  # UNICODE
            stop = _line_end(data, at)
            push(str(data[at:stop], "raw-unicode-escape"))
            at = stop + 1
        elif code == 100:  # DICT
            values = stack
            stack = outer.pop()
            push = stack.append
            if not (left := left - 1):
                raise _too_many()
            push({})
            _set_items(stack, values)
        elif code == 80:  # PERSID
            stop = _line_end(data, at)
            if persistent is None:
                raise PickleError("it refers to an object outside of it")
            push(persistent(_id_of_text(str(data[at:stop], "ascii"), offered, unknown)))
            at = stop + 1
        else:
            raise UnknownInstruction(f"it has the instruction {code}")


def _call(function: Any, arguments: Any, unknown: set[str]) -> Any:
    if type(function) is Call:
        # What is made of something unknown is unknown.
        of = next((part for part in arguments if type(part) in (Shell, Unknown)), None)
        made = function.function(*arguments) if of is None else Shell(of.name, ())
        if type(made) is Shell:
            unknown.add(made.name)
        return made
    if type(function) in (Unknown, Shell):
        return Shell(function.name, arguments)
    raise PickleError("it calls what is no function")


def _set_items(stack: list[Any], values: list[Any]) -> None:
    target = stack[-1]
    if type(target) is Shell:
        target.extended = True
        return  # what it would do with them is not known
    if type(target) not in _DICTS:
        raise PickleError("it sets items of what is no dict")
    for key, value in zip(values[::2], values[1::2], strict=True):
        if type(key) is not str:
            check_key(key)
        target[key] = value


def _add_items(target: Any, values: list[Any]) -> None:
    for value in values:
        check_key(value)
    if type(target) is Shell:
        target.extended = True
        return
    if type(target) is not set:
        raise PickleError("it adds items to what is no set")
    target.update(values)


def _extend(target: Any, values: list[Any]) -> None:
    if type(target) is Shell:
        target.extended = True
        return
    if type(target) is not list:
        raise PickleError("it appends to what is no list")
    target.extend(values)


def _line_end(data: bytes, at: int) -> int:
    stop = data.find(b"\n", at)
    if stop < 0:
        raise EndsEarly("it ends too early")
    return stop


def _text(data: bytes, start: int, stop: int) -> str:
    try:
        return data[start:stop].decode()
    except UnicodeDecodeError:
        if stop > len(data):
            raise EndsEarly("it ends too early") from None
        return data[start:stop].decode("utf-8", "surrogatepass")


def _too_many() -> PickleError:
    return PickleError(f"it makes more than {MOST_OBJECTS} objects")


def _named(name: str, offered: Mapping[str, Any], unknown: set[str]) -> Any:
    found = offered.get(name)
    if found is None:
        unknown.add(name)
        return Unknown(name)
    return found


def _build(target: Any, state: Any) -> None:
    if type(target) is Shell:
        target.state = state
    elif isinstance(target, Made):
        target.build(state)
    elif type(target) is OrderedDict and isinstance(state, dict):
        # A state dict carries its modules' versions so. Other attributes say nothing of weights,
        # and may hide a dict's own methods.
        versions = state.get("_metadata")
        if isinstance(versions, dict):
            target._metadata = versions  # type: ignore[attr-defined]
    else:
        raise PickleError(f"it gives attributes to a {printable(type(target).__name__)}")


def _decimal(text: bytes) -> int:
    if len(text) > _MOST_DIGITS:
        raise PickleError(f"it has a number of more than {_MOST_DIGITS} digits")
    if _DECIMAL.fullmatch(text) is None:
        raise PickleError("it has a number that is written as none")
    return int(text)


def _id_of_text(text: str, offered: Mapping[str, Any], unknown: set[str]) -> tuple[Any, ...]:
    """Return a persistent id, which protocol 0 writes as Python prints a tuple."""
    matches = [_PART_OF_AN_ID.fullmatch(part) for part in text[1:-1].split(", ")]
    if text[:1] + text[-1:] != "()" or None in matches:
        raise PickleError("it refers to something by other than a tuple")
    found: list[Any] = []
    for match in matches:
        name, kind, number = match.groups() if match else (None, None, None)
        if kind is not None:
            found.append(_named(kind, offered, unknown))
        else:
            found.append(name if number is None else int(number))
    return tuple(found)
