"""Builds the folder that Hugging Face's package `kernels` loads: the operators that need nothing but torch and Triton.

    python hub/build.py OUTPUT [REPOSITORY]

Sources are copied. Their imports of fastvar become relative, names of modules in strings start with the name that the
folder is loaded under, and the ops are registered in a namespace made from the contents, so that several builds and an
installed fastvar live in one process. What cannot be rewritten that way ends the build with an error.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "fastvar"
VERSION = 0  # of the interface; 0 says that it still changes
# The quantisers are left out: their best implementations are in CUDA and C++.
OPERATORS = (
    "adaptive_layer_norm",
    "block_causal_attention",
    "cached_attention",
    "cross_entropy",
    "group_norm_silu",
    "policy_loss",
    "propagate_mask",
    "qk_norm_rope",
    "sample_tokens",
    "token_log_probs",
)
OPERATOR = "ops/_operator.py"
MODULES = ("profiling", "random", "ranges", "schedule", "statistics")
# Imported by implementations that run on request or where these are installed; numpy by the sampler on CPUs.
OPTIONAL = ("cutlass", "flash_attn", "numpy", "nvtx", "xformers")
VARIANTS = {"torch-cpu": {"type": "cpu"}, "torch-cuda": {"type": "cuda", "archs": ["8.0+PTX"]}}
CARD = """---
license: apache-2.0
tags:
  - kernels
---

# {name}

Operators for visual autoregressive (next-scale) image models, in Triton:

```python
from kernels import get_kernel

fastvar = get_kernel("{repository}", version={version}, trust_remote_code=True)
schedule = fastvar.ScaleSchedule((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
out = fastvar.block_causal_attention(q, k, v, schedule)  # (B, L, H, D)
```

{names}
"""


class CannotRewrite(Exception):
    """A source says something that this script cannot say in the folder."""


def main(output: Path, repository: str = f"OWNER/{NAME}") -> None:
    """Writes output/build/<variant> for each variant, and output/README.md, which says how to load `repository`.

    Raises:
        CannotRewrite: a source says what cannot be said in the folder.
        FileExistsError: there is something at `output`.
    """
    output.mkdir(parents=True)
    files = contents()
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]
    for variant, backend in VARIANTS.items():
        write_variant(output / "build" / variant, files, f"_{NAME}_{backend['type']}_{digest}", backend)
    names = re.findall(r'^    "(\w+)",$', files["__init__.py"], re.MULTILINE)
    listed = ", ".join(f"`{name}`" for name in names)
    (output / "README.md").write_text(CARD.format(name=NAME, repository=repository, version=VERSION, names=listed))


def contents() -> dict[str, str]:
    """The files of a variant by path. Their ops are still in the namespace of fastvar."""
    sources = {f"{name}.py": ROOT / f"fastvar/{name}.py" for name in MODULES}
    sources |= {f"ops/{path.name}": path for path in (ROOT / "fastvar/ops").glob("_[a-z]*.py")}
    sources |= {f"ops/{name}.py": ROOT / f"fastvar/ops/{name}.py" for name in OPERATORS}
    sources["ops/_extension.py"] = ROOT / "hub/without_extension.py"
    for folder in (*OPERATORS, "common"):
        for path in (ROOT / "kernels" / folder).glob("*.py"):
            if path.name not in ("impl_cpp.py", "impl_cuda.py"):
                sources[f"kernels/{folder}/{path.name}"] = path
    files = {place: rewritten(path.read_text(), place, set(sources)) for place, path in sorted(sources.items())}
    files["__init__.py"] = public((ROOT / "fastvar/ops/__init__.py").read_text())
    return files


def public(source: str) -> str:
    """The folder's own `__init__.py`, made of that of fastvar.ops."""
    names = {"ScaleSchedule": "schedule"}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            module = node.module.removeprefix("fastvar.")
            if module.removeprefix("ops.") in OPERATORS:
                names |= {alias.name: module for alias in node.names}
    names |= {"explain": "ops._dispatch", "support": "ops._dispatch"}
    lines = [f"from .{module} import {name}" for name, module in names.items()]
    return "\n".join([*lines, "", "__all__ = [", *(f'    "{name}",' for name in sorted(names)), "]", ""])


def rewritten(source: str, place: str, places: set[str]) -> str:
    """A source of fastvar as it is at a place in the folder, where `places` are all that there are."""
    depth = place.count("/") + 1
    root = f"{{__name__.rsplit('.', {depth})[0]}}"  # the name that the folder is loaded under
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    parts = {part for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    documentation = {node.value for node in nodes if isinstance(node, ast.Expr)}
    edits: list[tuple[int, int, str, str]] = []
    for node in nodes:
        line, column = getattr(node, "lineno", 0) - 1, getattr(node, "col_offset", 0)
        problem = ""
        match node:
            case ast.Import(names=names):
                problem = ", ".join(name.name for name in names if not is_outside(name.name))
            case ast.ImportFrom(module=str(module), names=names, level=0) if module.split(".")[0] == "fastvar":
                inner = module.removeprefix("fastvar").removeprefix(".")
                folder = inner.replace(".", "/")
                wanted = {f"{folder}/{name.name}.py".removeprefix("/") for name in names}
                if f"{folder}.py" not in places and not wanted <= places:
                    problem = f"{module}, which is not in the folder"
                edits.append((line, column, f"from {module} import", f"from {'.' * depth}{inner} import"))
            case ast.ImportFrom(module=module, level=level):
                problem = "" if level == 0 and is_outside(module or "") else f"import from {module or '.'}"
            case ast.Attribute(attr=name) if name.startswith("fastvar"):
                problem = f"{name}, a namespace of ops that the folder has not"
            case ast.JoinedStr(values=[ast.Constant(value=str(text)), *_]) if "fastvar.kernels" in text:
                edits.append((line, column, 'f"fastvar.', f'f"{root}.'))
            case ast.Constant(value=str(text)) if "fastvar.kernels" in text and node not in parts | documentation:
                problem = text if "{" in text else ""
                edits.append((line, column, '"fastvar.', f'f"{root}.'))
        if problem:
            raise CannotRewrite(f"{place}:{line + 1}: {problem}")
    lines = source.encode().split(b"\n")  # columns count bytes
    for line, column, before, after in sorted(edits, reverse=True):
        text = lines[line][column:].decode()
        if not text.startswith(before):
            raise CannotRewrite(f"{place}:{line + 1}: expected {before}, got {text}")
        lines[line] = lines[line][:column] + (after + text.removeprefix(before)).encode()
    return b"\n".join(lines).decode()


def is_outside(module: str) -> bool:
    """Whether a module is of Python, of torch or Triton, or optional."""
    top = module.split(".")[0]
    return top in sys.stdlib_module_names or top in ("torch", "triton", *OPTIONAL)


def write_variant(folder: Path, files: dict[str, str], identity: str, backend: dict[str, object]) -> None:
    """The files, with ops in a namespace that is called `identity`, and what there is to know of them."""
    own, count = re.subn('^NAMESPACE = "fastvar"$', f'NAMESPACE = "{identity}"', files[OPERATOR], flags=re.MULTILINE)
    if count != 1:
        raise CannotRewrite(f"{OPERATOR}: expected one line that sets NAMESPACE, got {count}")
    digests = {}
    for place, text in {**files, OPERATOR: own}.items():
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        digests[place] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    metadata = {
        "name": NAME,
        "id": identity,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "kernel-depends": [],
        "backend": backend,
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(f"{__doc__}\nexpected one or two arguments, got {len(sys.argv) - 1}")
    main(Path(sys.argv[1]), *sys.argv[2:])
