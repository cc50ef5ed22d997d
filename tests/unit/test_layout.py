"""The house rules that nothing else would catch: packaging, who imports whom, nothing unpickled."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("dpllm", "quant", "kernels", "kvzip_bridge", "calib")
BASE = "base"  # dpllm/base: what every folder may import, and which imports nothing of ours
OURS = {*FOLDERS, BASE, "bench", "tests"}
MAY_IMPORT = {
    BASE: {BASE},
    "kernels": {"kernels", BASE},
    "quant": {"quant", "kernels", BASE},
    "calib": {"calib", "quant", "kernels", BASE},
    "kvzip_bridge": {"kvzip_bridge", "kernels", BASE},
    "dpllm": {*FOLDERS, BASE},
}


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported_modules(tree: ast.AST, package: list[str]) -> list[str]:
    """Dotted names a module imports; `from a import b` counts as a.b, relative ones are made absolute."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) - node.level + 1] if node.level else []
            base = [*up, *(node.module.split(".") if node.module else [])]
            found += [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            found += [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
    return found


def folder_of(module: str) -> str | None:
    """The folder of ours a dotted name belongs to; `dpllm.quant.x` is in quant, `dpllm.engine` in dpllm."""
    parts = module.split(".")
    if parts[0] == "dpllm" and len(parts) > 1 and parts[1] in OURS:
        return parts[1]
    return parts[0] if parts[0] in OURS else None


def package_name(file: Path) -> list[str]:
    parts = list(file.relative_to(ROOT).parent.parts)
    return parts if parts[0] == "dpllm" else ["dpllm", *parts]


def source_files() -> list[Path]:
    return [f for folder in FOLDERS for f in python_files(folder)]


@pytest.fixture(scope="module")
def setuptools_table():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_packages_listed_are_the_folders_with_python_files(setuptools_table):
    found = {".".join(package_name(f)) for f in source_files()}
    assert set(setuptools_table["packages"]) == found
    assert len(setuptools_table["packages"]) == len(found), "a package is listed twice"


def test_packages_are_mapped_to_their_folders(setuptools_table):
    expected = {f if f == "dpllm" else f"dpllm.{f}": f for f in FOLDERS}
    for name in sorted(
        p.name for p in (ROOT / "kernels").iterdir() if list(p.glob("*.py"))
    ):  # a namespace folder does not lend its sub-packages a place
        expected[f"dpllm.kernels.{name}"] = f"kernels/{name}"
    assert setuptools_table["package-dir"] == expected
    for package in setuptools_table["packages"]:
        parts = package.split(".")
        folder = ROOT.joinpath(*(parts[1:] if parts[1:2] and parts[1] in FOLDERS else parts))
        assert folder.is_dir(), package


def test_package_data_belongs_to_listed_packages(setuptools_table):
    assert set(setuptools_table["package-data"]) <= set(setuptools_table["packages"])
    assert (ROOT / "dpllm" / "py.typed").is_file()


def test_kernels_is_a_namespace_folder():
    """With an __init__.py it would hide Hugging Face's package of that name from transformers."""
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    others = [f for f in FOLDERS if f != "kernels"]
    assert all((ROOT / f / "__init__.py").is_file() for f in others)


@pytest.mark.parametrize("file", source_files(), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_follow_the_house_rules(file):
    tree = ast.parse(file.read_text())
    top, second = file.relative_to(ROOT).parts[:2]
    allowed = MAY_IMPORT[BASE if (top, second) == ("dpllm", BASE) else top]
    for module in imported_modules(tree, package_name(file)):
        owner = folder_of(module)
        assert owner is None or owner in allowed, f"{file} imports {module}"
        assert module.split(".")[0] not in OURS - {"dpllm"}, f"{file} imports {module} by its bare name"


def test_contexts_do_not_import_the_engine():
    """The engine imports dpllm/context, so an import back would be a circle, also one for type checkers alone."""
    for file in python_files("dpllm/context"):
        modules = imported_modules(ast.parse(file.read_text()), package_name(file))
        ours = [m.split(".") for m in modules if m.startswith("dpllm.")]
        assert not [m for m in ours if m[1] == "engine" or len(m) == 2], file


@pytest.mark.parametrize("file", source_files(), ids=lambda f: str(f.relative_to(ROOT)))
def test_nothing_is_unpickled(file):
    tree = ast.parse(file.read_text())
    roots = {m.split(".")[0] for m in imported_modules(tree, package_name(file))}
    assert not roots & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        if ast.unparse(node.func) == "torch.load":
            assert keywords.get("weights_only") is True, f"{file}:{node.lineno} torch.load"
        assert not keywords.get("allow_pickle"), f"{file}:{node.lineno} allow_pickle"
        assert not keywords.get("trust_remote_code"), f"{file}:{node.lineno} trust_remote_code"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import dpllm.quant.quantize_plan", {"quant"}),
        ("from dpllm import kernels", {"kernels"}),
        ("from dpllm.engine import load", {"dpllm"}),
        ("from ..calib import profile", {"calib"}),
        ("def f():\n    import bench.x", {"bench"}),
        ("import importlib\nimportlib.import_module('tests.tiny_models')", {"tests"}),
        ("import torch, numpy.random", {None}),
    ],
)
def test_the_import_finder_finds(source, expected):
    """The rules above are worth what this function sees."""
    modules = imported_modules(ast.parse(source), ["dpllm", "quant"])
    assert {folder_of(m) for m in modules if m != "importlib"} == expected


def loaded_after(statement: str) -> set[str]:
    """Top-level modules a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    return set(done.stdout.split())


def test_import_dpllm_is_light():
    loaded = loaded_after("import dpllm; dpllm.__version__; assert 'Engine' in dpllm.__all__")
    assert "dpllm" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "safetensors", "scipy"}


def test_every_export_resolves():
    import dpllm

    assert dpllm.InputError is sys.modules["dpllm.base.errors"].InputError
    assert all(getattr(dpllm, name) is not None for name in dpllm.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = dpllm.no_such_name
