"""The build of the C++ and CUDA extension, what is done without it, and what its libraries need of torch."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fastvar import build
from fastvar.cli import main
from fastvar.ops import _dispatch, _extension, explain, propagate_mask
from fastvar.schedule import ScaleSchedule

ROOT = Path(__file__).resolve().parent.parent
POSSIBLE = [target for target, reason in build.plan("auto").items() if not reason]
MASK, SCHEDULE = torch.ones(1, 2, 2), ScaleSchedule((1, 2))

needs_compiler = pytest.mark.skipif("cpu" not in POSSIBLE, reason="no C++ compiler")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """fastvar/build.py in a tree of its own with one small source, loaded as setup.py does. Compilers and linkers that
    take options apart at spaces and commas find both in its path."""
    folder = tmp_path / "tree, with a space"
    (folder / "fastvar").mkdir(parents=True)
    (folder / "csrc/common").mkdir(parents=True)
    shutil.copy(ROOT / "fastvar/build.py", folder / "fastvar")
    for name in ("common.h", "resample.h", "resample.cpp"):
        shutil.copy(ROOT / "csrc/common" / name, folder / "csrc/common")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    for name in ("CXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("build_of_tree", folder / "fastvar/build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "build_of_tree", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def steps(tree: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the compilers of `tree` are called for."""
    called: list[str] = []
    run = tree._run

    def noted(command: list[str], what: str, *rest: Any) -> None:
        called.append(what)
        run(command, what, *rest)

    monkeypatch.setattr(tree, "_run", noted)
    return called


@needs_compiler
def test_builds_and_keeps_objects(tree: ModuleType, steps: list[str]) -> None:
    assert tree.libraries("cpu") == [] and tree.record() == {}
    library = tree.build(["cpu"])["cpu"]
    assert library == tree.PACKAGE / "_cpu.abi3.so" and tree.libraries("cpu") == [library]
    assert steps.count("cpu: compiling common/resample.cpp") == 1
    note = tree.record()["cpu"]
    assert note["state"] == "built" and torch.__version__ in note["reason"]
    assert tree.is_current(library, "cpu")
    leftovers = [path.name for path in tree.PACKAGE.iterdir() if path.name.startswith(".")]
    assert leftovers == []

    steps.clear()
    tree.build(["cpu"])  # again: nothing is compiled
    assert "cpu: linking" in steps and not [step for step in steps if "compiling" in step]

    header = tree.source_folder() / "common/resample.h"  # included by the source
    header.write_text(header.read_text().replace("namespace fastvar {", "namespace fastvar {\n#error no such luck", 1))
    assert not tree.is_current(library, "cpu")
    before = library.read_bytes()
    with pytest.raises(tree.BuildError, match=r"(?s)cpu: compiling common/resample.cpp failed:.*no such luck"):
        tree.build(["cpu"])
    assert library.read_bytes() == before and tree.record()["cpu"] == note


@needs_compiler
def test_installed_packages_build_into_the_cache(tree: ModuleType) -> None:
    """What pip brought stays as it is: it would neither remove nor replace a library that it did not bring."""
    (tree.PACKAGE.parent / "csrc").rename(tree.PACKAGE / "csrc")  # as in a wheel
    brought = tree.PACKAGE / "_cpu.abi3.so"
    brought.write_text("by the wheel, does not load")
    assert tree.libraries("cpu") == [brought]
    before = sorted(tree.PACKAGE.iterdir())
    library = tree.build(["cpu"])["cpu"]
    assert library.parent.parent == tree.cache_folder() and tree.libraries("cpu") == [brought, library]
    assert sorted(tree.PACKAGE.iterdir()) == before and tree.record() == {}

    assert tree.cache_folder().stat().st_mode & 0o777 == library.parent.stat().st_mode & 0o777 == 0o700
    for folder in (tree.cache_folder(), library.parent):  # nobody else may bring what is loaded or linked
        folder.chmod(0o777)
        assert tree.libraries("cpu") == [brought]
        with pytest.raises(tree.BuildError, match="others own it or may write to it"):
            tree.build(["cpu"])
        folder.chmod(0o700)
    assert tree.libraries("cpu") == [brought, library]
    source = tree.source_folder() / "common/resample.cpp"
    source.write_text(source.read_text() + "\n// changed\n")
    assert tree.libraries("cpu") == [brought]


