"""The documentation as a site: it builds without a warning, and a reader's browser asks no other host for anything."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; mkdocs.yml is strict, so that a link or an anchor that leads nowhere fails here."""
    pytest.importorskip("mkdocs", reason="pip install 'jdm[docs]'")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", out], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_every_page_of_the_docs_is_built(site):
    pages = [page.relative_to(ROOT / "docs").with_suffix(".html") for page in (ROOT / "docs").rglob("*.md")]
    assert {page for page in pages if not (site / page).is_file()} == set()


def test_every_page_stands_in_the_navigation():
    named = set(re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert named == {page.name for page in (ROOT / "docs").glob("*.md")}


def test_pages_fetch_nothing_from_other_hosts(site):
    fetched = re.compile(r"""<(script|img|iframe)[^>]*\ssrc="?(https?:)?//|<link[^>]*stylesheet[^>]*(https?:)?//""")
    assert {page.name for page in site.rglob("*.html") if fetched.search(page.read_text())} == set()
    assert "@import" not in "".join(file.read_text() for file in site.rglob("*.css"))


def test_links_out_of_docs_show_the_file(site):
    text = (site / "extending.html").read_text()
    assert 'href="repository/src/jdm/terms.py.html"' in text
    assert 'href="repository/SECURITY.html"' in text
    shown = re.sub("<[^>]+>", "", (site / "repository" / "examples" / "my_controls.py.html").read_text())
    assert "class Posterize(Control):" in shown


def test_the_api_page_has_the_docstrings(site):
    text = (site / "api.html").read_text()
    assert 'id="jdm.controls.base.Control.h"' in text
    assert "Training steps, at least 1" in text  # of Run's attributes
