"""The public surface, frozen: verbs with their options, and the names and signatures that Python callers use.

A difference is a decision, to be seen in review. When it is meant, write the new surface with

    python tests/test_surface.py
"""

from __future__ import annotations

import ast
import inspect
import json
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import ckpt_tools
from ckpt_tools import api
from ckpt_tools.cli.failures import EXIT_CODES
from ckpt_tools.cli.reference import verbs
from ckpt_tools.core import packages
from ckpt_tools.engine import describe, place

ROOT = Path(__file__).parents[1]
FROZEN = Path(__file__).with_name("surface.json")
REPORTS = (
    api.CopyReport,
    api.VerifyReport,
    api.RoundtripReport,
    api.InspectReport,
    api.FamilyReport,
    api.Diagnosis,
    api.ToolsReport,
    api.CheckpointReport,
    api.TrainingReport,
    api.ModelReport,
    api.GpuReport,
    api.LayerReport,
    api.Problem,
    packages.PackageReport,
    place.Place,
    describe.TensorGroup,
    describe.Difference,
    describe.Explanation,
)
"""What functions return and what `--json` prints."""
COMMAND = "python tests/test_surface.py"


def surface() -> dict[str, Any]:
    """Everything that users can rely on."""
    return {
        "command": {verb.name: [_parameter(asdict(p)) for p in verb.parameters] for verb in verbs()},
        "exit_codes": sorted(EXIT_CODES),
        "reports": {kind.__name__: _described(kind) for kind in REPORTS},
        "ckpt_tools": {name: _described(getattr(ckpt_tools, name)) for name in sorted(ckpt_tools.__all__)},
        "automodel": _public_names(ROOT / "automodel" / "__init__.py"),
        "automodel.training": _public_names(ROOT / "automodel" / "training" / "__init__.py"),
    }


def _parameter(described: dict[str, Any]) -> str:
    default = "required" if described["required"] else described["default"]
    return f"{' '.join(described['names'])}: {described['values']} = {default}"


def _described(value: object) -> str | dict[str, str]:
    if is_dataclass(value):
        return {field.name: str(field.type) for field in fields(value)}
    if inspect.isfunction(value):
        return str(inspect.signature(value))
    return "class" if isinstance(value, type) else type(value).__name__


def _public_names(module: Path) -> list[str]:
    """`__all__` of a module, read and not imported: the module may need torch."""
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return sorted(ast.literal_eval(node.value))
    raise LookupError(f"{module} has no __all__")


def test_the_public_surface_is_the_frozen_one() -> None:
    frozen, found = json.loads(FROZEN.read_text(encoding="utf-8")), json.loads(json.dumps(surface()))
    for part in frozen.keys() | found.keys():
        assert found.get(part) == frozen.get(part), f"the surface of {part} changed; when that is meant: {COMMAND}"


def test_functions_and_verbs_of_one_name_have_the_same_parameters_and_defaults() -> None:
    spelled_otherwise = {"file_format": "format", "readers": "for"}
    for verb in verbs():
        if verb.name not in ckpt_tools.__all__:
            continue
        function = getattr(ckpt_tools, verb.name)
        wanted = {
            spelled_otherwise.get(name, name).replace("_", "-"): parameter.default
            for name, parameter in inspect.signature(function).parameters.items()
            if name not in ("progress", "ranks") and parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        options = {
            parameter.names[0].removeprefix("--"): {None: None, "on": True}.get(parameter.default, parameter.default)
            for parameter in verb.parameters
            if parameter.kind == "option" and not {"--json", "--quiet"} & set(parameter.names)
        }
        assert options == {name: None if default is False else default for name, default in wanted.items()}, verb.name


if __name__ == "__main__":
    FROZEN.write_text(json.dumps(surface(), indent=2) + "\n", encoding="utf-8")
