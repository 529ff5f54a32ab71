"""The architecture, held by the machine: which floor may use which, and where things lie."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "cgpt_kernels"
OPS = sorted(p.name for p in (PACKAGE / "ops").iterdir() if (p / "op.py").exists())

# Floors from the ground up: a room may use its own folder and lower floors.
FLOORS = [
    {"_C", "checks", "checkpoint", "triton_substrate"},
    {"backends", "testing"},
    {"timing"},
    {"wafer"},
    {"ops"},
    {"gpt", "decoder"},
    {"replace", "bench"},
    {"train"},
    {"generate", "quantize", "tune", "bench_e2e", "bench_gpu", "bench_train"},
    {"doctor", "prune"},
    {"demo"},
    {"cli"},
]
# Beside the house: the public names, and data with the script that made it.
BESIDE = {"assets", "__init__", "__main__"}


def floor(name):
    for level, rooms in enumerate(FLOORS):
        if name in rooms:
            return level
    raise AssertionError(f"cgpt_kernels/{name} stands on no floor: add it to FLOORS")


def imported_rooms(path):
    """Rooms of cgpt_kernels that a file imports, wherever in the file."""
    package = ("cgpt_kernels", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "cgpt_kernels" and len(parts) > 1:
                yield parts[1]


def python_files():
    return sorted(PACKAGE.rglob("*.py"))


def test_rooms_import_only_from_lower_floors():
    for path in python_files():
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room in BESIDE:
            continue
        for used in imported_rooms(path):
            if used != room and used not in BESIDE:
                assert floor(used) < floor(room), f"{path.relative_to(ROOT)} imports {used}"


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_one_folder_with_its_parts(op):
    for name in ("__init__.py", "op.py", "reference.py", "cases.py"):
        assert (PACKAGE / "ops" / op / name).is_file(), f"ops/{op}/{name} is missing"
    for name in (f"{op}.h", f"{op}_cpu.cpp", f"{op}_test.cpp"):
        assert (ROOT / "csrc" / "ops" / op / name).is_file(), f"csrc/ops/{op}/{name} is missing"


def test_ops_are_the_same_in_python_and_cpp():
    cpp = sorted(p.name for p in (ROOT / "csrc" / "ops").iterdir() if p.is_dir())
    assert OPS == cpp == ["attention", "cross_entropy", "gemm", "layer_norm"]


@pytest.mark.parametrize("op", OPS)
def test_an_op_never_uses_another_ops_backend(op):
    for path in (PACKAGE / "ops" / op).glob("*.py"):
        for other in set(OPS) - {op}:
            pattern = rf"(from|import)\s+[\w.]*\b{other}\.(reference|{other}_\w+)"
            found = re.search(pattern, path.read_text())
            assert not found, f"{path.relative_to(ROOT)}: {found[0]}"
    for path in (ROOT / "csrc" / "ops" / op).iterdir():
        for include in re.findall(r'#include "([^"]+)"', path.read_text()):
            target = (path.parent / include).resolve()
            assert target.exists(), f"{path.relative_to(ROOT)} includes {include}"
            if target.is_relative_to(ROOT / "csrc" / "ops"):
                assert target.parent == path.parent, f"{path.relative_to(ROOT)}: {include}"


def test_the_substrate_never_includes_an_op():
    for folder in ("common", "cpu", "cuda"):
        for path in (ROOT / "csrc" / folder).iterdir():
            assert "ops/" not in "".join(re.findall(r'#include "[^"]+"', path.read_text())), path


@pytest.mark.parametrize("op", OPS)
def test_the_reference_is_plain_pytorch(op):
    used = set(imported_rooms(PACKAGE / "ops" / op / "reference.py"))
    assert used <= {"ops"}, f"ops/{op}/reference.py imports {used}"


def test_public_names_are_the_designs():
    import cgpt_kernels as ck

    for name in ("layer_norm", "add_layer_norm", "gemm", "attention", "linear_cross_entropy"):
        assert callable(getattr(ck.ops, name))
    for name in ("GPT", "GPTConfig", "replace", "restore", "generate", "doctor", "explain"):
        assert callable(getattr(ck, name))


def test_files_stay_readable():
    for path in [*python_files(), *(ROOT / "csrc").rglob("*.*")]:
        lines = path.read_text().count("\n")
        assert lines <= 600, f"{path.relative_to(ROOT)} has {lines} lines: split it"


DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_documents_name_only_files_that_exist(document):
    text = document.read_text()
    paths = re.findall(r"`((?:cgpt_kernels|csrc|tests|bench|docs)/[\w./-]+)`", text)
    paths += [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    for path in paths:
        assert (document.parent / path).exists() or (ROOT / path).exists(), path


def support_table():
    """Markdown: which op has which backend, by the files that exist."""
    from cgpt_kernels.backends import BACKENDS, OPS

    lines = [f"| op | {' | '.join(BACKENDS)} |", f"|---|{'---|' * len(BACKENDS)}"]
    for op in OPS.values():
        have = []
        for backend in BACKENDS:
            places = (
                ROOT / "csrc" / "ops" / op.folder / f"{op.folder}_{backend}.cpp",
                ROOT / "csrc" / "ops" / op.folder / f"{op.folder}_{backend}.cu",
                PACKAGE / "ops" / op.folder / f"{op.folder}_{backend}.py",
            )
            have.append("yes" if backend == "eager" or any(p.is_file() for p in places) else "-")
        lines.append(f"| `{op.name}` | {' | '.join(have)} |")
    return "\n".join(lines)


def test_the_readme_shows_the_ops_and_backends_that_exist():
    assert support_table() in (ROOT / "README.md").read_text(), support_table()
