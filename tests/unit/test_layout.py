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
# The house from the ground up. A room imports rooms of lower floors only; rooms of one floor do not know each other.
FLOORS = (
    ("base", "version", "reference"),
    ("kernels",),
    ("kvzip_bridge", "quant"),
    ("calib",),
    ("model",),
    ("policies",),
    ("decode", "control"),
    ("context", "evaluation"),
    ("accounting",),
    ("engine",),
    ("opening", "conversation", "planning", "prepare", "diagnostics"),
    ("report", "api"),
    ("commands",),
    ("dpllm", "__main__"),  # the package's face
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


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


def module_name(file: Path) -> str:
    parts = [*package_name(file), *([] if file.stem == "__init__" else [file.stem])]
    return ".".join(parts)


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    return {file: ast.parse(file.read_text()) for file in source_files()}


@pytest.fixture(scope="module")
def imports(trees) -> dict[str, set[str]]:
    """For each module of ours, the modules of ours that it imports, also inside functions and for type checking."""
    modules = {module_name(f) for f in trees}
    found = {}
    for file, tree in trees.items():
        named = imported_modules(tree, package_name(file))
        # `from a import b` is read as a.b, which is a module or a name in module a.
        ours = {n if n in modules else n.rpartition(".")[0] for n in named}
        found[module_name(file)] = (ours & modules) - {module_name(file)}
    return found


def room_of(module: str) -> str:
    """The room of a module: its folder, or the file itself where the file lies in dpllm/."""
    return module.split(".")[1] if "." in module else "dpllm"


def test_every_room_has_a_floor(imports):
    assert {room_of(m) for m in imports} == set(FLOOR_OF)


def test_rooms_import_lower_floors_only(imports):
    upward = [
        f"{module} imports {other}"
        for module, others in imports.items()
        for other in others
        if room_of(module) != room_of(other) and FLOOR_OF[room_of(other)] >= FLOOR_OF[room_of(module)]
    ]
    assert not upward


def test_no_modules_import_each_other_in_a_circle(imports):
    """Modules are taken away while they import none of those left; a circle cannot be taken away."""
    left = {m: set(others) for m, others in imports.items()}
    while free := [m for m, others in left.items() if not others & set(left)]:
        for module in free:
            del left[module]
    assert not left, f"circle among {sorted(left)}"


def test_names_are_imported_from_the_package(trees):
    """By their bare names the folders would load a second copy, or Hugging Face's package `kernels`."""
    for file, tree in trees.items():
        for module in imported_modules(tree, package_name(file)):
            assert module.split(".")[0] not in {*FOLDERS[1:], "bench", "tests"}, f"{file} imports {module}"
            assert module.split(".")[:2] not in (["dpllm", "bench"], ["dpllm", "tests"]), f"{file}: {module}"


def test_nothing_is_unpickled(trees):
    for file, tree in trees.items():
        roots = {m.split(".")[0] for m in imported_modules(tree, package_name(file))}
        assert not roots & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, file
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
        ("import dpllm.quant.overlay", ["dpllm.quant.overlay"]),
        ("from dpllm import kernels", ["dpllm.kernels"]),
        ("from dpllm.engine import Engine", ["dpllm.engine.Engine"]),
        ("from ..calib import profile", ["dpllm.calib.profile"]),
        ("def f():\n    import bench.x", ["bench.x"]),
        ("if TYPE_CHECKING:\n    from dpllm.engine import Engine", ["dpllm.engine.Engine"]),
        (
            "import importlib\nimportlib.import_module('tests.tiny_models')",
            ["importlib", "tests.tiny_models"],
        ),
        ("import torch, numpy.random", ["torch", "numpy.random"]),
    ],
)
def test_the_import_finder_finds(source, expected):
    """The rules above are worth what this function sees."""
    assert imported_modules(ast.parse(source), ["dpllm", "quant"]) == expected


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
