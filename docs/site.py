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
    """A page of all that a module has, or of a package's public names, each from the module that it comes from: some
    are called as that is, so that `fastvar.ops.policy_loss` would be the module's page."""
    package = ROOT / module.replace(".", "/") / "__init__.py"
    if not package.is_file():
        return f"# {module}\n\n::: {module}\n    options: {{show_root_heading: false, show_root_toc_entry: false}}\n"
    tree = ast.parse(package.read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    origins = {name.name: f"{node.module}.{name.name}" for node in imports for name in node.names}
    (public,) = [node.value for node in tree.body if isinstance(node, ast.Assign)]  # __all__
    names = [f"::: {origins[name]}" for name in ast.literal_eval(public)]
    return "\n\n".join([f"# {module}", ast.get_docstring(tree) or "", *names, ""])


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Marks of generated parts go: GitHub ends an HTML block after its line, Python's Markdown does not."""
    return re.sub(r"^<!-- .* -->$", "", markdown, flags=re.MULTILINE)