def test_cache_folder(tree: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tree._private(tmp_path / "new/folder").stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(tree.os, "getuid", lambda: -1)
    with pytest.raises(tree.BuildError, match="others own it"):
        tree._private(tmp_path / "new/folder")
    (tmp_path / "file").write_text("")
    with pytest.raises(tree.BuildError, match=r"no cache folder: .* set XDG_CACHE_HOME"):
        tree._private(tmp_path / "file/folder")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tree.cache_folder() == tmp_path / ".cache/fastvar"


def test_records_that_nobody_can_read(tree: ModuleType) -> None:
    for text in ("", "{", "7", '{"cpu": []}', '{"cpu": {"state": "built"}}'):
        (tree.PACKAGE / build.RECORD).write_text(text)
        assert tree.record() == {}
        tree.write_record(tree.PACKAGE, {"cpu": {"state": "built", "reason": "g++"}})
        assert tree.record() == {"cpu": {"state": "built", "reason": "g++"}}


@pytest.mark.skipif(shutil.which("nvcc") is None or "cpu" not in POSSIBLE, reason="no nvcc or no C++ compiler")
def test_cuda_is_linked(tree: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "_ARCHITECTURES", (90,))
    source = tree.source_folder() / "common/tiny.cu"
    source.write_text('extern "C" __global__ void nothing() {}\n')
    library = tree.build(["cuda"])["cuda"]
    assert tree.libraries("cuda") == [library] and tree.is_current(library, "cuda")
    shown = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= set(re.findall(r"NEEDED.*\[(.*)\]", shown))


@needs_compiler
def test_compilers_behind_wrappers(tree: ModuleType, steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects belong to the compiler that made them, not to the wrapper. nvcc is not given a wrapper in its place."""
    monkeypatch.setenv("CXX", "env g++ -O1")
    plain = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    assert tree._versions("cpu") == [plain]
    monkeypatch.setattr(tree, "find_nvcc", lambda: "nvcc")
    for call in (lambda: tree._compiler("cuda"), lambda: tree.build(["cuda"])):
        (tree.source_folder() / "common/tiny.cu").write_text("")
        with pytest.raises(
            tree.BuildError, match=r"CXX: nvcc takes the name of a compiler alone, .* got 'env g\+\+ -O1'"
        ):
            call()
    reasons = tree.plan("auto")
    assert reasons["cpu"] == "" and "CXX: nvcc takes" in reasons["cuda"]
    monkeypatch.setenv("CXX", "g++")
    monkeypatch.setattr(tree, "_version", " ".join)
    assert tree._versions("cuda") == ["nvcc", "g++"]


def test_old_torch(tree: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("__init__.py", "version.py"):
        (tmp_path / "torch").mkdir(exist_ok=True)
        (tmp_path / "torch" / name).write_text("__version__ = '2.9.1+cu128'")
    spec = importlib.util.spec_from_file_location("torch", tmp_path / "torch/__init__.py")
    monkeypatch.setattr(tree, "find_spec", lambda name: spec)
    with pytest.raises(tree.BuildError, match=r"torch 2\.9\.1\+cu128 in .* is too old; .* 2\.11 or newer"):
        tree.find_torch()
    (tmp_path / "torch/version.py").write_text("__version__ = '2.11.0'")
    with pytest.raises(tree.BuildError, match=r"torch 2\.11\.0 in .* has no headers"):
        tree.find_torch()


def test_without_compilers(tree: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree.shutil, "which", lambda name, path=None: None)
    with pytest.raises(tree.BuildError, match=r"no C\+\+ compiler: install g\+\+ .* CXX"):
        tree.build(["cpu"])
    with pytest.raises(tree.BuildError, match=r"no nvcc: install the CUDA toolkit .* CUDA_HOME"):
        tree.find_nvcc()
    monkeypatch.setenv("CXX", "nonsense++ -O2")
    with pytest.raises(tree.BuildError, match=r"CXX: expected a C\+\+ compiler, got 'nonsense\+\+ -O2'"):
        tree.build(["cpu"])
    monkeypatch.setenv("CUDA_HOME", "/nonsense")
    with pytest.raises(tree.BuildError, match="CUDA_HOME: expected a CUDA toolkit, '/nonsense' has no bin/nvcc"):
        tree.find_nvcc()
    assert all("CXX" in reason or "CUDA_HOME" in reason for reason in tree.plan("auto").values())
    with pytest.raises(ValueError, match="build: targets: expected some of"):
        tree.build(["gpu"])


def test_plans(tree: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tree.plan("none") == {"cpu": "FASTVAR_BUILD=none", "cuda": "FASTVAR_BUILD=none"}
    assert tree.plan("all") == {"cpu": "", "cuda": ""}
    assert tree.plan("cpu") == {"cpu": "", "cuda": "FASTVAR_BUILD=cpu"}
    monkeypatch.setattr(tree, "find_cxx", lambda: ["g++"])
    monkeypatch.setattr(tree, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(tree, "find_torch", lambda: tree.Torch("2.14", Path(), has_cuda=False))
    assert tree.plan("auto") == {"cpu": "", "cuda": "this torch is a CPU build"}
    monkeypatch.undo()
    monkeypatch.setattr(tree, "find_spec", lambda name: None)
    assert all("torch is not importable" in reason for reason in tree.plan("auto").values())
    monkeypatch.setenv("FASTVAR_BUILD", "everything")
    with pytest.raises(tree.BuildError, match=r"FASTVAR_BUILD: expected one of .* got 'everything'"):
        tree.requested()


def wheel(tree: ModuleType, target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A wheel of what `tree` holds, by the project's setup.py."""
    folder = tree.PACKAGE.parent
    shutil.copy(ROOT / "setup.py", folder)
    (folder / "fastvar/__init__.py").write_text("")
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "fastvar"\nversion = "1"\n'
        '[tool.setuptools]\npackages = ["fastvar"]\n'
    )
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--wheel-dir", str(target), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FASTVAR_BUILD": "cpu", "CXX": "nonsense++"}, "FASTVAR_BUILD=cpu: CXX: expected a C++ compiler"),
        ({"FASTVAR_BUILD": "cuda", "CUDA_HOME": "/nonsense"}, "FASTVAR_BUILD=cuda: "),
        ({"FASTVAR_BUILD": "all", "CUDA_HOME": "/nonsense"}, "FASTVAR_BUILD=all: "),
        ({"FASTVAR_BUILD": "no"}, "FASTVAR_BUILD: expected one of ('auto', 'none', 'all', 'cpu', 'cuda'), got 'no'"),
    ],
)
def test_an_explicit_request_fails_hard(
    tree: ModuleType, tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    if "CUDA_HOME" in environment:
        (tree.source_folder() / "common/empty.cu").write_text("")
    done = wheel(tree, tmp_path / "wheels", **environment)
    assert done.returncode != 0
    assert message in done.stderr
    assert not list(tmp_path.glob("wheels/*.whl"))


def test_auto_without_compilers_is_pure_and_says_why(tree: ModuleType, tmp_path: Path) -> None:
    done = wheel(tree, tmp_path / "wheels", FASTVAR_BUILD="auto", CXX="nonsense++", CUDA_HOME="/nonsense")
    assert done.returncode == 0, done.stderr
    (made,) = tmp_path.glob("wheels/*.whl")
    assert made.name.endswith("-py3-none-any.whl")
    shutil.unpack_archive(made, tmp_path / "site", "zip")
    note = json.loads((tmp_path / "site/fastvar" / build.RECORD).read_text())
    assert note["cpu"]["state"] == note["cuda"]["state"] == "not built"
    assert "nonsense++" in note["cpu"]["reason"] and "/nonsense" in note["cuda"]["reason"]


@needs_compiler
def test_wheel_with_the_extension(tree: ModuleType, tmp_path: Path) -> None:
    done = wheel(tree, tmp_path / "wheels", FASTVAR_BUILD="cpu")
    assert done.returncode == 0, done.stderr
    (made,) = tmp_path.glob("wheels/*.whl")
    assert re.fullmatch(r"fastvar-1-cp311-abi3-linux_\w+\.whl", made.name)
    shutil.unpack_archive(made, tmp_path / "site", "zip")
    assert all((tmp_path / "site/fastvar" / build.file_name("cpu", level)).is_file() for level in build.LEVELS)
    note = json.loads((tmp_path / "site/fastvar" / build.RECORD).read_text())
    assert note["cpu"]["state"] == "built" and note["cuda"]["reason"] == "FASTVAR_BUILD=cpu"

    # another one from the same tree, which keeps build/, without what the first one made
    (tree.source_folder() / "common/resample.cpp").write_text("#error no such luck\n")
    done = wheel(tree, tmp_path / "second", FASTVAR_BUILD="auto", CUDA_HOME="/nonsense")
    assert done.returncode == 0, done.stderr
    assert list((tree.PACKAGE.parent / "build").glob("lib*"))
    (made,) = tmp_path.glob("second/*.whl")
    shutil.unpack_archive(made, tmp_path / "second/site", "zip")
    assert not list((tmp_path / "second/site/fastvar").glob("*.so"))
    note = json.loads((tmp_path / "second/site/fastvar" / build.RECORD).read_text())
    assert note["cpu"]["state"] == note["cuda"]["state"] == "not built"


@pytest.mark.parametrize("target", POSSIBLE)
def test_extension_is_built_and_current(target: str) -> None:
    """Where there are compilers, the other tests are to cover what they make: run `fastvar build`."""
    assert _extension.missing(target) is None
    if target == "cpu" or torch.version.cuda is not None:
        assert _extension.load_error(target) is None
    for library in of_every_level(target):
        assert build.is_current(library, target)
        assert (
            str(build.source_folder()).encode() not in library.read_bytes()
        )  # messages name no folders of the builder


def of_every_level(target: str) -> list[Path]:
    levels = build.LEVELS if target == "cpu" else [""]
    return [build.libraries(target)[0].with_name(build.file_name(target, level)) for level in levels]


def undefined(library: Path) -> set[str]:
    shown = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True)
    return {line.split()[-1] for line in shown.stdout.splitlines()}


