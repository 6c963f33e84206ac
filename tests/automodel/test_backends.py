"""Choosing kernels: what is asked for runs or is refused; automatic choices say why they are not faster."""

from __future__ import annotations

import logging

import pytest
import torch

from automodel.backends import Backend, BackendReport, BackendRow, Resolved, require_attention, resolve_norm
from automodel.expert_backends import resolve_dispatch, resolve_experts
from automodel.kernels.packages import is_at_least
from automodel.logging import log_once
from automodel.scan_backends import resolve_mamba
from ckpt_tools.core.errors import UsageError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, Backend()),
        ("auto", Backend()),
        (
            "torch",
            Backend(
                **dict.fromkeys(("experts", "router", "norm", "mamba", "linear_attention", "linear"), "torch"),
                **dict.fromkeys(("sdpa", "loss"), "torch"),
                layers="eager",
                dispatch="all_to_all",
            ),
        ),
        ("te", Backend(**dict.fromkeys(("experts", "norm", "linear", "sdpa"), "te"))),
        ("grouped_mm", Backend(experts="grouped_mm")),
        ({"norm": "fused"}, Backend(norm="fused")),
        (Backend(norm="torch"), Backend(norm="torch")),
    ],
)
def test_backends_are_parsed(value: object, expected: Backend) -> None:
    assert Backend.parse(value) == expected


@pytest.mark.parametrize(
    ("value", "hint"),
    [({"expert": "torch"}, "experts"), ({"experts": "gruoped_mm"}, "grouped_mm"), ("triton", "grouped_mm")],
)
def test_unknown_names_are_refused_with_the_known_ones(value: object, hint: str) -> None:
    with pytest.raises(UsageError) as error:
        Backend.parse(value)
    assert hint in error.value.hint


def test_the_automatic_choice_falls_back_with_a_reason_and_the_named_one_refuses() -> None:
    resolved = resolve_experts(Backend(), CPU, torch.float64, 16, 8)
    assert resolved.kernel == "torch"
    assert "float64" in resolved.reason
    with pytest.raises(UsageError, match="float64"):
        resolve_experts(Backend(experts="grouped_mm"), CPU, torch.float64, 16, 8)
    assert resolve_experts(Backend(), CPU, torch.bfloat16, 16, 8).kernel == "grouped_mm"


def test_dispatch_is_symmetric_where_peers_and_kernel_allow_and_otherwise_says_why() -> None:
    assert resolve_dispatch(Backend(), "fused", None).kernel == "symmetric"
    hosts = resolve_dispatch(Backend(), "fused", "the ep axis is on 2 hosts")
    brought = "torch's grouped products multiply the rows that it brings"
    assert (hosts.kernel, hosts.reason) == ("all_to_all", f"the ep axis is on 2 hosts; {brought}")
    assert "these run grouped_mm" in resolve_dispatch(Backend(), "grouped_mm", None).reason
    assert resolve_dispatch(Backend(dispatch="all_to_all"), "fused", None).reason == f"asked for; {brought}"
    assert resolve_dispatch(Backend(dispatch="all_to_all"), "grouped_mm", None).reason == "asked for"
    assert resolve_dispatch(Backend(dispatch="deepep"), "fused", None).reason == brought
    with pytest.raises(UsageError, match="2 hosts"):
        resolve_dispatch(Backend(dispatch="symmetric"), "fused", "the ep axis is on 2 hosts")


def test_sonic_experts_run_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr("automodel.expert_backends.fused_obstacle", lambda *_: None)
    monkeypatch.setattr("automodel.expert_backends.sonic_obstacle", lambda *_, **__: None)
    monkeypatch.setattr("automodel.expert_backends.products_obstacle", lambda *_: None)
    assert resolve_experts(Backend(experts="sonic"), cuda, torch.bfloat16, 64, 64).kernel == "sonic"
    assert resolve_experts(Backend(), cuda, torch.bfloat16, 64, 64) == Resolved("fused")
    monkeypatch.setattr("automodel.expert_backends.sonic_obstacle", lambda *_, **__: "it is Tuesday")
    with pytest.raises(UsageError, match="sonic cannot run here: it is Tuesday"):
        resolve_experts(Backend(experts="sonic"), cuda, torch.bfloat16, 64, 64)


def test_fused_experts_say_why_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("automodel.expert_backends.fused_obstacle", lambda *_: None)
    monkeypatch.setattr("automodel.expert_backends.products_obstacle", lambda *_: "it is Tuesday")
    for backend in (Backend(), Backend(experts="fused")):
        found = resolve_experts(backend, torch.device("cuda"), torch.bfloat16, 64, 64)
        assert found == Resolved("fused", "torch's grouped products multiply: it is Tuesday")


def test_deepep_runs_when_asked_for_with_experts_that_weight_their_rows() -> None:
    for kernel in ("fused", "sonic"):
        assert resolve_dispatch(Backend(dispatch="deepep"), kernel, None).kernel == "deepep"
    with pytest.raises(UsageError, match="these run grouped_mm"):
        resolve_dispatch(Backend(dispatch="deepep"), "grouped_mm", None)
    assert resolve_dispatch(Backend(), "fused", None).reason == ""


def test_releases_of_packages_are_compared_by_number() -> None:
    assert is_at_least("torch", 2, 4)
    assert is_at_least("torch", 1, 99, 99)
    assert not is_at_least("torch", 99)
    assert not is_at_least("no-such-distribution", 0)


def test_mamba_layers_fall_back_with_a_reason_and_fused_kernels_by_name_refuse() -> None:
    resolved = resolve_mamba(Backend(), CPU, torch.bfloat16, 64, 4)
    assert (resolved.kernel, resolved.reason) == ("torch", "the fused kernels do not run on cpu")
    assert resolve_mamba(Backend(mamba="torch"), CPU, torch.bfloat16, 64, 4).reason == "asked for"
    with pytest.raises(UsageError, match="do not run on cpu"):
        resolve_mamba(Backend(mamba="fused"), CPU, torch.bfloat16, 64, 4)


@pytest.mark.parametrize(
    ("device", "dtype", "kernel"),
    [("cpu", torch.bfloat16, "torch"), ("cuda", torch.float32, "torch"), ("cuda", torch.bfloat16, "fused")],
)
def test_norms_are_fused_on_accelerators_in_half_precision(device: str, dtype: torch.dtype, kernel: str) -> None:
    resolved = resolve_norm(Backend(), torch.device(device), dtype)
    assert resolved.kernel == kernel
    assert bool(resolved.reason) == (kernel == "torch")


def test_only_native_attention_is_accepted() -> None:
    for name in (None, "sdpa", "eager"):
        require_attention(name)
    with pytest.raises(UsageError, match="flex_attention"):
        require_attention("flex_attention")


def test_the_report_is_an_aligned_table() -> None:
    report = BackendReport((BackendRow("experts", 12, "torch", "too odd"), BackendRow("norm", 3, "fused", "")))
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "count", "runs", "why", "not", "faster"]
    assert lines[1].index("torch") == lines[2].index("fused") == lines[0].index("runs")
    assert lines[2].endswith("-")


def test_the_report_logs_each_shortfall_once(caplog: pytest.LogCaptureFixture) -> None:
    log_once.cache_clear()
    report = BackendReport((BackendRow("experts", 1, "torch", "too odd"), BackendRow("norm", 1, "torch", "asked for")))
    with caplog.at_level(logging.INFO, logger="automodel"):
        report.log()
        report.log()
    assert [record.getMessage() for record in caplog.records] == ["experts: running torch: too odd"]
