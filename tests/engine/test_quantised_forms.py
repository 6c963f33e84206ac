"""What the forms do not have in common: where scales lie, what config.json says, what comes back and what cannot."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_tools import consolidate, convert, inspect, verify
from ckpt_tools.core.dtypes import DTYPES
from ckpt_tools.core.errors import LayoutError, MismatchError, UsageError
from ckpt_tools.engine.checkpoint import open_checkpoint
from ckpt_tools.engine.files import FileReader
from ckpt_tools.engine.memory import Box, load_boxes
from ckpt_tools.engine.sharding import ShardingMesh, boxes
from ckpt_tools.families import get_family
from ckpt_tools.layouts.codecs import encode_fp8
from ckpt_tools.layouts.encodings import VALUES
from tests.checkpoints import CONFIGS, make_repository, tensor_bytes
from tests.quantised import ALL_FORMS, E4M3, WIDE, as_bf16, config_of, decoded, make_quantised, overwrite

Q = "model.layers.0.self_attn.q_proj.weight"


def publish(root: Path, family: str = "qwen3_moe", **quantization: Any) -> Path:
    """An FP8 repository as publishers make them: the largest code of every block is 448."""
    source = make_quantised(root, family, quantization=quantization or None)
    rng = np.random.default_rng(1)
    for name, values in decoded(source).items():
        made = (rng.standard_normal(values.shape) * 10.0 ** rng.integers(-3, 2)).astype(np.float32)
        codes, scales = encode_fp8(made, powers_of_two="scale_fmt" in quantization)
        overwrite(source, name, codes.tobytes())
        overwrite(source, f"{name}_scale_inv", scales.tobytes())
    return source


@pytest.mark.parametrize("form", ["fp8-channel", "fp8-tensor"])
@pytest.mark.parametrize("scale_dtype", ["F32", "BF16"])
def test_one_scale_a_row_or_a_tensor_dequantises_as_a_float64_reference(
    tmp_path: Path, form: str, scale_dtype: str
) -> None:
    source = make_quantised(tmp_path / "source", "mixtral", form, scale_dtype=scale_dtype)
    convert(source, tmp_path / "native", mesh="dp_shard=3,ep=2", dequantize=True)
    consolidate(tmp_path / "native", tmp_path / "plain")
    plain, expected = tensor_bytes(tmp_path / "plain"), decoded(source)
    assert len(expected) == 2 * (4 + 4 * 3)
    assert all(plain[name] == as_bf16(values) for name, values in expected.items())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_scale_may_have_dimensions_of_one_or_none(tmp_path: Path, shape: tuple[int, ...]) -> None:
    source = make_quantised(tmp_path / "source", "llama", "fp8-tensor")
    path = source / "model.safetensors"
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    for name, entry in header.items():
        if name.endswith("_scale"):
            entry["shape"] = list(shape)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    path.write_bytes(path.read_bytes()[:8] + text + path.read_bytes()[8 + size :])
    report = convert(source, tmp_path / "native", dequantize=True)
    assert report.dequantized == 2 * 7
    verify(tmp_path / "native", against=source)


def test_scales_of_activations_and_of_the_cache_are_left_out_by_name_and_said_so(tmp_path: Path) -> None:
    beside = (
        "model.layers.0.self_attn.q_proj.input_scale",
        "model.layers.0.self_attn.k_proj.k_scale",
        "model.layers.1.self_attn.v_scale",
        "model.layers.0.mlp.experts.3.down_proj.input_scale",
    )
    source = make_quantised(tmp_path / "source", "qwen3_moe", "fp8-tensor", beside=beside)
    (source / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    report = convert(source, tmp_path / "native", dequantize=True)
    assert report.dropped == dict.fromkeys(beside, "a scale of activations, which plain weights lack")
    consolidate(tmp_path / "native", tmp_path / "plain")
    assert not (tmp_path / "plain/hf_quant_config.json").exists()
    assert "quantization_config" not in config_of(tmp_path / "plain")
    assert not beside & inspect(tmp_path / "plain").files.keys()
    verify(tmp_path / "plain", against=tmp_path / "native")


def test_a_scale_beside_plain_weights_is_an_unexpected_tensor(tmp_path: Path) -> None:
    source = make_quantised(tmp_path / "source", "gpt_oss", beside=("model.layers.0.self_attn.q_proj.input_scale",))
    with pytest.raises(LayoutError, match="1 unexpected"):
        convert(source, tmp_path / "native", dequantize=True)


def test_a_form_with_one_scale_a_tensor_is_read_and_not_written(tmp_path: Path) -> None:
    convert(make_repository(tmp_path / "source", "llama"), tmp_path / "native")
    with pytest.raises(UsageError, match="read, not written"):
        consolidate(tmp_path / "native", tmp_path / "out", quantize="fp8-tensor")
    with pytest.raises(UsageError) as caught:
        consolidate(tmp_path / "native", tmp_path / "out", quantize="int4")
    assert caught.value.hint == "its quantised forms: fp8, fp8-channel"


@settings(max_examples=20, deadline=None)
@given(
    what=st.sampled_from(ALL_FORMS),
    mesh=st.builds(ShardingMesh, st.integers(1, 5), st.integers(1, 4)),
    dtype=st.sampled_from(["BF16", "F32"]),
    seed=st.integers(0, 3),
)
def test_what_a_rank_loads_of_a_quantised_repository_is_its_part_of_the_values(
    tmp_path_factory: pytest.TempPathFactory, what: tuple[str, str], mesh: ShardingMesh, dtype: str, seed: int
) -> None:
    root = tmp_path_factory.mktemp("case")
    source = make_quantised(root / "source", *what, seed=seed)
    convert(source, root / "native", dequantize=True, dtype=dtype)
    checkpoint, native = open_checkpoint(source), open_checkpoint(root / "native")
    rank = seed % mesh.ranks
    for name, tensor in checkpoint.layout.native.items():
        itemsize = native.store.tensors[name].dtype.itemsize
        for owner, offsets, sizes in boxes(tensor.shape, mesh, stacked=name in checkpoint.layout.stacked):
            if owner != rank:
                continue
            found = [memoryview(bytearray(b"\xaa" * (prod(sizes) * itemsize))) for _ in range(2)]
            for opened, data in zip((checkpoint, native), found, strict=True):
                load_boxes(opened, [Box(name, offsets, sizes, native.store.tensors[name].dtype, data)])
            assert found[0] == found[1], name


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_rank_reads_hardly_more_than_the_codes_of_its_own_part(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(make_quantised(tmp_path / "source", family))
    layout, read, wanted = checkpoint.layout, [0], 0
    original = FileReader.read

    def counting(self: FileReader, file: str, position: int, into: memoryview) -> None:
        read[0] += len(into)
        original(self, file, position, into)

    monkeypatch.setattr(FileReader, "read", counting)
    for name, tensor in layout.native.items():
        encoding = layout.leaves[tensor.view.pieces[0].leaf].encoding
        for owner, offsets, sizes in boxes(tensor.shape, ShardingMesh(2, 2), stacked=name in layout.stacked):
            if owner == 1 and encoding is not None:
                load_boxes(checkpoint, [Box(name, offsets, sizes, VALUES, memoryview(bytearray(2 * prod(sizes))))])
                wanted += prod(sizes) // (1 if encoding.name == "fp8" else 2)
    assert wanted <= read[0] <= 1.15 * wanted


@pytest.mark.parametrize(("family", "form"), [(f, form) for f, form in ALL_FORMS if form != "fp8-tensor"])
def test_quantising_a_checkpoint_cut_over_ranks_gives_the_bytes_of_the_whole(
    tmp_path: Path, family: str, form: str
) -> None:
    source = make_repository(tmp_path / "source", family, **(WIDE if family != "gpt_oss" else {}))
    for name, mesh in {"whole": None, "cut": "dp_shard=3,ep=2"}.items():
        convert(source, tmp_path / name, mesh=mesh)
        report = consolidate(tmp_path / name, tmp_path / f"{name}-out", quantize=form)
        assert report.quantized == sum("_scale" in tensor for tensor in tensor_bytes(tmp_path / f"{name}-out"))
    assert tensor_bytes(tmp_path / "whole-out") == tensor_bytes(tmp_path / "cut-out")


def test_the_report_counts_the_tensors_that_quantising_changed(tmp_path: Path) -> None:
    source = make_quantised(tmp_path / "source", "gpt_oss")
    report = convert(source, tmp_path / "native", dequantize=True)
    assert (report.dequantized, report.quantized, report.casts) == (4, 0, 0)
    back = consolidate(tmp_path / "native", tmp_path / "back", quantize="mxfp4")
    assert (back.dequantized, back.quantized, back.rounded) == (0, 4, 0)

    consolidate(tmp_path / "native", tmp_path / "plain")
    name = "model.layers.1.mlp.experts.down_proj"
    values = np.frombuffer(tensor_bytes(tmp_path / "plain")[name], ml_dtypes.bfloat16).copy()
    large = int(np.argmax(np.abs(values.astype(np.float32))))
    values[large] *= 1.125  # between two codes
    overwrite(tmp_path / "plain", name, values.tobytes())
    (tmp_path / "plain/ckpt-manifest.json").unlink()
    convert(tmp_path / "plain", tmp_path / "changed")
    changed = consolidate(tmp_path / "changed", tmp_path / "again", quantize="mxfp4")
    assert (changed.quantized, changed.rounded) == (4, 1)
    with pytest.raises(MismatchError, match=r"down_proj: [1-9]\d? of 8,192 elements"):
        verify(tmp_path / "again", against=tmp_path / "changed")


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_published_fp8_comes_back_with_its_codes_and_in_f32_with_its_scales_to_the_last_bit_but_one(
    tmp_path: Path, family: str
) -> None:
    source = publish(tmp_path / "source", family)
    before = tensor_bytes(source)
    names = list(decoded(source))
    for dtype, within in ((None, 2**-8), ("F32", 2**-23)):
        convert(source, tmp_path / f"native-{dtype}", dequantize=True, dtype=dtype)
        consolidate(tmp_path / f"native-{dtype}", tmp_path / f"back-{dtype}", quantize="fp8")
        after = tensor_bytes(tmp_path / f"back-{dtype}")
        for name in names:
            assert after[name] == before[name], name
            old, new = (np.frombuffer(t[f"{name}_scale_inv"], np.float32) for t in (before, after))
            assert np.allclose(new, old, rtol=within, atol=0), name


def test_published_fp8_with_scales_that_are_powers_of_two_comes_back_in_value_and_mostly_in_its_codes(
    tmp_path: Path,
) -> None:
    described = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    }
    source = publish(tmp_path / "source", "deepseek_v3", **described)
    convert(source, tmp_path / "native", dequantize=True)
    report = consolidate(tmp_path / "native", tmp_path / "back", quantize="fp8")
    assert report.rounded == 0
    before, after = tensor_bytes(source), tensor_bytes(tmp_path / "back")
    verify(tmp_path / "back", against=source)
    # A block whose largest code is 224 has the same values at half the scale.
    assert sum(after[name] == before[name] for name in before) > 0.9 * len(before)
    assert config_of(tmp_path / "back")["quantization_config"] == described


def test_fp8_with_a_scale_a_row_is_the_nearest_code_and_described_as_compressed_tensors(tmp_path: Path) -> None:
    source = make_repository(tmp_path / "source", "qwen3_moe", **WIDE)
    rng = np.random.default_rng(0)
    values = rng.standard_normal((32, 160)).astype(np.float32).astype(ml_dtypes.bfloat16)
    overwrite(source, Q, values.tobytes())
    convert(source, tmp_path / "native")
    consolidate(tmp_path / "native", tmp_path / "out", quantize="fp8-channel")
    described = config_of(tmp_path / "out")["quantization_config"]
    assert (described["quant_method"], described["format"]) == ("compressed-tensors", "float-quantized")
    assert {"lm_head", "model.layers.0.mlp.gate"} <= set(described["ignore"])
    assert "model.layers.0.self_attn.q_proj" not in described["ignore"]
    found, exact = decoded(tmp_path / "out")[Q], values.astype(np.float64)
    scales = np.abs(exact).max(axis=1, keepdims=True) / 448
    finite = np.unique(E4M3[np.isfinite(E4M3)])
    nearest = np.abs(finite[None, None] - (exact / scales)[..., None]).min(axis=-1)
    assert np.all(np.abs(found / scales - exact / scales) <= nearest + 1e-3)
    assert open_checkpoint(tmp_path / "out").layout.form == "fp8-channel"
    verify(tmp_path / "out")


CODES = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("source", "kept"),
    [
        ({**CODES, "modules_to_not_convert": ["lm_head", "extra"]}, True),
        ({**CODES, "activation_scheme": "static", "modules_to_not_convert": ["lm_head"]}, False),
        ({"quant_method": "fp8", "activation_scheme": "static"}, False),
        ({**CODES, "modules_to_not_convert": [Q.removesuffix(".weight")]}, False),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, False),
    ],
    ids=["the same", "static activations", "one scale a tensor", "lists what is quantised now", "another method"],
)
def test_a_description_is_kept_only_where_it_fits_what_is_written(source: dict[str, Any], kept: bool) -> None:
    family = get_family("qwen3_moe")
    config = {**CONFIGS["qwen3_moe"], "quantization_config": source}
    found = family.quantization_config(config, family.layout(config, form="fp8"))
    assert (found == source) is kept
    assert {key: found[key] for key in CODES} == CODES if found else False
    assert Q.removesuffix(".weight") not in found["modules_to_not_convert"]


def test_a_tied_head_is_named_as_not_converted_although_no_tensor_has_its_name() -> None:
    family = get_family("qwen3")
    config = {**CONFIGS["qwen3"], "tie_word_embeddings": True}
    found = family.quantization_config(config, family.layout(config, form="fp8"))
    assert found is not None
    assert "lm_head" in found["modules_to_not_convert"]


def test_an_older_name_of_the_description_goes_too(tmp_path: Path) -> None:
    source = make_quantised(tmp_path / "source", "llama", "fp8-channel")
    config = config_of(source)
    config["compression_config"] = config.pop("quantization_config")
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "native", dequantize=True)
    consolidate(tmp_path / "native", tmp_path / "plain")
    assert not {"compression_config", "quantization_config"} & config_of(tmp_path / "plain").keys()
    assert DTYPES["BF16"] in open_checkpoint(tmp_path / "plain").leaf_dtypes().values()
