"""Builds the C++ and CUDA libraries `_cpu.abi3.so` and `_cuda.abi3.so` from csrc/.

One way for both occasions: setup.py does it ahead of time (it loads this file by its path, as fastvar is not installed
yet: only the standard library may be imported here), `fastvar build` just in time. The libraries use torch's stable
ABI: one file serves every torch from 2.11 on, whatever the version of Python.

Objects are kept in the cache folder under a digest of all that went into them. Files appear whole. The build id of a
library (a note in its file) is the digest of its sources: one that was built from others is known without loading it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
TARGETS = ("cpu", "cuda")
REQUESTS = ("auto", "none", "all", *TARGETS)
RECORD = "_build.json"  # in the package: what a build decided and why, for people to read

_SUFFIXES = {"cpu": ".cpp", "cuda": ".cu"}
_ARCHITECTURES = (80, 90, 100)
_OLDEST_TORCH = (2, 11)
_COMMON = ("-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000")  # torch 2.11
# Without traps and errno, which nobody looks at, loops with choices between floats can be vectorised; results stay.
_CPP = (
    "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-Wall",
    "-Wno-unknown-pragmas",
)  # fmt: skip
# Libraries for CPUs: one for any, and beside it one for each capability as PyTorch names it.
LEVELS: dict[str, tuple[str, ...]] = {"": ()}
if platform.machine() == "x86_64":
    LEVELS["avx2"] = ("-mavx2", "-mfma")
    LEVELS["avx512"] = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
# What is written with vectors. The rest is the same in all of them: masks take longer with AVX-512.
_WIDE = ("residual_quantize", "accumulate_scale", "bitwise_residual_quantize", "accumulate_bits")
_CUDA = ("--fmad=false", "-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off")
_SPILLS = ("-Xptxas=--warn-on-spills,--warn-on-local-memory-usage",)


class BuildError(RuntimeError):
    """Nothing could be built; the message says why and what to do, and holds the compiler's output."""


@dataclass(frozen=True)
class Torch:
    """Where the installed torch keeps its headers, found without importing it."""

    version: str
    include: Path
    has_cuda: bool


def file_name(target: str, level: str = "") -> str:
    """The library's name for "cpu" or "cuda"."""
    return f"_{target}_{level}.abi3.so" if level else f"_{target}.abi3.so"


def for_processor(library: Path, capability: str) -> Path:
    """The library beside this one that was built for what PyTorch says of the processor, or else this one."""
    own = library.with_name(library.name.replace(".", f"_{capability.lower()}.", 1))
    return own if own.is_file() else library


def source_folder() -> Path:
    """csrc/ inside the installed package or beside it in a checkout.

    Raises:
        BuildError: it is in neither place.
    """
    for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if (folder / "common/common.h").is_file():
            return folder
    raise BuildError(f"no sources: expected them in {PACKAGE / 'csrc'}; reinstall fastvar")


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/fastvar, by default ~/.cache/fastvar: objects, and libraries of installed packages.

    Raises:
        BuildError: there is neither an absolute XDG_CACHE_HOME nor a home.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (base if base.is_absolute() else Path.home() / ".cache") / "fastvar"
    except RuntimeError as error:
        raise BuildError(f"no cache folder: {error}; set XDG_CACHE_HOME") from None


def sources_digest(target: str) -> str:
    """Changes with any source that the library of this target is made of."""
    files = {file for source in _sources(target) for file in (source, *_headers(source))}
    return _digest(part for file in sorted(files) for part in (file.name, file.read_bytes()))


def libraries(target: str) -> list[Path]:
    """The libraries of a target that are there, in the order in which to try them: in the package (of whatever
    sources, see `is_current`), and in the cache folder, built from just these sources."""
    folders = [PACKAGE]
    with suppress(BuildError, OSError):  # no sources, no home, nothing cached, or not by this user alone
        cached = cache_folder() / sources_digest(target)
        _check_private(cached.parent)
        _check_private(cached)
        folders.append(cached)
    return [folder / file_name(target) for folder in folders if (folder / file_name(target)).is_file()]


