"""mkdocs' hook: what the pages link to outside docs/ becomes part of the site, so that one link serves both places.

On a repository's page `../src/jdm/terms.py` opens the file; on the site it opens a page that shows it. Markdown files
outside docs/ are pages as they are, notebooks are their cells, other files are shown as code, and a folder is the list
of its files.
"""

import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
IMAGES = (".png", ".svg")
HIDDEN = "---\nsearch:\n  exclude: true\n---\n\n"  # source code is not what a reader searches for


def target(source: str, link: str) -> str:
    """The place in the repository that a link of the file `source` leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def site_place(place: str) -> str:
    """A place in the repository -> its place among the site's sources."""
    if (ROOT / place).is_dir():
        place += "/index.md"
    elif Path(place).suffix not in (".md", *IMAGES):
        place += ".md"
    return place.removeprefix("docs/") if place.startswith("docs/") else f"repository/{place}"


def links(text: str) -> list[str]:
    return [link for _, link, _ in LINK.findall(text) if "://" not in link]


def shown(place: Path) -> str:
    """The Markdown that stands for a file or a folder."""
    name = place.relative_to(ROOT)
    if place.is_dir():
        files = sorted(p.name for p in place.iterdir() if p.suffix in (".md", ".py"))
        return f"{HIDDEN}# {name}\n\n" + "\n".join(f"- [{file}]({file})" for file in files)
    if place.suffix == ".md":
        return place.read_text()
    if place.suffix == ".ipynb":
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(place.read_text())["cells"]]
        return "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in cells)
    return f"{HIDDEN}# {place.name}\n\n`{name}`\n\n````{place.suffix[1:]}\n{place.read_text()}\n````\n"


def on_files(files, config):
    """Adds what pages link to, and what that links to in turn."""
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    while waiting:
        source = waiting.pop()
        if Path(source).suffix not in (".md", ".ipynb", ""):
            continue
        text = shown(ROOT / source)
        source += "/index.md" if (ROOT / source).is_dir() else ""
        for place in {target(source, link) for link in links(text)}:
            uri = site_place(place)
            if not (ROOT / place).exists() or files.get_file_from_path(uri):
                continue
            if uri.endswith(IMAGES):
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / place)))
            else:
                files.append(File.generated(config, uri, content=shown(ROOT / place)))
                waiting.append(place)
    return files


def on_page_markdown(markdown, page, config, files):
    """Points the links at the places on the site."""
    uri = page.file.src_uri
    outside = uri.startswith("repository/")
    source = uri.removeprefix("repository/").replace(".ipynb.md", ".ipynb") if outside else f"docs/{uri}"

    def moved(match):
        before, link, after = match.groups()
        place = target(source, link)
        if "://" in link or not (ROOT / place).exists():
            return match[0]  # strict mode refuses those that lead nowhere
        return before + posixpath.relpath(site_place(place), posixpath.dirname(uri) or ".") + after

    return LINK.sub(moved, markdown)
