"""Training data: documents to tokens once, packed into sequences whose order does not depend on the mesh.

Documents lie in one stream of tokens, each ended by the end-of-text token; a sample is `seq_len` tokens of it.
Global sample order is a function of seed and epoch alone, and a step takes a fixed range of it, so that the position
in the data is the step number and any number of processes sees the same global batches.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import xxhash

from automodel.training.config import DataConfig
from ckpt_tools.core.errors import FormatError, NotFoundError, UsageError

IGNORED = -100
TRAINED, STARTS = 1, 2
"""Flags of a token: it counts in the loss; it starts a document."""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = ..., verbose: bool = ...) -> list[int]: ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: object) -> object: ...


@dataclass(frozen=True)
class Batch:
    """Sequences of one micro-batch: int64 [rows, seq_len] each.

    Attributes:
        input_ids: tokens.
        position_ids: restarting at each document.
        labels: tokens, with `IGNORED` where no loss is wanted; shifted by the model.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor

    @cached_property
    def target_tokens(self) -> int:
        """Predictions that count in the loss."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    @cached_property
    def is_packed(self) -> bool:
        """Whether a row holds anything but one document from its start."""
        return bool((self.position_ids != torch.arange(self.position_ids.shape[1])).any())

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; what was counted on the host stays there."""
        moved = Batch(*(to_device(t, device) for t in (self.input_ids, self.position_ids, self.labels)))
        moved.__dict__.update(target_tokens=self.target_tokens, is_packed=self.is_packed)
        return moved


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on a device, copied when the device comes to it; the host does not wait.

    From memory that is not pinned CUDA would copy only after all that was launched before.
    """
    return (tensor.contiguous().pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class PackedData:
    """A stream of tokens cut into samples.

    Args:
        tokens: int32 [length].
        flags: uint8 [length], of `TRAINED` and `STARTS`.
        seq_len: tokens of a sample; what is left at the end of the stream is not used.

    Raises:
        UsageError: the stream is shorter than one sample.
    """

    def __init__(self, tokens: np.ndarray, flags: np.ndarray, seq_len: int) -> None:
        self.tokens, self.flags, self.seq_len = tokens, flags, seq_len
        if len(self) == 0:
            raise UsageError(
                f"the data has {len(tokens):,} tokens, fewer than one sequence of data.seq_len={seq_len:,}",
                hint=f"choose a data.seq_len of {len(tokens):,} or less, or more data",
            )

    def __len__(self) -> int:
        return len(self.tokens) // self.seq_len

    def batch(self, samples: Sequence[int]) -> Batch:
        """The samples of these numbers, row by row."""
        rows = [slice(i * self.seq_len, (i + 1) * self.seq_len) for i in samples]
        tokens = np.stack([self.tokens[row] for row in rows]).astype(np.int64)
        flags = np.stack([self.flags[row] for row in rows])
        starts = (flags & STARTS) != 0
        index = np.arange(self.seq_len)
        first = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
        # A document's first token would be predicted from the document before it.
        counts = ((flags & TRAINED) != 0) & ~starts
        labels = np.where(counts, tokens, IGNORED)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(index - first), torch.from_numpy(labels))


@dataclass(frozen=True)
class SampleOrder:
    """Which samples a step takes: the same global batch whatever the number of processes.

    Attributes:
        samples: in one epoch.
        global_batch_size: samples of a step; a batch may reach from one epoch into the next.
        seed: of the order.
        shuffle: a new order in each epoch, or the order of the stream.
    """

    samples: int
    global_batch_size: int
    seed: int
    shuffle: bool = True

    def global_batch(self, step: int) -> list[int]:
        """Sample numbers of step `step` (0-based), in order."""
        first = step * self.global_batch_size
        return [self._sample(position) for position in range(first, first + self.global_batch_size)]

    def micro_batches(self, step: int, rank: int, size: int, micro_batch_size: int) -> list[list[int]]:
        """What data-parallel rank `rank` of `size` takes of the step's global batch."""
        share = self.global_batch_size // size
        mine = self.global_batch(step)[rank * share : (rank + 1) * share]
        return [mine[i : i + micro_batch_size] for i in range(0, share, micro_batch_size)]

    def check(self, size: int, micro_batch_size: int) -> None:
        """Raises `UsageError` when the global batch cannot be divided evenly."""
        unit = size * micro_batch_size
        if self.global_batch_size % unit:
            below, above = self.global_batch_size // unit * unit, -(-self.global_batch_size // unit) * unit
            options = " or ".join(str(n) for n in (below, above) if n)
            raise UsageError(
                f"global_batch_size={self.global_batch_size} is not a multiple of {size} data-parallel processes x "
                f"micro_batch_size={micro_batch_size}",
                hint=f"choose global_batch_size={options}",
            )

    def _sample(self, position: int) -> int:
        epoch, place = divmod(position, self.samples)
        return int(_epoch_order(self.samples, self.seed, epoch)[place]) if self.shuffle else place