def is_current(library: Path, target: str) -> bool:
    """Whether a library was built from the sources that are here. Without sources nobody can tell: then it passes."""
    try:
        return bytes.fromhex(sources_digest(target)) in library.read_bytes()
    except BuildError:
        return True


def record() -> dict[str, dict[str, str]]:
    """What the builds whose results this package has decided: for each target "state" and "reason". For information
    only: of two builds at the same time one may be left out."""
    return _read_record(PACKAGE)


def requested() -> str:
    """FASTVAR_BUILD, "auto" where it is not set.

    Raises:
        BuildError: it is none of REQUESTS.
    """
    request = os.environ.get("FASTVAR_BUILD") or "auto"
    if request not in REQUESTS:
        raise BuildError(f"FASTVAR_BUILD: expected one of {REQUESTS}, got {request!r}")
    return request


def plan(request: str) -> dict[str, str]:
    """For each target an empty string if that request builds it, otherwise the reason why not."""
    reasons = {}
    for target in TARGETS:
        if request != "auto":
            # a CUDA library is of little use without its sibling, but whoever asks for one target gets that one
            reasons[target] = "" if request in ("all", target) else f"FASTVAR_BUILD={request}"
            continue
        try:
            torch = find_torch()
            _compiler(target)
            reasons[target] = "this torch is a CPU build" if target == "cuda" and not torch.has_cuda else ""
        except BuildError as error:
            reasons[target] = str(error)
    return reasons


def find_torch() -> Torch:
    """The torch that this Python would import.

    Raises:
        BuildError: there is none, or it is too old.
    """
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError(
            "torch is not importable where the build runs; install it, then build without isolation "
            "(pip install --no-build-isolation .) or run `fastvar build`"
        )
    folder = Path(spec.origin).parent
    match = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", (folder / "version.py").read_text())
    version = match[1] if match else "of unknown version"
    if match and (int(match[2]), int(match[3])) < _OLDEST_TORCH:
        raise BuildError(f"torch {version} in {folder} is too old; the extension needs torch 2.11 or newer")
    include = folder / "include"
    if not (include / "torch/csrc/stable/library.h").is_file():
        raise BuildError(f"torch {version} in {folder} has no headers of the stable ABI; reinstall it")
    return Torch(version, include, (folder / "lib/libtorch_cuda.so").is_file())


def find_cxx() -> list[str]:
    """The C++ compiler: $CXX, which may hold a wrapper and options, else g++ or c++ on the path.

    Raises:
        BuildError: there is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["g++"], ["c++"]]:
        if shutil.which(command[0]):
            return command
    if named:
        raise BuildError(f"CXX: expected a C++ compiler, got {os.environ['CXX']!r}, which is not there")
    raise BuildError("no C++ compiler: install g++ (12 or newer) or name one in CXX")


def find_nvcc() -> str:
    """The CUDA compiler: in $CUDA_HOME, /usr/local/cuda or on the path.

    Raises:
        BuildError: there is none.
    """
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home or "/usr/local/cuda", "bin")))
    if home and nvcc is None:
        raise BuildError(f"CUDA_HOME: expected a CUDA toolkit, {home!r} has no bin/nvcc")
    nvcc = nvcc or shutil.which("nvcc")
    if nvcc is None:
        raise BuildError("no nvcc: install the CUDA toolkit or name its folder in CUDA_HOME")
    return nvcc


def build(targets: Sequence[str], output: Path | None = None, *, verbose: bool = False) -> dict[str, Path]:
    """Build the libraries of these targets and note that they are there.

    Args:
        targets: of "cpu" (the libraries of all LEVELS) and "cuda".
        output: the folder to put them in. By default that of the package in a checkout. For an installed package it is
            one in the cache folder, named after the sources: pip would neither remove nor replace what it did not
            bring.
        verbose: print commands and compilers' output even where all went well.

    Returns:
        The library of each target.

    Raises:
        ValueError: an unknown target.
        BuildError: a compiler is missing or failed; its output is in the message.
    """
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"build: targets: expected some of {TARGETS}, got {target!r}")
    built = {}
    for target in targets:
        digest = sources_digest(target)
        cached = _private(cache_folder()) / digest
        checkout = source_folder().parent != PACKAGE
        folder = output or (PACKAGE if checkout and _writable(PACKAGE) else _private(cached))
        for level in LEVELS if target == "cpu" else [""]:
            _build(target, level, folder / file_name(target, level), digest, verbose)
        built[target] = folder / file_name(target)
        if folder != cached:
            write_record(folder, {target: {"state": "built", "reason": _tools(target)}})
    extension = sys.modules.get("fastvar.ops._extension")
    if extension is not None and output is None:
        extension.look_again()
    return built


def write_record(folder: Path, entries: dict[str, dict[str, str]]) -> None:
    """Add what was decided about some targets to the record in a package's folder."""
    _replace(folder / RECORD, (json.dumps(_read_record(folder) | entries, indent=2) + "\n").encode())


