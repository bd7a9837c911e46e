"""What the site of mkdocs.yml is made of: a hook of mkdocs.

The README, the pages of docs/ and all that they link to keep their places, so that a link leads where it leads in the
repository. Each example is a page, and so is each module that `API` in mkdocs.yml names, made of its docstrings.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("*.md", "docs/*.md", "docs/*.png", "examples/*.md", "benchmarks/data/h200_*")
API = "api/"
# In the place of all names: ScaleSchedule has its page, and the rest of the module is for the patch alone.
SHOWN = {"fastvar": ["explain", "support"], "fastvar.integrations.infinity": ["constructing", "loss_weights"]}


def on_files(files: Files, config: Any) -> Files:
    """All pages, and the theme's own files."""
    found = [file for file in files if file.src_dir != config.docs_dir]
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        found.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for path in sorted((ROOT / "examples").glob("*.py")):
        title = path.stem.replace("_", " ").capitalize()
        text = f'# {title}\n\n```python title="examples/{path.name}"\n{path.read_text()}```\n'
        found.append(File.generated(config, f"examples/{path.stem}.md", content=text))
    for place in re.findall(rf"\b{API}\S+\.md", (ROOT / "mkdocs.yml").read_text()):
        found.append(File.generated(config, place, content=reference(place.removeprefix(API).removesuffix(".md"))))
    return Files(found)


def reference(module: str) -> str:
    """A page of all that a module has, or of a package's public names, or of what is `SHOWN`. A package's names are
    taken from the modules that they come from: `fastvar.ops.policy_loss` would be the page of a module of that name."""
    package = ROOT / module.replace(".", "/") / "__init__.py"
    if not package.is_file():
        members = f", members: {SHOWN[module]}" if module in SHOWN else ""
        options = f"show_root_heading: false, show_root_toc_entry: false{members}"
        return f"# {module}\n\n::: {module}\n    options: {{{options}}}\n"
    tree = ast.parse(package.read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    origins = {name.name: f"{node.module}.{name.name}" for node in imports for name in node.names}
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    (public,) = [node.value for node in assigned if ast.unparse(node.targets[0]) == "__all__"]
    names = [f"::: {origins[name]}" for name in SHOWN.get(module) or ast.literal_eval(public)]
    return "\n\n".join([f"# {module}", ast.get_docstring(tree) or "", *names, ""])


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Marks of generated parts go: GitHub ends an HTML block after its line, Python's Markdown does not. A link to an
    example leads to its page."""
    markdown = re.sub(r"^<!-- .* -->$", "", markdown, flags=re.MULTILINE)
    return re.sub(r"(?<=\]\()(\w+)\.py(?=\))", r"\1.md", markdown)
