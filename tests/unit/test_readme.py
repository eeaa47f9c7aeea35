"""The pages at the top are checked against the code; tests/examples runs what README says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("cobre_shm", "cobre_net", "tests", "bench", "scripts")
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
DESIGNS = ("cobre_shm/DESIGN.md", "cobre_net/DESIGN.md", "cobre_net/mpi/DESIGN.md")


@pytest.mark.parametrize("page", [*PAGES, *DESIGNS])
def test_links_lead_somewhere(page):
    path = ROOT / page
    text = path.read_text()
    titles = {slug(title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        if file and ":" not in file:
            assert (path.parent / file).exists(), target
        if not file:
            assert anchor in titles, target


def slug(title):
    """As GitHub makes anchors of titles."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, *DESIGNS])
def test_files_named_in_pages_exist(page):
    """Names such as ``kernels/rounds.py`` and ``tests/unit/test_readme.py``."""
    text = (ROOT / page).read_text()
    homes = [ROOT, (ROOT / page).parent, ROOT / "cobre_shm", ROOT / "cobre_net"]
    for name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|md|json|svg))`", text):
        if not name.startswith(("policy/", "system/")):
            assert any((home / name).exists() for home in homes), name
    ours = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    for name in re.findall(r"`(\w+\.py)`", text):
        assert name in ours or f"# {name}\n" in text, name
