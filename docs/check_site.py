"""Check the built site: `python docs/check_site.py`, after `make docs`. Prints a table; exits 1 for a fault.

Reads every page of _docs/ (another folder: first argument) for links, anchors and pictures that lead nowhere, pictures
without a text, resources from elsewhere, and pages too large. Then Chromium opens each page, as a wide light one and as
a dark one on a phone, and axe-core looks for what hinders readers: contrast, names, order, tables. `--no-browser`
leaves that out; `--only GLOB` looks at some pages with it.

axe-core comes from PyPI, in the one wheel that carries a current one, of which nothing else is used."""
import argparse
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from fnmatch import fnmatch
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

from browser import Browser, find

ROOT = Path(__file__).resolve().parent.parent
SITE, TOOLS = ROOT / "_docs", ROOT / "_build" / "tools"
AXE_WHEEL = "axe-playwright-python==0.1.8"           # axe-core 4.12.1, MPL-2.0
AXE_SHA256 = "84494fec757e4710dc751c8d7a636e457f4532f08f85c86dc9070133fbff53bc"
TAGS = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa")
LIMIT = 400_000                                      # bytes of HTML
# pages that may be larger, and why
LARGER = {}
VIEWS = {
    "wide, light": (1280, 900, "light"),
    "phone, dark": (390, 800, "dark"),
}
NARROWEST = 320                                      # CSS pixels that a page must fit: WCAG 1.4.10


@dataclass
class Page:
    "What a page holds that others or a reader depend on."
    size: int = 0
    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    resources: list[str] = field(default_factory=list)
    images: list[tuple[str, str | None]] = field(default_factory=list)     # source and alternative text


class Reader(HTMLParser):
    "Collects a `Page` from its HTML."

    def __init__(self, page: Page):
        super().__init__()
        self.page = page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]):
        found = dict(attrs)
        self.page.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.page.links.append(found["href"])
        if tag == "img":
            self.page.images.append((found.get("src") or "", found.get("alt")))
        if tag in ("img", "script", "iframe", "source", "video") and found.get("src"):
            self.page.resources.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload"):
            self.page.resources.append(found.get("href") or "")


def read(site: Path) -> dict[str, Page]:
    "The pages of a site, by their path in it."
    pages = {}
    for path in sorted(site.rglob("*.html")):
        if "_static" in path.relative_to(site).parts:
            continue
        page = Page(size=path.stat().st_size)
        Reader(page).feed(path.read_text(encoding="utf-8"))
        pages[path.relative_to(site).as_posix()] = page
    return pages


def inside(url: str, page: str, home: str = "") -> tuple[str, str] | None:
    "The file of the site, and the anchor in it, that a page's link leads to; none for one that leaves the site."
    if home and url.startswith(home):
        url = "/" + url[len(home):].lstrip("/")
    parts = urlsplit(url)
    if parts.scheme or parts.netloc:
        return None
    path, anchor = urldefrag(url)
    path = unquote(path.partition("?")[0])
    if not path:
        return page, anchor
    base = Path("/") if path.startswith("/") else Path("/") / Path(page).parent
    target = Path(_normal((base / path.lstrip("/")).as_posix())).as_posix().lstrip("/")
    return (target if target not in ("", ".") else "index.html"), anchor


def _normal(path: str) -> str:
    kept: list[str] = []
    for part in path.split("/"):
        if part == "..":
            kept = kept[:-1]
        elif part not in ("", "."):
            kept.append(part)
    return "/".join(kept)


def wrong_links(site: Path, pages: dict[str, Page], home: str = "") -> tuple[int, list[str]]:
    "Links and anchors within the site that lead nowhere."
    looked, wrong = 0, []
    for name, page in pages.items():
        for url in page.links:
            lead = inside(url, name, home)
            if lead is None:
                continue
            looked += 1
            target, anchor = lead
            if not (site / target).exists():
                wrong.append(f"{name}: {url} leads to no file")
            elif anchor and target in pages and unquote(anchor) not in pages[target].anchors:
                wrong.append(f"{name}: {url} leads to no such place in {target}")
    return looked, wrong


def wrong_resources(site: Path, pages: dict[str, Page]) -> tuple[int, list[str]]:
    "Pictures, scripts and styles that aren't there, or that come from another place: the site works without a network."
    looked, wrong = 0, []
    for name, page in pages.items():
        for url in page.resources:
            looked += 1
            lead = inside(url, name)
            if url.startswith("data:"):
                continue
            if lead is None:
                wrong.append(f"{name}: {url} comes from elsewhere")
            elif not (site / lead[0]).exists():
                wrong.append(f"{name}: {url} is missing")
    return looked, wrong


def wrong_images(pages: dict[str, Page]) -> tuple[int, list[str]]:
    "Pictures without a text, or with a file's name for one."
    looked, wrong = 0, []
    for name, page in pages.items():
        for source, text in page.images:
            looked += 1
            if text is None or not text.strip():
                wrong.append(f"{name}: {source} has no alternative text")
            elif text.strip().rpartition("/")[2] == source.rpartition("/")[2]:
                wrong.append(f"{name}: the alternative text of {source} is its name")
    return looked, wrong


def too_large(pages: dict[str, Page]) -> tuple[int, list[str]]:
    "Pages over the limit without a stated reason."
    wrong = [f"{name}: {page.size / 1000:.0f} kB of HTML, over {LIMIT / 1000:.0f}" for name, page in pages.items()
             if page.size > LIMIT and not any(fnmatch(name, pattern) for pattern in LARGER)]
    return len(pages), wrong


