"""The documents are part of the product: links resolve, commands exist, and files say only what they may."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SKIPPED_FOLDERS = {".git", ".venv", "build", "dist", "node_modules", "out"}
MAXIMUM_LINES = 500

# In halves, so that this file passes its own test.
REGISTRY_HOSTS = tuple(
    ".".join(halves)
    for halves in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("registry.npmjs", "org"),
        ("registry.yarnpkg", "com"),
        ("deb.debian", "org"),
        ("archive.ubuntu", "com"),
        ("apt.postgresql", "org"),
        ("proxy.golang", "org"),
        ("index.crates", "io"),
    )
)


@cache
def project_files() -> tuple[Path, ...]:
    """The files under version control; in a tree without git (a source archive), all but what is made."""
    try:
        listed = subprocess.run(
            ["git", "-c", "safe.directory=*", "ls-files", "-z"],
            cwd=ROOT,
            capture_output=True,
            check=True,
            text=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return tuple(path for path in sorted(ROOT.rglob("*")) if path.is_file() and not skipped(path))
    paths = (ROOT / name for name in listed.split("\0") if name)
    return tuple(path for path in paths if path.is_file())


def skipped(path: Path) -> bool:
    parts = path.relative_to(ROOT).parts
    return any(
        part in SKIPPED_FOLDERS or part.endswith(("_cache", "__pycache__", ".egg-info")) for part in parts
    )


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def markdown() -> list[Path]:
    return [path for path in project_files() if path.suffix == ".md"]


def modules() -> list[Path]:
    return [path for path in project_files() if path.suffix == ".py"]


def prose(text: str) -> str:
    """The text without its code: an example may hold what looks like a link."""
    without_blocks = re.sub(r"^ *(```|~~~).*?^ *\1 *$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", without_blocks)


def links(text: str) -> list[str]:
    inline = re.findall(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)", prose(text))
    references = re.findall(r"^\[[^\]]+\]:\s+(\S+)", prose(text), flags=re.MULTILINE)
    return [link for link in inline + references if not re.match(r"[a-z][a-z+.-]*:", link)]


def anchors(document: Path) -> set[str]:
    """The fragments that GitHub gives to the headings."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#{1,6}\s+(.+?)\s*$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def resolves(document: Path, link: str) -> bool:
    name, _, fragment = link.partition("#")
    target = (document.parent / name).resolve() if name else document
    if not target.exists():
        return False
    return not fragment or target.suffix != ".md" or fragment in anchors(target)


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def make_commands(text: str) -> set[str]:
    """Targets written as commands: in backquotes, or at the start of a line of a code block."""
    quoted = re.findall(r"`make ([a-z][a-z-]*)`", text)
    in_blocks = re.findall(r"^\s*(?:\$ )?make ([a-z][a-z-]*)\b", text, flags=re.MULTILINE)
    return {*quoted, *in_blocks}


@pytest.mark.parametrize("document", markdown(), ids=named)
def test_relative_links_resolve(document: Path) -> None:
    broken = [link for link in links(document.read_text(encoding="utf-8")) if not resolves(document, link)]
    assert broken == []


@pytest.mark.parametrize("document", markdown(), ids=named)
def test_every_make_target_named_exists(document: Path) -> None:
    assert make_commands(document.read_text(encoding="utf-8")) - make_targets() == set()


def test_every_make_target_is_phony_or_a_file() -> None:
    [phony] = re.findall(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(phony.split()) == make_targets()


def test_the_readme_begins_with_the_two_commands() -> None:
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README.md yet")
    named_there = make_commands(readme.read_text(encoding="utf-8"))
    assert {"demo", "test"} <= named_there


def test_no_file_names_a_package_registry() -> None:
    found = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{named(path)}: {host}" for host in REGISTRY_HOSTS if host in text]
    assert found == []


def test_the_lock_holds_hashes_and_no_addresses() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert re.findall(r"https?:|file:|--(?:extra-)?index|--find-links|--trusted|@ ", lock) == []
    requirements = re.findall(r"^[a-z0-9][^\n]*(?:\n    --hash[^\n]*)*", lock, flags=re.MULTILINE)
    assert requirements
    assert [line.split("==")[0] for line in requirements if "--hash=sha256:" not in line] == []


@pytest.mark.parametrize("module", modules(), ids=named)
def test_no_module_is_too_long(module: Path) -> None:
    assert len(module.read_text(encoding="utf-8").splitlines()) <= MAXIMUM_LINES