def _read_record(folder: Path) -> dict[str, dict[str, str]]:
    try:
        written = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    entries = written.items() if isinstance(written, dict) else ()
    return {target: entry for target, entry in entries if isinstance(entry, dict) and {"state", "reason"} <= set(entry)}


def _build(target: str, level: str, library: Path, digest: str, verbose: bool) -> None:
    torch = find_torch()
    sources = _sources(target)
    if not sources:
        raise BuildError(f"{target}: no sources (*{_SUFFIXES[target]}) in {source_folder()}")
    objects = _private(cache_folder() / "objects")
    # Threads suffice: each waits for a compiler.
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        compiled = list(pool.map(lambda source: _compile(target, level, source, torch, objects, verbose), sources))
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build") as scratch:
        stubs = _stubs(target, Path(scratch))
        command = [*_linker(target, stubs, digest), *map(str, compiled), "-o", library.name]
        _run(command, f"{target}: linking", verbose, Path(scratch))
        os.replace(Path(scratch, library.name), library)


def _compile(target: str, level: str, source: Path, torch: Torch, objects: Path, verbose: bool) -> Path:
    # called in csrc, so that messages name sources without it, wherever the project lies
    csrc, name = source_folder(), str(source.relative_to(source_folder()))
    flags = _flags(target, level if source.stem in _WIDE else "")
    command = [*_compiler(target), *flags, "-I.", "-isystem", str(torch.include), "-c", name]
    parts: list[str | bytes] = [*_versions(target), *command, torch.version]
    parts += [part for file in (source, *_headers(source)) for part in (file.name, file.read_bytes())]
    made = objects / f"{source.stem}-{_digest(parts)}.o"
    if not made.is_file():
        with tempfile.TemporaryDirectory(dir=objects, prefix=".compile") as scratch:
            out = Path(scratch) / made.name
            _run([*command, "-o", str(out)], f"{target}: compiling {name}", verbose, csrc)
            os.replace(out, made)
    return made


def _compiler(target: str) -> list[str]:
    """The command without options of ours, for compiling and for linking."""
    if target == "cpu":
        return find_cxx()
    nvcc, cxx = find_nvcc(), find_cxx()
    if len(cxx) > 1:
        raise BuildError(
            f"CXX: nvcc takes the name of a compiler alone, without wrapper or options, got {shlex.join(cxx)!r}"
        )
    return [nvcc, f"-ccbin={cxx[0]}"]


def _flags(target: str, level: str) -> list[str]:
    if target == "cpu":
        return [*_COMMON, *_CPP, *LEVELS[level]]
    numbers = [number for number in _ARCHITECTURES if number in _architectures(find_nvcc())]
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    codes.append(f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}")  # for GPUs to come
    return [*_COMMON, *_CUDA, *_SPILLS, *codes]


