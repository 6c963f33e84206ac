"""A reader of pickles that cannot run anything: a small machine of our own that makes plain values and records.

It knows the instructions that pickles of data use (protocols 2 to 5) and refuses all others, and it refuses every
global that the caller has not listed. Work and memory are linear in the length of the pickle: each instruction adds
at most one value, containers hold references, and nothing here walks nested values.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Hashable
from typing import Final, NoReturn

from ckpt_tools.core.collector import no_collection
from ckpt_tools.core.errors import FormatError
from ckpt_tools.formats.dcp.inert import NO_STATE, ORDERED_DICT, SIZE, Global, Persistent, Record

MAX_PICKLE_SIZE: Final = 1 << 30
MAX_OPEN_MARKS: Final = 1000
MAX_INTEGER_BYTES: Final = 16
_PROTOCOLS: Final = range(2, 6)
_HASH_MODULUS: Final = (1 << 61) - 1
_UINT32: Final = struct.Struct("<I")


class _Machine:
    """Stack, memo and position of one run."""

    __slots__ = ("allowed", "data", "globals", "marks", "memo", "pos", "source", "stack")

    def __init__(self, data: bytes, allowed: Collection[Global], source: str) -> None:
        self.data = data
        self.allowed = allowed
        self.source = source
        self.pos = 0
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}
        self.globals: dict[tuple[str, str], Global] = {}

    def fail(self, fault: str) -> NoReturn:
        raise FormatError(
            f"{self.source}: {fault} (byte {self.pos:,} of the pickle)",
            hint="the file is damaged, hostile, or made by a program that this tool does not know; nothing was run",
        )

    def take(self, count: int) -> bytes:
        end = self.pos + count
        if count < 0 or end > len(self.data):
            self.fail("the pickle ends inside an instruction")
        taken = self.data[self.pos : end]
        self.pos = end
        return taken

    def text(self, count: int) -> str:
        try:
            return self.take(count).decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            self.fail("a string is not UTF-8")

    def line(self) -> str:
        end = self.data.find(b"\n", self.pos, self.pos + 1024)
        if end < 0:
            self.fail("the name of a global does not end")
        text = self.text(end - self.pos)
        self.pos = end + 1
        return text

    def since_mark(self) -> list[object]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def push_global(self, module: str, name: str) -> None:
        found = self.globals.get((module, name))
        if found is None:
            found = Global(module, name)
            if found not in self.allowed:
                self.fail(f"the pickle asks for {found}, which is not one of the names that hold data")
            self.globals[module, name] = found
        self.stack.append(found)


def loads(data: bytes, allowed: Collection[Global], source: str) -> object:
    """The value that a pickle describes.

    Args:
        data: the pickle.
        allowed: classes and functions that may be named. `torch.Size(t)` becomes the tuple `t` and an empty
            `collections.OrderedDict()` a dict; every other one becomes a `Record`.
        source: file name for messages.

    Raises:
        FormatError: another instruction, another global, or a pickle that is malformed or ends early.
    """
    if len(data) > MAX_PICKLE_SIZE:
        raise FormatError(f"{source}: a pickle of {len(data):,} bytes; the limit is {MAX_PICKLE_SIZE:,}")
    machine = _Machine(data, allowed, source)
    try:
        with no_collection():
            value = _run(machine)
        if machine.pos != len(data):
            machine.fail("there are bytes after the end of the pickle")
        return value
    except (IndexError, KeyError, struct.error):
        machine.fail("the pickle is malformed")


def _run(m: _Machine) -> object:
    data, stack, memo, marks, handlers = m.data, m.stack, m.memo, m.marks, _HANDLERS
    unpack = _UINT32.unpack_from
    while True:
        code = data[m.pos]
        m.pos += 1
        # The most frequent instructions of a .metadata file are inlined: half of the time goes to dispatch.
        if code == 0x68:  # BINGET
            stack.append(memo[data[m.pos]])
            m.pos += 1
        elif code == 0x94:  # MEMOIZE
            memo[len(memo)] = stack[-1]
        elif code == 0x4B:  # BININT1
            stack.append(data[m.pos])
            m.pos += 1
        elif code == 0x6A:  # LONG_BINGET
            stack.append(memo[unpack(data, m.pos)[0]])
            m.pos += 4
        elif code == 0x72:  # LONG_BINPUT
            memo[unpack(data, m.pos)[0]] = stack[-1]
            m.pos += 4
        elif code == 0x28:  # MARK
            if len(marks) >= MAX_OPEN_MARKS:
                m.fail(f"more than {MAX_OPEN_MARKS} containers are nested")
            marks.append(len(stack))
        elif code == 0x2E:  # STOP
            if len(stack) != 1 or marks:
                m.fail("the pickle ends with unused values")
            return stack[0]
        else:
            handler = handlers.get(code)
            if handler is None:
                m.fail(f"instruction 0x{code:02x} is not used by data")
            handler(m)


def _proto(m: _Machine) -> None:
    version = m.take(1)[0]
    if version not in _PROTOCOLS:
        m.fail(f"pickle protocol {version} is not known")


def _frame(m: _Machine) -> None:
    m.take(8)


def _global(m: _Machine) -> None:
    module = m.line()
    m.push_global(module, m.line())


def _stack_global(m: _Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        m.fail("the name of a global is not text")
    m.push_global(module, name)


def _short_text(m: _Machine) -> None:
    m.stack.append(m.text(m.take(1)[0]))


def _text(m: _Machine) -> None:
    m.stack.append(m.text(int.from_bytes(m.take(4), "little")))


def _short_bytes(m: _Machine) -> None:
    m.stack.append(m.take(m.take(1)[0]))


def _bytes(m: _Machine) -> None:
    m.stack.append(m.take(int.from_bytes(m.take(4), "little")))


def _int2(m: _Machine) -> None:
    m.stack.append(int.from_bytes(m.take(2), "little"))


def _int4(m: _Machine) -> None:
    m.stack.append(int.from_bytes(m.take(4), "little", signed=True))


def _long1(m: _Machine) -> None:
    count = m.take(1)[0]
    if count > MAX_INTEGER_BYTES:
        m.fail(f"a whole number of {count} bytes")
    m.stack.append(int.from_bytes(m.take(count), "little", signed=True))


def _float(m: _Machine) -> None:
    m.stack.append(struct.unpack(">d", m.take(8))[0])


def _tuple(m: _Machine) -> None:
    m.stack.append(tuple(m.since_mark()))


def _fixed_tuple(count: int) -> Callable[[_Machine], None]:
    def handler(m: _Machine) -> None:
        items = tuple(m.stack[-count:])
        if len(items) < count:
            m.fail("a tuple has too few items")
        m.stack[-count:] = [items]

    return handler


def _constant(value: object) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(value)


def _empty_list(m: _Machine) -> None:
    m.stack.append([])


def _empty_dict(m: _Machine) -> None:
    m.stack.append({})


def _put(m: _Machine) -> None:
    m.memo[m.take(1)[0]] = m.stack[-1]


def _extend(m: _Machine, items: list[object]) -> None:
    target = m.stack[-1]
    if type(target) is not list:
        m.fail("items are appended to something that is not a list")
    target.extend(items)


def _append(m: _Machine) -> None:
    item = m.stack.pop()
    _extend(m, [item])


def _appends(m: _Machine) -> None:
    _extend(m, m.since_mark())


def _key(m: _Machine, value: object) -> Hashable:
    # Tuples are refused: hashing a deeply nested one overflows the C stack.
    if not isinstance(value, str | int | Record) and value is not None:
        m.fail("a dictionary key is neither text, a whole number nor a record")
    # Larger numbers can be chosen to have one hash all of them, and then a dictionary takes quadratic time.
    if isinstance(value, int) and abs(value) >= _HASH_MODULUS:
        m.fail("a dictionary key is a whole number of more than 60 bits")
    return value


def _update(m: _Machine, items: list[object]) -> None:
    target = m.stack[-1]
    if type(target) is not dict or len(items) % 2:
        m.fail("items are set on something that is not a dictionary")
    for i in range(0, len(items), 2):
        target[_key(m, items[i])] = items[i + 1]


def _setitem(m: _Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    _update(m, [key, value])


def _setitems(m: _Machine) -> None:
    _update(m, m.since_mark())


def _called(m: _Machine) -> tuple[Global, tuple[object, ...]]:
    args, kind = m.stack.pop(), m.stack.pop()
    if type(kind) is not Global or not isinstance(args, tuple):
        m.fail("something that is not a listed class is called")
    return kind, args


def _reduce(m: _Machine) -> None:
    kind, args = _called(m)
    if kind == SIZE and len(args) == 1 and isinstance(args[0], tuple):
        m.stack.append(args[0])
    elif kind == ORDERED_DICT and not args:
        m.stack.append({})
    else:
        m.stack.append(Record(kind, args))


def _newobj(m: _Machine) -> None:
    kind, args = _called(m)
    m.stack.append(Record(kind, args, new=True))


def _build(m: _Machine) -> None:
    state, target = m.stack.pop(), m.stack[-1]
    if type(target) is not Record or target.state is not NO_STATE:
        m.fail("state is set on something that is not a new record")
    target.state = state


def _persistent(m: _Machine) -> None:
    m.stack.append(Persistent(m.stack.pop()))


_HANDLERS: Final[dict[int, Callable[[_Machine], None]]] = {
    0x80: _proto,
    0x95: _frame,
    ord("c"): _global,
    0x93: _stack_global,
    0x8C: _short_text,
    ord("X"): _text,
    ord("C"): _short_bytes,
    ord("B"): _bytes,
    ord("M"): _int2,
    ord("J"): _int4,
    0x8A: _long1,
    ord("G"): _float,
    ord("t"): _tuple,
    ord(")"): _constant(()),
    0x85: _fixed_tuple(1),
    0x86: _fixed_tuple(2),
    0x87: _fixed_tuple(3),
    ord("N"): _constant(None),
    0x88: _constant(True),
    0x89: _constant(False),
    ord("]"): _empty_list,
    ord("}"): _empty_dict,
    ord("q"): _put,
    ord("a"): _append,
    ord("e"): _appends,
    ord("s"): _setitem,
    ord("u"): _setitems,
    ord("R"): _reduce,
    0x81: _newobj,
    ord("b"): _build,
    ord("Q"): _persistent,
}