@pytest.mark.parametrize("target", POSSIBLE)
def test_needs_only_what_torch_keeps_stable(target: str) -> None:
    """Undefined symbols are those of C shims as old as torch 2.11, of libc and of libstdc++."""
    names = {name for library in of_every_level(target) for name in undefined(library)}
    foreign = {name for name in names if "@GLIBC" not in name and "@CXXABI" not in name and "@GCC" not in name}
    foreign -= {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
    assert foreign and all(re.fullmatch(r"(aoti_)?torch_\w+", name) for name in foreign), foreign
    assert not foreign & newer_shims(build.find_torch().include)
    for family, newest in (("GLIBC", (2, 34)), ("GLIBCXX", (3, 4, 29))):  # so that a wheel can be carried
        versions = re.findall(rf"@{family}_([\d.]+)", " ".join(names))
        assert versions and max(tuple(map(int, version.split("."))) for version in versions) <= newest


def newer_shims(include: Path) -> set[str]:
    """Functions that the headers show only to those who ask for a torch newer than 2.11."""
    found = set()
    for header in ("stable/c/shim.h", "inductor/aoti_torch/c/shim.h"):
        hidden: list[bool] = []
        for line in (include / "torch/csrc" / header).read_text().splitlines():
            if line.startswith("#if"):
                version = re.search(r"TORCH_FEATURE_VERSION >= TORCH_VERSION_2_(\d+)", line)
                hidden.append(version is not None and int(version[1]) > 11)
            elif line.startswith("#endif"):
                hidden.pop()
            elif any(hidden):
                found |= set(re.findall(r"\b((?:aoti_)?torch_\w+)\(", line))
    return found


def test_newer_shims_are_recognised(tmp_path: Path) -> None:
    text = "#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_{}_0\nint torch_{}(int);\n#endif\n"
    for header in ("stable/c/shim.h", "inductor/aoti_torch/c/shim.h"):
        (tmp_path / "torch/csrc" / header).parent.mkdir(parents=True)
        (tmp_path / "torch/csrc" / header).write_text(text.format(11, "old") + text.format(12, "new"))
    assert newer_shims(tmp_path) == {"torch_new"}


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let these be the libraries for CPUs, in the order in which they are tried."""

    def pretend(*paths: Path) -> None:
        monkeypatch.setattr(build, "libraries", lambda target: list(paths))
        monkeypatch.setattr(_extension, "_LIBRARIES", {t: _extension._Library(t) for t in build.TARGETS})
        monkeypatch.setattr(_dispatch, "_warned", set())
        monkeypatch.setattr(_dispatch, "PREFERENCE", {})
        _dispatch.forget_answers()

    return pretend


def test_an_extension_that_is_not_built_is_no_downgrade(
    pretend: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend()
    with caplog.at_level(logging.DEBUG, "fastvar"):
        assert propagate_mask(MASK, SCHEDULE).all()
    assert caplog.records == []
    remedy = r"the cpu extension is not built \(fastvar build --cpu\)"
    with pytest.raises(RuntimeError, match=f"propagate_mask: backend='cpu' cannot run: {remedy}"):
        propagate_mask(MASK, SCHEDULE, backend="cpu")
    told = explain("propagate_mask", MASK)
    assert told.backend == "reference" and re.fullmatch(remedy, told.reasons["cpu"])
    monkeypatch.setattr(build, "record", lambda: {"cpu": {"state": "not built", "reason": "FASTVAR_BUILD=none"}})
    main(["info"])
    shown = capsys.readouterr().out
    assert "extension cpu: the cpu extension is not built (fastvar build --cpu); FASTVAR_BUILD=none\n" in shown


@pytest.mark.parametrize("current", [True, False])
def test_why_a_library_is_not_taken_is_kept_and_shown(
    current: bool,
    pretend: Callable[..., None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    library = tmp_path / "_cpu.abi3.so"
    if current:
        library.write_bytes(bytes.fromhex(build.sources_digest("cpu")))
        message = rf"{library} failed to load \(fastvar build --cpu makes a new one\): {library}: file too short"
    else:
        library.write_text("of other sources")
        message = rf"{library} was built from other sources than these \(fastvar build --cpu\)"
    pretend(library)
    with pytest.raises(RuntimeError, match=f"propagate_mask: backend='cpu' cannot run: {message}"):
        propagate_mask(MASK, SCHEDULE, backend="cpu")
    with caplog.at_level(logging.WARNING, "fastvar"):
        for _ in range(3):
            assert propagate_mask(MASK, SCHEDULE).all()
    assert len(caplog.records) == 1
    assert re.fullmatch(f"propagate_mask: cpu is passed over: {message}", caplog.records[0].getMessage())
    main(["info"])
    assert re.search(f"extension cpu: {message}\n", capsys.readouterr().out)
    _extension.look_again()
    assert not _extension._LIBRARIES["cpu"].looked


@needs_compiler
@pytest.mark.parametrize("current", [True, False])
def test_the_next_library_is_tried(current: bool, pretend: Callable[..., None], tmp_path: Path) -> None:
    """So `fastvar build` helps where the one of the wheel does not load, or is not of these sources."""
    broken = tmp_path / "_cpu.abi3.so"
    broken.write_bytes(bytes.fromhex(build.sources_digest("cpu")) if current else b"")
    good = build.for_processor(build.libraries("cpu")[0], torch.backends.cpu.get_cpu_capability())
    pretend(broken, good)
    assert _extension.load_error("cpu") is None and _extension.loaded_from("cpu") == good
    pretend(good, broken)
    assert _extension.load_error("cpu") is None and _extension.loaded_from("cpu") == good


@needs_compiler
def test_a_library_of_older_sources_is_an_obstacle(
    pretend: Callable[..., None], tree: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that has the ops that are asked for."""
    assert _extension._lack("cpu", "propagate_mask") is None
    assert _extension._lack("cpu", "to_come") == "the cpu extension has no to_come (fastvar build --cpu)"
    library = build.for_processor(build.libraries("cpu")[0], torch.backends.cpu.get_cpu_capability())
    pretend(library)
    monkeypatch.setattr(build, "sources_digest", lambda target: "0123456789abcdef" * 2)
    assert _extension._lack("cpu", "propagate_mask") == (
        f"{library} was built from other sources than these (fastvar build --cpu)"
    )
    assert not tree.is_current(library, "cpu")
    shutil.rmtree(tree.source_folder())
    assert tree.is_current(library, "cpu")  # nobody can tell


@needs_compiler
def test_first_call_may_be_a_compiled_one() -> None:
    """Tracing loads the library, and goes on as if it had always been there."""
    code = (
        "import torch; from fastvar.ops import propagate_mask; from fastvar.schedule import ScaleSchedule\n"
        "call = torch.compile(propagate_mask, fullgraph=True, backend='aot_eager')\n"
        "assert call(torch.ones(1, 2, 2), ScaleSchedule((1, 2)), backend='cpu').all(); print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr


@needs_compiler
def test_ops_are_called_directly() -> None:
    """As in a program of torch.export in a fresh process, which does not ask which backend can run."""
    code = (
        "import torch, fastvar.ops; mask = torch.ones(1, 2, 2)\n"
        "assert torch.ops.fastvar.propagate_mask(mask, [1, 1, 2, 2], 'area', False, 'cpu').all(); print('fine')\n"
        "torch.ops.fastvar.propagate_mask(mask, [1, 1, 2, 2], 'area', False, 'cuda')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr
    assert "propagate_mask: backend='cuda' cannot run: runs on cuda, the tensor is on cpu" in done.stderr


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    built = []

    def fake(targets: list[str], verbose: bool) -> dict[str, Path]:
        built.extend(targets)
        return {target: Path("there") / build.file_name(target) for target in targets}

    monkeypatch.setattr(build, "build", fake)
    main(["build", "--cuda"])
    assert built == ["cuda"] and "cuda: there/_cuda.abi3.so" in capsys.readouterr().out
    monkeypatch.setattr(build, "plan", lambda request: {"cpu": "", "cuda": "no nvcc"})
    main(["build"])
    assert built == ["cuda", "cpu"] and "cuda: not built: no nvcc" in capsys.readouterr().out
    monkeypatch.setattr(build, "plan", lambda request: {"cpu": "no compiler", "cuda": "no nvcc"})
    with pytest.raises(SystemExit) as stop:
        main(["build"])
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert "cpu: not built: no compiler" in shown.out and "there is nothing that could be built" in shown.err