@lru_cache(maxsize=2)
def _epoch_order(samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(samples)


def tokenized(config: DataConfig, tokenizer: Tokenizer, tokenizer_digest: str, cache: Path, *, write: bool) -> str:
    """Name of the token files in `cache` for this data, made now if `write` and not there.

    Raises:
        NotFoundError: a data file does not exist.
        FormatError: a line is not what it should be.
    """
    name = _fingerprint(config, tokenizer_digest)
    if write and not (cache / f"{name}.flags").exists():
        cache.mkdir(parents=True, exist_ok=True)
        pieces = [_encode(document, tokenizer, config.loss_on) for document in _documents(config)]
        tokens = np.concatenate([p[0] for p in pieces]) if pieces else np.zeros(0, np.int32)
        flags = np.concatenate([p[1] for p in pieces]) if pieces else np.zeros(0, np.uint8)
        # Renamed last, so that a file of flags says that both are whole.
        for suffix, array in (("tokens", tokens), ("flags", flags)):
            partial = cache / f".{name}.{suffix}.partial"
            array.tofile(partial)
            partial.rename(cache / f"{name}.{suffix}")
    return name


def open_tokens(cache: Path, name: str, seq_len: int) -> PackedData:
    """The packed data of `tokenized`, mapped from its files."""
    arrays = []
    for suffix, dtype in (("tokens", np.int32), ("flags", np.uint8)):
        path = cache / f"{name}.{suffix}"
        empty = path.stat().st_size == 0
        arrays.append(np.zeros(0, dtype) if empty else np.memmap(path, dtype, mode="r"))
    return PackedData(arrays[0], arrays[1], seq_len)


Document = str | list[dict[str, str]]


def _documents(config: DataConfig) -> Iterator[Document]:
    if config.dataset is not None:
        for number, row in enumerate(_dataset(config)):
            yield _document(row, f"{config.dataset} row {number}")
        return
    for path in config.files:
        if path.suffix == ".jsonl":
            with open(path, encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _document(_json(line, f"{path}:{number}"), f"{path}:{number}")
        else:
            yield path.read_text(encoding="utf-8")


def _dataset(config: DataConfig) -> Iterator[object]:
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"data.dataset={config.dataset} needs the datasets package", hint="pip install datasets"
        ) from None
    return iter(datasets.load_dataset(config.dataset, split=config.dataset_split))


def _json(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except ValueError as error:
        raise FormatError(f"{where} is not JSON: {error}") from None


def _document(row: object, where: str) -> Document:
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return row["text"]
        messages = row.get("messages")
        if isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages):
            return messages
    raise FormatError(f'{where} has neither "text" nor a list of "messages" with roles')


def _encode(document: Document, tokenizer: Tokenizer, loss_on: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and flags of one document, its end-of-text token included."""
    if isinstance(document, str):
        # Not verbose: a document may be longer than the model's context, because it is cut into sequences.
        tokens = tokenizer.encode(document, add_special_tokens=False, verbose=False)
        trained = [True] * len(tokens)
    else:
        tokens, trained = _encode_messages(document, tokenizer, loss_on)
    end = tokenizer.eos_token_id
    if end is not None and tokens and tokens[-1] != end:
        tokens, trained = [*tokens, end], [*trained, True]
    flags = np.where(np.array(trained, bool), TRAINED, 0).astype(np.uint8)
    if len(flags):
        flags[0] |= STARTS
    return np.array(tokens, np.int32), flags


def _encode_messages(
    messages: list[dict[str, str]], tokenizer: Tokenizer, loss_on: str
) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation by the tokenizer's chat template, and which of them are the assistant's."""

    def ids(count: int, *, prompt: bool = False) -> list[int]:
        encoded = tokenizer.apply_chat_template(
            messages[:count], tokenize=True, add_generation_prompt=prompt, return_dict=True
        )
        return list(encoded["input_ids"])  # type: ignore[index]

    tokens = ids(len(messages))
    if loss_on == "all":
        return tokens, [True] * len(tokens)
    trained = [False] * len(tokens)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = ids(number, prompt=True), ids(number + 1)
            if tokens[: len(before)] != before or tokens[: len(after)] != after:
                raise UsageError(
                    "the chat template writes earlier messages differently once later ones follow, so the assistant's "
                    "tokens cannot be told from the others",
                    hint="set data.loss_on=all, or split conversations after each answer",
                )
            trained[len(before) : len(after)] = [True] * (len(after) - len(before))
    return tokens, trained


def _fingerprint(config: DataConfig, tokenizer_digest: str) -> str:
    digest = xxhash.xxh3_128(
        f"1 {tokenizer_digest} {config.loss_on} {config.dataset} {config.dataset_split}\n".encode()
    )
    for path in config.files:
        try:
            with open(path, "rb") as file:
                digest.update(f"{path.suffix}\n".encode())
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise NotFoundError(
                f"the data file {path} cannot be read: {error.strerror}", hint="check data.files"
            ) from None
    return digest.hexdigest()
