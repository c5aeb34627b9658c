"""Build the guides and the API reference as one site: `make docs`, which writes out/site/index.html.

The pages stay where they are; copies of them lie in out/site-source as they lie here, so that their links hold. Each
public module gets a page of reference, made from its docstrings without importing it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "LICENSES/*", "docs/**/*", "common/assets/**/README.md",
    "examples/*.ipynb",
)  # fmt: skip
PACKAGES = ("common", "clipcap", "dietnerf", "recycle_gpt2")
FETCHED = re.compile(r"""<(?:script|img|iframe|source|link rel="?stylesheet"?)[^>]*(?:src|href)="?(?:https?:)?//""")
"""What a browser would fetch from elsewhere when it opens a page; links that a reader follows are none."""


def copy_pages(target: Path) -> None:
    """Copy every page, and what pages show or link to, to the same place below `target`."""
    shutil.rmtree(target, ignore_errors=True)
    for pattern in PAGES:
        for path in ROOT.glob(pattern):
            if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts:
                copy = target / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


def write_reference(target: Path) -> list[str]:
    """Write a page for each public module; returns their names."""
    names = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if any(part.startswith("_") for part in parts if part != "__init__"):
                continue
            name = ".".join(part for part in parts if part != "__init__")
            if path.name != "__init__.py" or path.read_text().strip():
                page = target / "reference" / f"{name}.md"
                page.parent.mkdir(parents=True, exist_ok=True)
                page.write_text(f"# {name}\n\n::: {name}\n")
                names.append(name)
    links = [f"- [{name}]({name}.md)" for name in names]
    (target / "reference" / "index.md").write_text("# Reference\n\n" + "\n".join(links) + "\n")
    return names


def pages_that_fetch(site: Path) -> list[str]:
    """The pages of a site that ask another host for something when they are opened."""
    return [str(page.relative_to(site)) for page in sorted(site.rglob("*.html")) if FETCHED.search(page.read_text())]


def build(out: Path) -> Path:
    """Build the site in `out`/site and return its directory; a broken link or a page that fetches is an error."""
    source, site = out / "site-source", out / "site"
    copy_pages(source)
    names = write_reference(source)
    config = out / "mkdocs.yml"
    config.write_text(
        f"INHERIT: {ROOT / 'docs' / 'mkdocs.yml'}\ndocs_dir: {source.resolve()}\nsite_dir: {site.resolve()}\n"
    )
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--clean", "--config-file", str(config)]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    if fetching := pages_that_fetch(site):
        raise SystemExit(f"error: these pages fetch from elsewhere: {', '.join(fetching)}")
    print(f"{site / 'index.html'}: {len(names)} modules and {len(list(source.rglob('*.md'))) - len(names) - 1} pages")
    return site


if __name__ == "__main__":
    build(ROOT / "out")
