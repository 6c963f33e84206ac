"""Orders of safetensors files: every tensor once, aligned to its elements, and most bytes where they should be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ckpt_tools.formats.arrangement import ALIGNMENT, aligned_order, congruent_files, congruent_order

BLOCKS, NORM, HEAD = 1 << 20, 2048, 256


def positions(start: int, order: list[str], sizes: dict[str, int]) -> dict[str, int]:
    found = {}
    for name in order:
        found[name] = start
        start += sizes[name]
    return found


@given(
    tensors=st.lists(
        st.tuples(st.integers(0, 20_000), st.sampled_from([8, 16, 32, 64]), st.none() | st.integers(0, 511)),
        min_size=1,
        max_size=20,
    )
)
def test_every_tensor_has_one_place_that_is_aligned_to_its_elements(
    tensors: list[tuple[int, int, int | None]],
) -> None:
    sizes = {str(i): count * width // 8 for i, (count, width, _) in enumerate(tensors)}
    widths = {str(i): width for i, (_, width, _) in enumerate(tensors)}
    residues = {str(i): 8 * residue for i, (_, _, residue) in enumerate(tensors) if residue is not None}
    start, order = congruent_order(sizes, widths, residues)
    assert sorted(order) == sorted(sizes)
    assert start in {0, *residues.values()}
    assert all(at % (widths[name] // 8) == 0 for name, at in positions(start, order, sizes).items())
    groups = congruent_files(sizes, residues)
    assert sorted(name for group in groups for name in group) == sorted(sizes)


def test_tensors_that_all_want_a_block_keep_the_order_of_aligned_ones() -> None:
    sizes = {"norm": NORM, "a": BLOCKS, "odd": BLOCKS + 8, "b": BLOCKS}
    widths = dict.fromkeys(sizes, 16)
    start, order = congruent_order(sizes, widths, {"a": 0, "b": 0, "odd": 0})
    assert (start, order[:3]) == (0, ["a", "b", "odd"])
    assert aligned_order(sizes, widths)[:2] == ["a", "b"]


def test_small_tensors_lead_from_one_residue_to_the_next() -> None:
    """As in a published file: norms between the weights of layers, each of which lies at another residue."""
    sizes, residues, at = {}, {}, 1320
    for layer in range(8):
        for name, nbytes in (("norm", NORM), ("experts", 64 * BLOCKS), ("k_norm", HEAD), ("o_proj", BLOCKS)):
            sizes[f"{layer}.{name}"] = nbytes
            if nbytes % ALIGNMENT == 0:
                residues[f"{layer}.{name}"] = at % ALIGNMENT
            at += nbytes
    start, order = congruent_order(sizes, dict.fromkeys(sizes, 16), residues)
    found = positions(start, order, sizes)
    good = sum(sizes[name] for name, residue in residues.items() if found[name] % ALIGNMENT == residue)
    assert good > 0.98 * sum(sizes.values())


def test_residues_that_no_small_tensor_leads_to_get_a_file_of_their_own_when_they_are_many() -> None:
    sizes = {"a": 64 * BLOCKS, "norm": NORM, "b": 64 * BLOCKS, "c": BLOCKS // 2, "d": 64 * BLOCKS}
    residues = {"a": 8, "b": 16, "c": 24, "d": 8 + NORM}
    assert congruent_files(sizes, residues) == [["a", "norm", "d"], ["b", "c"]]
    assert congruent_files(sizes, {}) == [list(sizes)]
