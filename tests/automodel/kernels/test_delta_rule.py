"""The gated delta rule: by chunks it gives what its definition gives token by token, whatever the lengths."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from automodel.kernels import packages
from automodel.kernels.delta_rule import chunked_delta_rule, fla_obstacle, gated_delta_rule, recurrent_delta_rule
from automodel.kernels.short_conv import short_conv
from tests.automodel.helpers import relative

LENGTHS = [1, 2, 63, 64, 65, 131]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(length: int, dtype: torch.dtype = torch.float64, *, batch: int = 2, seed: int = 0) -> Inputs:
    """Queries, keys [B, S, H, K], values [B, S, H, V], decays and betas [B, S, H]; heads forget slowly to at once."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(batch, length, 3, *shape, generator=generator, dtype=torch.float64)

    query, key, value = draw(8), draw(8), draw(6)
    decay, beta = -draw().exp() * torch.tensor([1e-3, 0.05, 1.0]), draw().sigmoid()
    return tuple(x.to(dtype) for x in (query, key, value, decay, beta))


def state(seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(values: Inputs, initial: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence written out for one row and head at a time, in FP64."""
    query, key, value, decay, beta = (x.double() for x in values)
    out, last = torch.empty_like(value), torch.zeros(*value.shape[:1], 3, 8, 6, dtype=torch.float64)
    for b, h in torch.cartesian_prod(torch.arange(len(value)), torch.arange(3)).tolist():
        memory = torch.zeros(8, 6, dtype=torch.float64) if initial is None else initial[b, h]
        for t in range(value.shape[1]):
            q, k = (x[b, t, h] / (x[b, t, h].square().sum() + 1e-6).sqrt() for x in (query, key))
            memory = decay[b, t, h].exp() * memory
            memory = memory + torch.outer(k, beta[b, t, h] * (value[b, t, h] - k @ memory))
            out[b, t, h] = q @ memory / 8**0.5
        last[b, h] = memory
    return out, last


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("initial", [None, state()])
def test_every_length_and_initial_state_gives_what_the_definition_gives(
    length: int, initial: torch.Tensor | None
) -> None:
    values = inputs(length)
    expected, last = by_definition(values, initial)
    output, found = gated_delta_rule(*values, "torch", state_BHKV=initial)
    assert relative(output, expected) < 1e-12
    assert relative(found, last) < 1e-12


@pytest.mark.parametrize("chunk", [1, 3, 16, 64, 200])
def test_the_size_of_a_chunk_changes_nothing(chunk: int) -> None:
    query, key, value, decay, beta = (x.transpose(1, 2) for x in inputs(50))
    one, two = (
        rule(query, key, value, decay, beta, state(), **options)
        for rule, options in ((recurrent_delta_rule, {}), (chunked_delta_rule, {"chunk": chunk}))
    )
    # Keys that are not normalised make states that grow; only rounding may differ.
    assert all(relative(a, b) < 1e-9 for a, b in zip(one, two, strict=True))


def test_gradients_are_those_of_the_definition() -> None:
    weight = torch.linspace(-1, 1, 6, dtype=torch.float64)
    gradients = []
    for rule in (
        lambda *x: gated_delta_rule(*x[:-1], "torch", state_BHKV=x[-1]),
        lambda *x: by_definition(x[:-1], x[-1]),
    ):
        values = [x.requires_grad_() for x in (*inputs(67), state())]
        output, last = rule(*values)
        ((output * weight).sum() + (last * weight).sum()).backward()
        gradients.append([x.grad for x in values])
    assert all(relative(a, b) < 1e-9 for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    values = inputs(100, dtype)
    expected, last = by_definition(values)
    output, found = gated_delta_rule(*values, "torch")
    assert output.dtype == dtype
    assert found.dtype == torch.float32
    assert relative(found, last) < 1e-5
    assert relative(output, expected) < (1e-5 if dtype == torch.float32 else 5e-3)


def test_strong_decays_neither_overflow_nor_leave_nans_in_gradients() -> None:
    query, key, value, decay, beta = (x.requires_grad_() for x in inputs(130, torch.float32))
    output, last = gated_delta_rule(query, key, value, decay * 1000, beta, "torch")
    (output.sum() + last.sum()).backward()
    assert all(torch.isfinite(x).all() for x in (output, last, *(x.grad for x in (query, key, value, decay, beta))))


@pytest.mark.parametrize("lengths", [(1, 1, 128), (64, 66), (130,), (3, 60, 1, 1, 65)])
def test_documents_of_a_row_do_not_reach_into_one_another(lengths: tuple[int, ...]) -> None:
    values = inputs(130)
    other = sum(lengths[:-1])  # the second row: one document, then the last one of the first row's length
    numbers = torch.stack(
        [
            torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
            torch.cat([torch.zeros(other), torch.ones(lengths[-1])]).long(),
        ]
    )
    output, last = gated_delta_rule(*values, "torch", document_BS=numbers)
    for row, parts in enumerate((lengths, tuple(n for n in (other, lengths[-1]) if n))):
        split = zip(*(x[row : row + 1].split(parts, dim=1) for x in values), strict=True)
        alone = [by_definition(part) for part in split]
        assert relative(output[row], torch.cat([o for o, _ in alone], 1)[0]) < 1e-12
        assert relative(last[row], alone[-1][1][0]) < 1e-12


def test_the_convolution_takes_each_token_and_those_before_it() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 5, 9, generator=generator), torch.randn(5, 4, generator=generator)
    padded = torch.nn.functional.pad(x, (3, 0))
    expected = torch.stack([(padded[..., t : t + 4] * weight).sum(-1) for t in range(9)], -1)
    assert relative(short_conv(padded, weight), torch.nn.functional.silu(expected)) < 1e-6
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    packed = short_conv(padded, weight, document_BS=documents)
    parts = [short_conv(torch.nn.functional.pad(part, (3, 0)), weight) for part in x[:1].split((4, 5), dim=2)]
    assert relative(packed[:1], torch.cat(parts, 2)) < 1e-6
    assert relative(packed[1:], short_conv(padded, weight)[1:]) < 1e-6


def _library_rule(q, k, v, *, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens=None):
    """flash-linear-attention's function as it documents it: rows, or one row of sequences that `cu_seqlens` bounds."""
    assert output_final_state
    assert use_qk_l2norm_in_kernel
    values = (q, k, v, g, beta)
    if cu_seqlens is None:
        return gated_delta_rule(*values, "torch", state_BHKV=initial_state)
    assert (len(q), initial_state) == (1, None)
    lengths = cu_seqlens.diff().tolist()
    parts = [gated_delta_rule(*part, "torch") for part in zip(*(x.split(lengths, dim=1) for x in values), strict=True)]
    return torch.cat([output for output, _ in parts], 1), torch.cat([last for _, last in parts])


@pytest.mark.parametrize("length", [1, 30])
@pytest.mark.parametrize("packed", [False, True])
def test_flash_linear_attention_is_called_as_it_documents(
    monkeypatch: pytest.MonkeyPatch, length: int, packed: bool
) -> None:
    rules = {"chunk_gated_delta_rule": _library_rule, "fused_recurrent_gated_delta_rule": _library_rule}
    library = SimpleNamespace(**rules)
    for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule"):
        monkeypatch.setitem(sys.modules, name, library)
    documents = (torch.arange(length) >= 12).long() + torch.tensor([[0], [3]]) * (torch.arange(length) >= 20)
    options = {"document_BS": documents} if packed else {"state_BHKV": state()}
    expected = gated_delta_rule(*inputs(length), "torch", **options)
    actual = gated_delta_rule(*inputs(length), "fla", **options)
    assert all(relative(a, b) < 1e-12 for a, b in zip(actual, expected, strict=True))


def test_flash_linear_attention_says_why_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fla_obstacle(torch.device("cpu"), torch.bfloat16, training=False)
    monkeypatch.setattr("automodel.kernels.delta_rule.is_installed", lambda _: True)
    assert "float32" in fla_obstacle(torch.device("cuda"), torch.float32, training=False)


@pytest.mark.parametrize(
    ("hopper", "releases", "trains"),
    [
        (True, {"triton": (3, 3, 1)}, True),
        (True, {"triton": (3, 6, 0)}, False),
        (True, {"triton": (3, 7, 0)}, False),
        (True, {"triton": (3, 7, 1)}, True),
        (True, {"triton": (3, 6, 0), "tilelang": (0, 1, 9)}, True),
        (False, {"triton": (3, 6, 0)}, True),
    ],
)
def test_flash_linear_attention_does_not_train_where_it_refuses_to(
    monkeypatch: pytest.MonkeyPatch, hopper: bool, releases: dict[str, tuple[int, ...]], trains: bool
) -> None:
    monkeypatch.setattr("automodel.kernels.delta_rule.is_installed", lambda _: True)
    monkeypatch.setattr(packages, "_release", lambda name: releases.get(name, ()))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0) if hopper else (10, 0))
    cuda = torch.device("cuda")
    assert fla_obstacle(cuda, torch.bfloat16, training=False) is None
    assert (fla_obstacle(cuda, torch.bfloat16, training=True) is None) == trains
