"""The scan in chunks and the causal convolution against the plain recurrence and sum in float64, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from automodel.kernels.mamba import causal_conv, fused_mamba_obstacle, state_space_scan

BATCH, HEADS, GROUPS, HEAD_DIM, STATE = 2, 4, 2, 3, 5
CPU = torch.device("cpu")
LENGTHS = [1, 5, 8, 17, 24]


def inputs(length: int, *, rates: float = 1.0) -> list[torch.Tensor]:
    """x, time steps, A, B, C, D and an initial state, in float64."""
    torch.manual_seed(length)
    shapes = [(BATCH, length, HEADS, HEAD_DIM), (BATCH, length, HEADS), (HEADS,)]
    shapes += [(BATCH, length, GROUPS, STATE)] * 2 + [(HEADS,), (BATCH, HEADS, HEAD_DIM, STATE)]
    x, step, rate, into, out, skip, state = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return [x, F.softplus(step), -rates * rate.exp(), into, out, skip, state]


def documents(length: int) -> torch.Tensor:
    """Segments that begin within chunks and at their edges, and more than one in a chunk."""
    begins = torch.zeros(BATCH, length, dtype=torch.bool)
    begins[0, 3::7] = True
    begins[1, 8::8] = True
    return begins.cumsum(-1)


def recurrence(
    x: torch.Tensor,
    step: torch.Tensor,
    A: torch.Tensor,
    into: torch.Tensor,
    out: torch.Tensor,
    skip: torch.Tensor,
    state: torch.Tensor | None,
    segment: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token, from the definition."""
    into, out = (t.repeat_interleave(HEADS // GROUPS, 2) for t in (into, out))
    state = torch.zeros_like(x[:, 0, :, :, None] * into[:, 0, :, None]) if state is None else state
    rows = []
    for t in range(x.shape[1]):
        if segment is not None and t:
            state = state * (segment[:, t] == segment[:, t - 1]).view(-1, 1, 1, 1)
        decay = (step[:, t] * A).exp()[..., None, None]
        state = decay * state + (step[:, t, :, None] * x[:, t])[..., None] * into[:, t, :, None]
        rows.append((state * out[:, t, :, None]).sum(-1) + skip[:, None] * x[:, t])
    return torch.stack(rows, 1), state


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("segments", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("started", [False, True], ids=["from zero", "from a state"])
def test_the_scan_is_the_recurrence(length: int, segments: bool, started: bool) -> None:
    *given, state = inputs(length)
    leaves = [t.requires_grad_() for t in given + ([state] if started else [])]
    copies = [t.detach().clone().requires_grad_() for t in leaves]
    segment = documents(length) if segments else None
    initial, initial_copy = (leaves[6], copies[6]) if started else (None, None)
    actual = state_space_scan(*leaves[:6], 8, "torch", initial_BHPN=initial, segment_BS=segment)
    exact = recurrence(*copies[:6], initial_copy, segment)
    for mine, theirs in zip(actual, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    for made in (actual, exact):
        weights = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t) for t in made]
        sum((t * w).sum() for t, w in zip(made, weights, strict=True)).backward()
    for mine, theirs in zip(leaves, copies, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cut", [1, 8, 11])
def test_a_state_carries_a_sequence_on_from_where_it_was_cut(cut: int) -> None:
    x, step, A, into, out, skip, _ = inputs(20)
    whole, last = state_space_scan(x, step, A, into, out, skip, 8, "torch")
    parts, state = [], None
    for part in (slice(0, cut), slice(cut, cut + 1), slice(cut + 1, None)):
        sliced = [t[:, part] for t in (x, step, into, out)]
        y, state = state_space_scan(*sliced[:2], A, *sliced[2:], skip, 8, "torch", initial_BHPN=state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-10)


def test_float32_is_exact_to_rounding_beside_a_decay_that_forgets_everything() -> None:
    x, step, A, into, out, skip, _ = inputs(64)
    step[:, 5] = 1e4
    exact, _ = recurrence(x, step, A, into, out, skip, None, None)
    wide = [t.float() for t in (x, step, A, into, out, skip)]
    actual, state = state_space_scan(*wide, 64, "torch")
    assert actual.dtype == state.dtype == torch.float32
    after = slice(6, None)
    # Differences of sums from the chunk's beginning would be wrong by 5e-4 here.
    assert (actual[:, after].double() - exact[:, after]).abs().max() < 2e-6 * exact[:, after].abs().max()


@pytest.mark.parametrize("length", [1, 3, 9])
@pytest.mark.parametrize("segments", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_the_convolution_sees_the_last_tokens_of_its_own_document(length: int, segments: bool, bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, constant = (torch.randn(s, dtype=torch.float64) for s in ((BATCH, length, 6), (6, 4), (6,)))
    segment = documents(length) if segments else None
    expected = torch.zeros_like(x) + (constant if bias else 0)
    for t in range(length):
        for lag in range(min(4, t + 1)):
            same = 1 if segment is None else (segment[:, t] == segment[:, t - lag]).unsqueeze(-1)
            expected[:, t] += weight[:, 3 - lag] * x[:, t - lag] * same
    actual = causal_conv(x, weight, constant if bias else None, "torch", segment)
    torch.testing.assert_close(actual, F.silu(expected))


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [("cpu", torch.bfloat16, "do not run on cpu"), ("cuda", torch.bfloat16, "mamba_ssm and causal_conv1d are not")],
)
def test_obstacles_to_the_fused_kernels_are_named(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, reason: str
) -> None:
    monkeypatch.setattr("automodel.kernels.mamba.is_installed", lambda _: False)
    assert reason in (fused_mamba_obstacle(torch.device(device), dtype, 64, 4) or "")


@pytest.mark.parametrize(
    ("dtype", "channels", "width", "reason"),
    [
        (torch.bfloat16, 64, 4, None),
        (torch.float32, 64, 4, "float32"),
        (torch.bfloat16, 60, 4, "multiples of 8"),
        (torch.bfloat16, 64, 5, "width 5"),
    ],
)
def test_installed_kernels_have_limits_of_their_own(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, channels: int, width: int, reason: str | None
) -> None:
    monkeypatch.setattr("automodel.kernels.mamba.is_installed", lambda _: True)
    obstacle = fused_mamba_obstacle(torch.device("cuda"), dtype, channels, width)
    assert obstacle is None if reason is None else reason in (obstacle or "")
