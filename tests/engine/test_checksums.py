"""torch's CRC-32 of each piece of a DCP checkpoint is compared where no digests of ours guard the values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash

from ckpt_tools import CopyReport, consolidate, convert, verify
from ckpt_tools.core.errors import MismatchError, RankError
from ckpt_tools.engine import sharing
from ckpt_tools.engine.checksums import Recorded, RecordedPass
from ckpt_tools.formats.dcp import open_dcp
from tests.checkpoints import make_repository, tensor_bytes
from tests.dialects.writers import tensors_of
from tests.engine.file_systems import BLOCK, stand_in
from tests.engine.test_ranks import together

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def saved_by_torch(tmp_path: Path) -> tuple[Path, Path]:
    source = make_repository(tmp_path / "source", "qwen3")
    dcp.save({"model": tensors_of(source)}, checkpoint_id=tmp_path / "saved", no_dist=True)
    return source, tmp_path / "saved"


def flip(root: Path, tensor: str) -> None:
    """Flips one bit in the middle of a tensor."""
    chunk = open_dcp(root).tensors[tensor].chunks[0]
    with open(root / chunk.file, "r+b") as file:
        file.seek(chunk.position + chunk.numel)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))


def test_every_piece_has_its_checksum(tmp_path: Path) -> None:
    source, saved = saved_by_torch(tmp_path)
    store = open_dcp(saved)
    assert {checksum.tensor for checksum in store.checksums} == store.tensors.keys()
    report = verify(saved, like=source)
    assert f"checksums: {len(store.tensors)} pieces have the CRC-32 that torch saved with them" in report.checks


def test_a_flipped_bit_is_found_and_named_and_nothing_is_written(tmp_path: Path) -> None:
    source, saved = saved_by_torch(tmp_path)
    flip(saved, "model.model.layers.1.mlp.down_proj.weight")
    with pytest.raises(MismatchError, match=r"layers\.1\.mlp\.down_proj\.weight, in __0_0\.distcp at byte"):
        verify(saved, like=source)
    with pytest.raises(MismatchError, match=r"1 pieces do not have the CRC-32"):
        consolidate(saved, tmp_path / "out", like=source)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.ckpt-staging").exists()


def test_of_what_shares_its_blocks_unread_none_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "WORTH", BLOCK)
    stand_in(monkeypatch)
    source = make_repository(tmp_path / "source", "qwen3", vocab_size=512)
    saved, shared, copied = tmp_path / "saved", "model.model.embed_tokens.weight", "model.model.norm.weight"
    dcp.save({"model": tensors_of(source)}, checkpoint_id=saved, no_dist=True)
    assert convert(saved, tmp_path / "whole", like=source).shared
    flip(saved, shared)
    report = convert(saved, tmp_path / "unread", like=source)
    assert report.shared
    assert report.undigested
    with pytest.raises(MismatchError, match=r"1 pieces do not have the CRC-32.*\n.*embed_tokens"):
        convert(saved, tmp_path / "read", like=source, digests=True)
    flip(saved, copied)
    with pytest.raises(MismatchError, match=r"1 pieces do not have the CRC-32.*\n.*norm"):
        convert(saved, tmp_path / "some", like=source)


def test_of_a_training_save_the_blobs_that_are_read_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "WORTH", BLOCK)
    stand_in(monkeypatch)
    shared, copied = "model.embed_tokens.weight", "model.norm.weight"
    saved = tmp_path / "saved"
    convert(make_repository(tmp_path / "source", "qwen3", vocab_size=512), saved)
    record_blobs(saved)
    assert verify(saved).checks
    assert consolidate(saved, tmp_path / "whole").shared
    flip(saved, shared)
    assert consolidate(saved, tmp_path / "unread").undigested
    with pytest.raises(MismatchError, match=r"1 pieces do not have the CRC-32 or digest"):
        consolidate(saved, tmp_path / "read", digests=True)
    flip(saved, copied)
    with pytest.raises(MismatchError, match=r"1 pieces do not have the CRC-32 or digest"):
        consolidate(saved, tmp_path / "some")


def record_blobs(root: Path) -> None:
    """Digests by the bytes of the files in place of those by tensor, as training saves them."""
    manifest = json.loads((root / "ckpt-manifest.json").read_text())
    del manifest["tensors"]
    blobs: dict[str, list[list[object]]] = {}
    for tensor in open_dcp(root).tensors.values():
        for chunk in tensor.chunks:
            nbytes = tensor.dtype.nbytes(chunk.numel)
            data = (root / chunk.file).read_bytes()[chunk.position : chunk.position + nbytes]
            blobs.setdefault(chunk.file, []).append([chunk.position, nbytes, xxhash.xxh3_128_hexdigest(data)])
    (root / "ckpt-manifest.json").write_text(json.dumps(manifest | {"blobs": blobs}))


def test_each_of_several_ranks_compares_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, saved = saved_by_torch(tmp_path)
    compare, compared = RecordedPass._compare, []

    def counting(self: RecordedPass, checksum: Recorded) -> None:
        compared.append(checksum)
        compare(self, checksum)

    monkeypatch.setattr(RecordedPass, "_compare", counting)
    ended = together(3, tmp_path / "out", lambda ranks: convert(saved, tmp_path / "out", like=source, ranks=ranks))
    assert all(isinstance(report, CopyReport) for report in ended), ended
    assert sorted(compared) == sorted(open_dcp(saved).checksums)
    flip(saved, "model.model.norm.weight")
    ended = together(3, tmp_path / "bad", lambda ranks: convert(saved, tmp_path / "bad", like=source, ranks=ranks))
    assert sum(isinstance(error, MismatchError) for error in ended) == 1, ended
    assert sum(isinstance(error, RankError) and "CRC-32" in error.message for error in ended) == 2
    assert not (tmp_path / "bad").exists()


def test_where_torch_was_told_to_compute_none_there_is_nothing_to_compare(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        source, saved = saved_by_torch(tmp_path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert not open_dcp(saved).checksums
    assert any(check.startswith("digests: none recorded") for check in verify(saved, like=source).checks)
    consolidate(saved, tmp_path / "out", like=source)
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(source)


def test_our_own_checkpoints_have_digests_instead(tmp_path: Path) -> None:
    convert(make_repository(tmp_path / "source"), tmp_path / "native")
    assert not open_dcp(tmp_path / "native").checksums
