"""Quantised repositories: dequantised through any mesh, quantised again, and never changed without being asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_tools import consolidate, convert, inspect, plan, roundtrip, verify
from ckpt_tools.core.dtypes import DTYPES
from ckpt_tools.core.errors import LayoutError, ResourceError, UsageError
from ckpt_tools.families import get_family
from tests.checkpoints import CONFIGS, tensor_bytes, write_repository
from tests.quantised import ALL_FORMS, E2M1, FORMS, as_bf16, decoded, fp8_reference, make_quantised

MESHES = st.one_of(st.none(), st.builds("dp_shard={},ep={}".format, st.integers(1, 4), st.integers(1, 4)))


@settings(max_examples=15, deadline=None)
@given(
    what=st.sampled_from(ALL_FORMS),
    mesh=MESHES,
    seed=st.integers(0, 3),
    dtype=st.sampled_from([None, "F32"]),
    changes=st.fixed_dictionaries(
        {}, optional={"num_hidden_layers": st.just(1), "hidden_size": st.sampled_from([64, 288])}
    ),
)
def test_a_quantised_repository_dequantises_to_the_same_values_through_any_mesh(
    tmp_path_factory: pytest.TempPathFactory,
    what: tuple[str, str],
    mesh: str | None,
    seed: int,
    dtype: str | None,
    changes: dict[str, Any],
) -> None:
    root = tmp_path_factory.mktemp("case")
    source = make_quantised(root / "source", *what, seed=seed, **changes)
    convert(source, root / "native", mesh=mesh, dequantize=True, dtype=dtype)
    if dtype is None:
        verify(root / "native", against=source)
        verify(source, against=root / "native")
    consolidate(root / "native", root / "plain")
    verify(root / "plain", against=root / "native")
    if dtype == "F32" and what[0] != "gpt_oss":
        expected, plain = decoded(source), tensor_bytes(root / "plain")
        assert expected
        for name, values in expected.items():
            assert plain[name] == values.astype(np.float32).tobytes(), name


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "minimax_m2"])
def test_fp8_leaves_equal_a_float64_reference(tmp_path: Path, family: str) -> None:
    source = make_quantised(tmp_path / "source", family)
    convert(source, tmp_path / "native", mesh="dp_shard=3,ep=2", dequantize=True)
    consolidate(tmp_path / "native", tmp_path / "plain")
    stored, plain = tensor_bytes(source), tensor_bytes(tmp_path / "plain")
    layout = get_family(family).layout(json.loads((source / "config.json").read_bytes()))
    encoded = [name for name in stored if name + "_scale_inv" in stored]
    assert len(encoded) > 10
    for name, data in plain.items():
        if name in encoded:
            assert data == fp8_reference(stored[name], stored[name + "_scale_inv"], layout.leaves[name].shape), name
        else:
            assert data == stored[name]


def test_mxfp4_experts_equal_a_float64_reference_in_the_native_layout(tmp_path: Path) -> None:
    source = make_quantised(tmp_path / "source", "gpt_oss")
    convert(source, tmp_path / "native", dequantize=True)
    consolidate(tmp_path / "native", tmp_path / "plain")
    stored, plain = tensor_bytes(source), tensor_bytes(tmp_path / "plain")
    for name in ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"):
        layout = get_family("gpt_oss").layout(CONFIGS["gpt_oss"], form="mxfp4")
        experts, out, width = layout.leaves[name].shape
        blocks = np.frombuffer(stored[name + "_blocks"], np.uint8).reshape(-1, 16)
        scales = np.exp2(np.frombuffer(stored[name + "_scales"], np.uint8).astype(np.float64) - 127)
        pairs = np.stack([E2M1[blocks & 15], E2M1[blocks >> 4]], -1).reshape(-1, 32) * scales[:, None]
        expected = pairs.reshape(experts, out, width).transpose(0, 2, 1)
        assert plain[name] == as_bf16(expected)


@pytest.mark.parametrize("family", sorted(FORMS))
def test_quantising_what_was_dequantised_gives_the_same_values_back(tmp_path: Path, family: str) -> None:
    source = make_quantised(tmp_path / "source", family)
    convert(source, tmp_path / "native", mesh="ep=2", dequantize=True)
    consolidate(tmp_path / "native", tmp_path / "again", quantize=FORMS[family])
    assert inspect(tmp_path / "again").tensors == inspect(source).tensors
    verify(tmp_path / "again")
    before, after = tensor_bytes(source), tensor_bytes(tmp_path / "again")
    config = json.loads((tmp_path / "again/config.json").read_bytes())
    assert config["quantization_config"] == json.loads((source / "config.json").read_bytes())["quantization_config"]
    if FORMS[family] == "mxfp4":
        verify(tmp_path / "again", against=source)
    else:
        layout = get_family(family).layout(json.loads((source / "config.json").read_bytes()))
        encoded = [name for name in before if name + "_scale_inv" in before]
        assert encoded
        for name in encoded:
            old, new = (
                np.frombuffer(fp8_reference(t[name], t[name + "_scale_inv"], layout.leaves[name].shape), np.uint16)
                .view(ml_dtypes.bfloat16)
                .astype(np.float64)
                for t in (before, after)
            )
            assert np.array_equal(np.isnan(old), np.isnan(new)), name
            # A block that does not reach 448 gets another scale: its codes are rounded once more, by 2**-4 at most.
            largest = np.nanmax(np.abs(old))
            assert np.allclose(old, new, rtol=2**-4 + 2**-7, atol=largest / 448 * 2**-9, equal_nan=True), name


def test_quantised_checkpoints_are_neither_converted_nor_consolidated_without_being_asked(tmp_path: Path) -> None:
    source = make_quantised(tmp_path / "source", "gpt_oss")
    with pytest.raises(UsageError, match="quantised") as caught:
        convert(source, tmp_path / "native")
    assert "--dequantize" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="already a Hugging Face repository"):
        consolidate(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_a_plain_export_of_a_quantised_source_no_longer_says_that_it_is_quantised(tmp_path: Path) -> None:
    source = make_quantised(tmp_path / "source", "deepseek_v3")
    convert(source, tmp_path / "native", dequantize=True)
    consolidate(tmp_path / "native", tmp_path / "plain")
    config = json.loads((tmp_path / "plain/config.json").read_bytes())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "bfloat16"


def test_a_plain_source_can_be_published_in_fp8_with_its_plain_modules_named(tmp_path: Path) -> None:
    from tests.checkpoints import make_repository

    source = make_repository(tmp_path / "source", "qwen3_moe")
    convert(source, tmp_path / "native")
    consolidate(tmp_path / "native", tmp_path / "fp8", quantize="fp8")
    config = json.loads((tmp_path / "fp8/config.json").read_bytes())
    plain = config["quantization_config"]["modules_to_not_convert"]
    assert "lm_head" in plain
    assert "model.layers.0.mlp.gate" in plain
    assert "model.layers.0.self_attn.q_proj" not in plain
    verify(tmp_path / "fp8")
    assert inspect(tmp_path / "fp8").family == "qwen3_moe"


def test_an_unknown_form_names_the_known_ones(tmp_path: Path) -> None:
    source = make_quantised(tmp_path / "source", "gpt_oss")
    convert(source, tmp_path / "native", dequantize=True)
    with pytest.raises(UsageError) as caught:
        consolidate(tmp_path / "native", tmp_path / "out", quantize="fp8")
    assert "mxfp4" in (caught.value.hint or "")


def test_a_missing_scale_is_a_missing_tensor(tmp_path: Path) -> None:
    config = {**CONFIGS["gpt_oss"]}
    layout = get_family("gpt_oss").layout(config, form="mxfp4")
    tensors = {}
    for leaf in layout.leaves.values():
        parts = leaf.encoding.parts(leaf.name, leaf.shape) if leaf.encoding else ()
        tensors.update({p.name: (p.dtype, p.shape) for p in parts} or {leaf.name: (DTYPES["BF16"], leaf.shape)})
    tensors.pop("model.layers.0.mlp.experts.down_proj_scales")
    source = write_repository(tmp_path / "source", tensors, config)
    with pytest.raises(LayoutError, match="missing"):
        convert(source, tmp_path / "native", dequantize=True)


@pytest.mark.parametrize("family", sorted(FORMS))
def test_roundtrip_of_a_quantised_repository_compares_its_values(tmp_path: Path, family: str) -> None:
    source = make_quantised(tmp_path / "source", family)
    assert roundtrip(source, work=tmp_path).family == family


def test_a_memory_bound_counts_the_blocks_that_quantising_holds(tmp_path: Path) -> None:
    source = make_quantised(tmp_path / "source", "deepseek_v3", intermediate_size=4096)
    convert(source, tmp_path / "native", dequantize=True)
    assert plan(tmp_path / "native", quantize="fp8", threads=1).memory >= 128 * 4096 * 16
    with pytest.raises(ResourceError, match="memory"):
        plan(tmp_path / "native", quantize="fp8", memory="5MB")