def axe() -> str:
    "axe-core's source, downloaded once; raises `RuntimeError` where it can't be had or isn't the one that is pinned."
    path = TOOLS / "axe.min.js"
    if not path.exists():
        TOOLS.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--only-binary", ":all:", "--dest", str(TOOLS), AXE_WHEEL]
        if subprocess.run(command).returncode:
            raise RuntimeError(f"pip couldn't download {AXE_WHEEL}")
        wheel = next(TOOLS.glob("axe_playwright_python-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            path.write_bytes(archive.read("axe_playwright_python/axe.min.js"))
    source = path.read_bytes()
    if sha256(source).hexdigest() != AXE_SHA256:
        raise RuntimeError(f"{path}: not the file of {AXE_WHEEL}; delete it")
    return source.decode()


RUN_AXE = """axe.run(document, {runOnly: {type: 'tag', values: %s}, resultTypes: ['violations']}).then(found =>
  found.violations.map(v => `${v.id} (${v.nodes.length}): ${v.help}; ${v.nodes.slice(0, 2).map(n =>
    n.target.join(' ')).join(', ')}`))"""


FOUND = """new Promise(done => {
  let left = 50;
  const look = () => {
    const found = document.querySelectorAll('#search-results li').length;
    if (found || !left--) done(found); else setTimeout(look, 100);
  };
  look();
})"""


def wrong_search(site: Path, browser: Browser, word: str = "energy") -> tuple[int, list[str]]:
    "Whether the site's search finds a word that is on many pages, without a server."
    if not (site / "search.html").exists():
        return 1, ["search.html is missing"]
    browser.open((site / "search.html").resolve().as_uri() + f"?q={word}")
    return 1, [] if browser.js(FOUND) else [f"search.html: finds no page for {word!r}"]


def with_browser(site: Path, names: list[str]) -> dict[str, tuple[int, list[str]]]:
    "What axe finds in each view of each page, what a page logs, and pages that are wider than a small phone."
    source, wrong = axe(), {f"axe: {view}": [] for view in VIEWS} | {"errors in the console": [], "width": []}
    with Browser() as browser:
        for name in names:
            for view, (width, height, scheme) in VIEWS.items():
                browser.resize(width, height)
                browser.prefer(color_scheme=scheme, reduced_motion="reduce")
                browser.open(site / name)
                wrong["errors in the console"] += [f"{name}: {error}" for error in browser.errors]
                browser.js(source + "; 0")
                found = browser.js(RUN_AXE % list(TAGS))
                wrong[f"axe: {view}"] += [f"{name}: {violation}" for violation in found]
            browser.resize(NARROWEST, 640)
            wide = browser.js("document.documentElement.scrollWidth")
            if wide > NARROWEST:
                wrong["width"].append(f"{name}: {wide} pixels wide on a screen of {NARROWEST}")
        searched = wrong_search(site, browser)
    return {what: (len(names), sorted(set(found))) for what, found in wrong.items()} | {"search": searched}


def home() -> str:
    "Where the site is published: links that are written in full lead into it as well."
    from nbdev.config import get_config

    cfg = get_config()
    return f"{cfg['doc_host']}{cfg['doc_baseurl']}/"


def check(site: Path, browser: bool = True, only: str = "*") -> dict[str, tuple[int, list[str]]]:
    "For each check, how much was looked at and what is wrong."
    pages = read(site)
    results = {
        "links and anchors": wrong_links(site, pages, home()),
        "resources": wrong_resources(site, pages),
        "alternative texts": wrong_images(pages),
        f"at most {LIMIT // 1000} kB of HTML": too_large(pages),
    }
    if browser:
        results |= with_browser(site, [name for name in pages if fnmatch(name, only)])
    return results


def table(results: dict[str, tuple[int, list[str]]], most: int | None = None) -> str:
    "A line for each check, then what is wrong, at `most` so many lines of each."
    rows = [("check", "looked at", "wrong")]
    rows += [(what, f"{looked:,}", str(len(wrong))) for what, (looked, wrong) in results.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join((row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2]))) for row in rows]
    for what, (_, wrong) in results.items():
        if wrong:
            lines += ["", f"{what}:", *(f"  {line}" for line in wrong[:most])]
        if most is not None and len(wrong) > most:
            lines.append(f"  … and {len(wrong) - most} more: --all shows them")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("site", nargs="?", type=Path, default=SITE)
    parser.add_argument("--no-browser", action="store_true", help="only read the pages")
    parser.add_argument("--only", default="*", metavar="GLOB", help="pages that the browser opens")
    parser.add_argument("--all", action="store_true", help="print every fault, not the first twenty of each kind")
    args = parser.parse_args()
    if not (args.site / "index.html").exists():
        print(f"{args.site}: no site there; run `make docs`", file=sys.stderr)
        return 2
    browser = not args.no_browser
    if browser and find() is None:
        print("no Chromium here, so axe-core is left out (`apt install chromium`, or set CHROMIUM)", file=sys.stderr)
        browser = False
    results = check(args.site, browser, args.only)
    print(table(results, None if args.all else 20))
    return int(any(wrong for _, wrong in results.values()))


if __name__ == "__main__":
    sys.exit(main())