@cache
def _architectures(nvcc: str) -> frozenset[int]:
    shown = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    known = frozenset(int(number) for number in re.findall(r"^sm_(\d+)$", shown, re.MULTILINE))
    if not known & set(_ARCHITECTURES):
        raise BuildError(f"{nvcc}: expected a compiler for some of sm_{_ARCHITECTURES}, it knows {sorted(known)}")
    return known


def _stubs(target: str, scratch: Path) -> list[str]:
    """Names of empty libraries in `scratch` that stand in for torch's: those are in the process when ours is loaded,
    and a CPU build of torch lacks some of them."""
    stubs = [f"lib{name}.so" for name in ("torch_cpu", "torch_cuda")[: 1 + TARGETS.index(target)]]
    for stub in stubs:
        command = [*find_cxx(), "-shared", "-fPIC", f"-Wl,-soname,{stub}", "-xc++", os.devnull, "-o", stub]
        _run(command, stub, False, scratch)
    return stubs


def _linker(target: str, stubs: list[str], digest: str) -> list[str]:
    """The command without objects, to be run in the folder of the stubs."""
    # Stubs go to the linker itself: nvcc would put them before the option that keeps them.
    options = ",".join([f"--build-id=0x{digest}", "--no-as-needed", *stubs])
    if target == "cpu":
        return [*_compiler(target), "-shared", f"-Wl,{options}"]
    return [*_compiler(target), "-shared", "-cudart=static", "--no-device-link", f"-Xlinker={options}"]


def _run(command: list[str], what: str, verbose: bool, folder: Path | None = None) -> None:
    if verbose:
        print(shlex.join(command), flush=True)
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    output = done.stdout + done.stderr
    if done.returncode:
        raise BuildError(f"{what} failed:\n{shlex.join(command)}\n{output}")
    if output.strip():
        print(output.rstrip(), file=sys.stderr)


def _sources(target: str) -> list[Path]:
    return sorted(source_folder().glob(f"*/*{_SUFFIXES[target]}"))


def _headers(source: Path) -> list[Path]:
    """The headers of the project that a source includes, directly or not, in order of discovery."""
    headers: list[Path] = []
    unread = [source]
    while unread:
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', unread.pop().read_text(), re.MULTILINE):
            header = source_folder() / name
            if header not in headers and header.is_file():
                headers.append(header)
                unread.append(header)
    return headers


def _tools(target: str) -> str:
    shown = _versions(target)[0].splitlines()
    release = [line for line in shown if "release" in line] or shown or _compiler(target)
    return f"{release[0]}, torch {find_torch().version}"


def _versions(target: str) -> list[str]:
    """What the compilers of a target say of themselves; for CUDA nvcc and the host's."""
    return [_version(tuple(find_cxx()))] if target == "cpu" else [_version((find_nvcc(),)), _version(tuple(find_cxx()))]


@cache
def _version(command: tuple[str, ...]) -> str:
    return subprocess.run([*command, "--version"], capture_output=True, text=True).stdout.strip()


def _digest(parts: Iterable[str | bytes]) -> str:
    total = hashlib.sha256(platform.machine().encode())
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()[:24]


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _private(folder: Path) -> Path:
    """Create a folder of the cache for this user alone."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(folder)
    except OSError as error:
        raise BuildError(f"no cache folder: {error}; set XDG_CACHE_HOME") from None
    if not _writable(folder):
        raise BuildError(f"{folder} cannot be written to; set XDG_CACHE_HOME")
    return folder


def _check_private(folder: Path) -> None:
    """What lies there is linked or loaded: nobody else may put anything into it."""
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise BuildError(f"{folder}: others own it or may write to it; change that, or set XDG_CACHE_HOME")


def _replace(path: Path, content: bytes) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build") as scratch:
        whole = Path(scratch) / path.name
        whole.write_bytes(content)
        os.replace(whole, path)
