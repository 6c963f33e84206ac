"""What a checkpoint holds and how its names change, from headers; no tensor is read and nothing is written."""

from __future__ import annotations

from pathlib import Path

from ckpt_tools.api.opening import opened, opened_beside
from ckpt_tools.api.reports import FamilyReport, InspectReport
from ckpt_tools.engine import describe
from ckpt_tools.engine.describe import Difference, Explanation
from ckpt_tools.families import FAMILIES, get_family
from ckpt_tools.families.dialects import DIALECTS
from ckpt_tools.formats.remote import by_url


@by_url
def inspect(
    path: str | Path, *, family: str | None = None, dialect: str | None = None, like: str | Path | None = None
) -> InspectReport:
    """What a checkpoint holds, from its headers."""
    checkpoint = opened(path, family=family, dialect=dialect, like=like)
    store, manifest = checkpoint.store, checkpoint.manifest
    return InspectReport(
        str(path),
        store.kind,
        checkpoint.layout.family,
        checkpoint.side,
        checkpoint.spelling,
        checkpoint.prefix,
        len(store.tensors),
        sum(t.numel for t in store.tensors.values()),
        store.nbytes,
        dict(store.files),
        tuple(describe.group_tensors(store)),
        dict(store.skipped),
        (*checkpoint.dropped, *checkpoint.duplicates),
        checkpoint.side_files,
        {"tool": manifest.tool, **manifest.source} if manifest else {},
    )


@by_url
def diff(
    left: str | Path, right: str | Path, *, family: str | None = None, like: str | Path | None = None
) -> list[Difference]:
    """Tensors that two checkpoints do not have in common, or have with another shape or dtype. Values are not read.

    `like` is for those of the two that have no config.json of their own.
    """
    return describe.differences(opened_beside(left, family, like), opened_beside(right, family, like))


@by_url
def explain(
    path: str | Path,
    name: str,
    *,
    family: str | None = None,
    dialect: str | None = None,
    like: str | Path | None = None,
) -> list[Explanation]:
    """What a tensor's name is on the other side of the layout, and how it is made."""
    return describe.explain(opened(path, family=family, dialect=dialect, like=like).layout, name)


def list_families() -> list[FamilyReport]:
    """The families that have a native layout; everything else keeps its names (`identity`)."""
    return [
        FamilyReport(
            family.name,
            family.title,
            family.architecture,
            family.model_types,
            family.data_only,
            tuple((rule.native, rule.value.describe()) for rule in family.rules),
            tuple(name for name, dialect in DIALECTS.items() if family.name in dialect.families),
        )
        for family in map(get_family, FAMILIES)
    ]
