"""Inputs for the targets: whole documents that are then broken on purpose, in their structure or in their bytes.

Every choice is made by a `random.Random`, so that hypothesis can drive and shrink the same generators.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable

from ckpt_tools.core.dtypes import DTYPES
from ckpt_tools.formats.dcp.pickle_writer import dumps
from tests.checkpoints import CONFIGS
from tests.hostile.fuzz.targets import FILES, NAMES, Targets

NUMBERS = (
    *("0", "1", "2", "3", "6", "-0", "-1", "1.0", "1e3", "1E400", "NaN", "Infinity", "-Infinity", "01", "0x1", "true"),
    *(str((1 << bits) + by) for bits in (31, 32, 53, 61, 62, 63, 64, 127) for by in (-1, 0, 1)),
    *("1" + "0" * digits for digits in (400, 4299, 4300, 5000)),
)
TEXTS = (
    *("", ".", "..", "../x", "a/../../x", "/etc/passwd", "\\\\server\\share", "C:\\x", "a:b", "CON", "nul.safetensors"),
    *("x\0y", "\ud800", "\udfff\ud800", "\u202egnp", "e\u0301", "x" * 300, "x" * 2000, "__metadata__", "__proto__"),
    *("model.safetensors", "a b", " a", "a.", "\U0001d518", "\x7f", "\x1b[2J", *NAMES, *FILES),
)
INTERESTING = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1)


def text_of(choose: random.Random) -> str:
    """A string as JSON has it: escaped or not, with halves of characters, nulls and control characters among them."""
    text = choose.choice(TEXTS) if choose.random() < 0.8 else "".join(choose.choices('abz./\\"\n\0é\ud83d', k=4))
    if choose.random() < 0.1:
        return '"' + text.encode("utf-8", "replace").decode() + '"'
    return json.dumps(text, ensure_ascii=choose.random() < 0.9 or not text.isprintable())


def value_of(choose: random.Random, depth: int = 0) -> str:
    """Any JSON value, or almost one."""
    kind = choose.randrange(12)
    if kind < 4 or depth > 3:
        return choose.choice(NUMBERS)
    if kind < 7:
        return text_of(choose)
    if kind == 7:
        nested = choose.choice((70, 900, 1500, 20_000))
        return choose.choice(('{"a":', "[")) * nested + "1"
    count = choose.randrange(4)
    if kind < 10:
        return "[" + ",".join(value_of(choose, depth + 1) for _ in range(count)) + "]"
    return "{" + ",".join(f"{text_of(choose)}:{value_of(choose, depth + 1)}" for _ in range(count)) + "}"


def broken_json(choose: random.Random, document: object) -> bytes:
    """A JSON document with some of its values, keys and marks exchanged, doubled or left out."""
    text = json.dumps(
        document, ensure_ascii=choose.random() < 0.5, separators=choose.choice(((",", ":"), (", ", ": ")))
    )
    for _ in range(choose.choice((0, 1, 1, 1, 2, 3))):
        marks = [at for at, mark in enumerate(text) if mark in '{[,:"}]']
        begin = choose.choice(marks)
        end = choose.choice(marks[marks.index(begin) : marks.index(begin) + 8])
        kind = choose.randrange(6)
        if kind == 0:
            text = text[: begin + 1] + value_of(choose) + text[end:]
        elif kind == 1:
            text = text[: begin + 1] + text_of(choose) + text[end:]
        elif kind == 2:
            text = text[:begin] + text[end:]
        elif kind == 3:
            text = text[:end] + text[begin:end] * choose.choice((1, 1, 2, 300)) + text[end:]
        elif kind == 4:
            text = text[:begin] + choose.choice((" ", "\n", "\t", "\0", "\ufeff", "/**/", ",")) + text[begin:]
        else:
            text = text[: begin + 1] + choose.choice(NUMBERS) + text[end:]
    data = text.encode("utf-8", "surrogatepass")
    return broken_bytes(choose, data) if choose.random() < 0.2 else data


def broken_bytes(choose: random.Random, data: bytes) -> bytes:
    """Bits flipped, numbers exchanged, ranges cut out, doubled or moved, the end cut off."""
    found = bytearray(data)
    for _ in range(choose.choice((1, 1, 1, 2, 4, 8))):
        if not found:
            break
        at, span = choose.randrange(len(found)), choose.choice((1, 1, 2, 4, 8, 64))
        kind = choose.randrange(8)
        if kind <= 1:
            found[at] ^= 1 << choose.randrange(8)
        elif kind == 2:
            found[at] = choose.randrange(256)
        elif kind == 3:
            width = choose.choice((2, 4, 8))
            number = choose.choice(INTERESTING) & ((1 << 8 * width) - 1)
            found[at : at + width] = number.to_bytes(width, "little")
        elif kind == 4:
            del found[at : at + span]
        elif kind == 5:
            found[at:at] = found[at : at + span]
        elif kind == 6:
            other = choose.randrange(len(found))
            found[at : at + span] = found[other : other + span]
        else:
            del found[at:]
    return bytes(found)


def _header(choose: random.Random) -> bytes:
    header: dict[str, object] = {}
    if choose.random() < 0.5:
        header["__metadata__"] = {choose.choice(("format", "a")): choose.choice(("pt", "é", ""))}
    at = 0
    for number in range(choose.randrange(5)):
        dtype = choose.choice(tuple(DTYPES.values()))
        shape = [choose.choice((0, 1, 2, 3, 8)) for _ in range(choose.randrange(4))]
        bits = dtype.bits
        for n in shape:
            bits *= n
        size = -(-bits // 8)
        header[f"{choose.choice(NAMES)}.{number}"] = {
            "dtype": dtype.name,
            "shape": shape,
            "data_offsets": [at, at + size],
        }
        at += size
    text = broken_json(choose, header)
    text += choose.choice((b"", b" " * choose.randrange(64), b"\0", b"\n"))
    length = len(text) if choose.random() < 0.95 else choose.choice(INTERESTING)
    tail = bytes(max(0, at + choose.choice((0, 0, 0, 0, 0, 0, -1, 1, 8))))
    return struct.pack("<Q", length) + text + tail


def _index(choose: random.Random) -> bytes:
    weight_map = dict(zip(NAMES, (FILES[0], FILES[0], FILES[1]), strict=True))
    return broken_json(choose, {"metadata": {"total_size": 72}, "weight_map": weight_map})


def _manifest(choose: random.Random) -> bytes:
    return broken_json(
        choose,
        {
            "version": 1,
            "family": "qwen3",
            "layout_version": 1,
            "side": choose.choice(("hf", "native")),
            "tool": "ckpt 0.1",
            "digest": "xxh3-128/8MiB",
            "source": {"directory": "a"},
            "tensors": dict.fromkeys(NAMES, "0" * 32),
            "side_files": {"hf/config.json": "0" * 32},
            "blobs": {"__0_0.distcp": [[4096, 24, "0" * 32], [8192, 24, "1" * 32]]},
        },
    )


def _config(choose: random.Random) -> bytes:
    config = dict(choose.choice(tuple(CONFIGS.values())))
    for _ in range(choose.randrange(3)):
        config[choose.choice(tuple(config))] = choose.choice(
            (None, -1, 0, 2.5, "x", [], [1], {"a": 1}, 10**6, 10**30, True)
        )
    return broken_json(choose, config)


def _sharded(choose: random.Random) -> bytes:
    entry = {"saved_offsets": [0, 0]}
    shaped = {**entry, "global_shape": [choose.choice((2, 4)), 3]}
    return broken_json(choose, {name: choose.choice((entry, shaped)) for name in NAMES})


def _pickled(choose: random.Random, depth: int = 0) -> object:
    kind = choose.randrange(7)
    if kind < 3 or depth > 3:
        return choose.choice((None, True, 0, -1, 1 << 40, 1 << 90, 1.5, "w", NAMES[0], "../x"))
    items = [_pickled(choose, depth + 1) for _ in range(choose.randrange(4))]
    if kind < 5:
        return items if kind == 3 else tuple(items)
    return {choose.choice(("a", "size", 1)): item for item in items}


def _metadata(seed: bytes) -> Callable[[random.Random], bytes]:
    def made(choose: random.Random) -> bytes:
        if choose.random() < 0.1:
            return broken_bytes(choose, dumps(_pickled(choose)))
        if choose.random() < 0.1:
            return b"\x80" + bytes(
                choose.choices(b"\x02\x04(NK\x00]}u)\x85\x86tR\x81bqhQ.\x94\x93cX", k=choose.randrange(60))
            )
        return broken_bytes(choose, seed) if choose.random() < 0.98 else seed

    return made


def generators(targets: Targets) -> dict[str, Callable[[random.Random], bytes]]:
    """The generator of each target."""
    archive = targets.archive
    return {
        "safetensors": _header,
        "index": _index,
        "metadata": _metadata(targets.metadata),
        "archive": lambda choose: broken_bytes(choose, archive) if choose.random() < 0.98 else archive,
        "manifest": _manifest,
        "config": _config,
        "sharded": _sharded,
    }
