"""The nodes and macros that families are written in, on sizes small enough to see."""

from __future__ import annotations

import numpy as np
import pytest

from ckpt_tools.core.errors import LayoutError
from ckpt_tools.layouts.layout import Shape, identity, resolve
from ckpt_tools.layouts.rules import Concat, Grouped, Leaf, Rule, Scope, Split, Stack, Transpose, interleave, same
from tests.layouts.test_algebra import forward

SIZES = {"hidden": 3, "width": 2, "query_heads": 4, "kv_heads": 2, "head_dim": 2, "query": 8, "key_value": 4}
SCOPE = Scope(SIZES, {"expert": 2, "layer": 1}, {"layer": 0})


def test_grouped_qkv_puts_each_kv_head_after_its_query_heads() -> None:
    node = Grouped(Leaf("q", "query", "hidden"), Leaf("k", "key_value", "hidden"), Leaf("v", "key_value", "hidden"))
    q, k, v = (np.arange(n * 3).reshape(n, 3) + base for n, base in ((8, 0), (4, 100), (4, 200)))
    out = forward(node.view(SCOPE), {"q": q, "k": k, "v": v})
    expected = np.concatenate([q[0:4], k[0:2], v[0:2], q[4:8], k[2:4], v[2:4]])
    assert np.array_equal(out, expected)


def test_interleaved_gate_and_up_alternate_with_gate_first() -> None:
    node = interleave(Leaf("g", "width", "hidden"), Leaf("u", "width", "hidden"))
    g, u = np.arange(6).reshape(2, 3), np.arange(6).reshape(2, 3) + 10
    assert np.array_equal(forward(node.view(SCOPE), {"g": g, "u": u}), np.stack([g[0], u[0], g[1], u[1]]))


def test_stacked_experts_keep_out_by_in_with_gate_rows_first() -> None:
    node = Stack(Concat(Leaf("g{expert}", "width", "hidden"), Leaf("u{expert}", "width", "hidden")), "expert")
    leaves = {f"{n}{e}": np.arange(6).reshape(2, 3) + 10 * i for i, (n, e) in enumerate(("g0", "u0", "g1", "u1"))}
    out = forward(node.view(SCOPE), leaves)
    assert out.shape == (2, 4, 3)
    assert np.array_equal(out[1], np.concatenate([leaves["g1"], leaves["u1"]]))


def test_a_transposed_and_split_leaf_feeds_two_native_tensors() -> None:
    fused = Leaf("fused", 4, "hidden")
    leaves = {"fused": np.arange(12).reshape(4, 3)}
    up = forward(Transpose(Split(fused, 1, 2)).view(SCOPE), leaves)
    assert np.array_equal(up, leaves["fused"][2:].T)


def test_rules_that_leave_part_of_a_leaf_unused_are_refused() -> None:
    shape = Shape({"hidden": 4}, ("dense",))
    with pytest.raises(LayoutError, match="use 2 of 4 elements of w"):
        resolve("broken", [Rule("half", Split(Leaf("w", "hidden"), 0, 2))], shape)


def test_two_rules_for_one_native_tensor_are_refused() -> None:
    shape = Shape({"hidden": 4}, ("dense",))
    with pytest.raises(LayoutError, match="two rules of broken make w"):
        resolve("broken", [same("w", "hidden"), same("w", "hidden")], shape)


def test_missing_and_unexpected_names_are_listed_together_with_the_nearest_name() -> None:
    layout = identity({"model.norm.weight": (4,), "lm_head.weight": (4, 4)})
    with pytest.raises(LayoutError) as caught:
        layout.check_names(["model.norm.weight", "lm_haed.weight"], "hf", "here")
    message = str(caught.value)
    assert "1 missing\n  lm_head.weight" in message
    assert "lm_haed.weight  (nearest expected name: lm_head.weight)" in message
