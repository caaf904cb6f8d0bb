"""The public names of `dse`, and that every `__all__` equals the exports."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dse
from dse import errors

ROOT = Path(dse.__file__).parent
PACKAGES = sorted(path.parent for path in ROOT.glob("*/__init__.py"))
SCRIPTS = ("__main__", "vllm_backend", "transformers_backend", "onnxruntime_backend", "openvino_backend")
"""Files that run in other ways than by import; the backends of engines run in interpreters of their own."""
MODULES = sorted(path for path in ROOT.rglob("*.py") if "templates" not in path.parts and path.stem not in SCRIPTS)


def module_name(path: Path) -> str:
    parts = (path.parent if path.name == "__init__.py" else path.with_suffix("")).relative_to(ROOT.parent).parts
    return ".".join(parts)


def exported(source: str) -> set[str]:
    """Public names that a module imports from others or defines at its top level."""
    names: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dse"):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.If):  # `if TYPE_CHECKING:` lists the names that `__getattr__` loads
            names |= exported(ast.unparse(ast.Module(node.body, [])))
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def test_all_of_dse_equals_its_exports() -> None:
    assert set(dse.__all__) == exported((ROOT / "__init__.py").read_text()) | {"__version__"}
    assert dse.__all__ == sorted(dse.__all__)
    assert dir(dse) == dse.__all__
    for name in dse.__all__:
        assert getattr(dse, name) is getattr(dse, name)
    with pytest.raises(AttributeError, match="has no attribute 'load_modell'; it offers DesignPoint, "):
        _ = dse.load_modell


def test_the_functions_behind_the_commands_exist() -> None:
    for name in ("load_model", "FactorBank", "decompose", "point_cost", "run_study", "open_study", "export_trials"):
        assert callable(getattr(dse, name))
    assert callable(dse.DesignPoint.uniform)
    assert callable(dse.SearchSpace.from_file)
    for name in ("trials", "front", "plot_front", "recommend"):
        assert callable(getattr(dse.Study, name))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_all_of_a_package_equals_its_exports(package: Path) -> None:
    module = importlib.import_module(f"dse.{package.name}")
    names = exported((package / "__init__.py").read_text())
    if hasattr(module, "__all__"):
        assert set(module.__all__) == names
    assert all(hasattr(module, name) for name in names)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_every_listed_name_of_a_module_exists(path: Path) -> None:
    if "dashboard" in path.parts and importlib.util.find_spec("dash") is None:
        pytest.skip("the live page needs Plotly Dash")
    listed = getattr(importlib.import_module(module_name(path)), "__all__", [])
    assert len(set(listed)) == len(listed)
    module = sys.modules[module_name(path)]
    assert [name for name in listed if not hasattr(module, name)] == []


def test_importing_dse_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'optuna', 'lm_eval', 'pandas', 'plotly', 'pydantic', 'tensorly'}"
    program = f"import sys, dse, dse.errors; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_example_of_the_docstring_works(tiny_folder: Path, own_cache: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", str(dse.__doc__), re.DOTALL)
    for real, tiny in (
        ("demo:smollm2-135m-instruct", str(tiny_folder / "model")),
        ("rank=64", "rank=4"),
        ("layers=[24, 25]", "layers=[0, 2]"),
    ):
        assert real in code
        code = code.replace(real, tiny)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "docstring", "exec"), {})
    # Up and down (48 x 32) of two layers at rank 4.
    topology = dse.load_topology(str(tiny_folder / "model"))
    saved = 4 * (48 * 32 - 4 * (48 + 32))
    assert float(printed.getvalue()) == pytest.approx(saved / topology.parameters_dense)


def test_the_error_tree_in_the_docstring_is_complete() -> None:
    drawn: dict[str, str | None] = {}
    above: list[str] = []
    for line in str(errors.__doc__).split("```")[1].strip().splitlines():
        branch, name = re.fullmatch(r"([│├└─ ]*)(\w+).*", line).groups()  # type: ignore[union-attr]
        depth = len(branch) // 4
        above[depth:] = [name]
        drawn[name] = above[depth - 1] if depth else None
    real: dict[str, str | None] = {"DseError": None}
    pending = [errors.DseError]
    while pending:
        parent = pending.pop()
        for child in parent.__subclasses__():
            if child.__module__ == "dse.errors":
                real[child.__name__] = parent.__name__
                pending.append(child)
    assert drawn == real
    assert {*real, "did_you_mean"} == set(errors.__all__)
    assert all(getattr(errors, name).__doc__ for name in real)
