"""The site: its interactive page in a browser, what it shows, the checker of built pages, texts that build.py adds."""

import importlib.util
import json
import math
import sys
from hashlib import sha256

import pytest
import torch
from conftest import REPO, executed_here
from PIL import Image

from robust_jem.core.images import load_images
from robust_jem.engine.pretrained import RobustJEM
from robust_jem.systems.base import TrainConfig
from robust_jem.systems.catalog import configure
from robust_jem.systems.hybrid_settings import build_model

sys.path.insert(0, str(REPO / "docs"))
import api  # noqa: E402
import browser  # noqa: E402
import check_site  # noqa: E402
import explore  # noqa: E402

needs_chromium = pytest.mark.skipif(
    browser.find() is None or importlib.util.find_spec("websocket") is None,
    reason="needs Chromium (apt install chromium, or CHROMIUM=path) and the Python package websocket-client",
)
LIMIT = 400_000


# What was drawn


@pytest.fixture(scope="module")
def data():
    return explore.read()


def test_shown_chains_are_of_the_committed_networks(data):
    for row in data["rows"]:
        weights = (REPO / row["folder"] / "model.safetensors").read_bytes()
        assert sha256(weights).hexdigest()[:16] == row["weights"], f"{row['title']}: trained anew; run `make explore`"


def test_sheets_and_logits_fit_each_other(data):
    lines = len(data["classes"]) * data["chains"]
    for row in data["rows"]:
        sheet = REPO / "figures/explore" / row["sheet"]
        assert sheet.stat().st_size < LIMIT
        assert Image.open(sheet).size == (len(row["stages"]) * data["size"], lines * data["size"])
        assert row["stages"][0] == "prior" and len(set(row["stages"])) == len(row["stages"])
        for statistics in ("running", "batch"):
            logits = torch.tensor(row["logits"][statistics])
            assert logits.shape == (len(row["stages"]), lines, len(data["classes"]))
            assert logits.isfinite().all() and math.isfinite(row["real"][statistics])


def test_notebook_draws_any_networks(tmp_path, here):
    images = load_images("digits")
    for system in ("robust_classifier", "robust_jem"):
        config = configure(TrainConfig, system, "digits", "cpu")
        model = RobustJEM(build_model(config, images), None, config, images.classes, images.shape)
        model.save_pretrained(tmp_path / "networks" / system, prior=False)
    settings = {"chain.outer_steps": 5, "attack.steps": 4}
    rows = ["robust_classifier attack", "robust_jem energy", "robust_jem combined"]
    asked = dict(out=str(tmp_path / "out"), folders=str(tmp_path / "networks/{system}"), rows=rows, chains=2, stages=6,
                 real_images=2, settings=settings)
    executed_here(REPO / "nbs/replication/explore.ipynb", asked)
    made = explore.read(tmp_path / "out")
    assert [row["title"] for row in made["rows"]] == ["Single Robust Classifier", "Robust JEM, energy",
                                                      "Robust JEM, combined"]
    stages = [row["stages"] for row in made["rows"]]
    assert stages[0] == ["prior", "attack 1", "attack 2", "attack 3", "attack 4"]
    assert stages[1] == ["prior", "step 1", "step 2", "step 3", "step 4", "step 5"]
    assert [s.split()[0] for s in stages[2]] == ["prior", "attack", "attack", "contrast", "step", "step"]
    assert stages[2][2] == "attack 4" and stages[2][-1] == "step 5"
    for row in made["rows"]:
        assert Image.open(tmp_path / "out" / row["sheet"]).size == (8 * len(row["stages"]), 8 * 20)
    assert explore.write_alone(tmp_path / "page", tmp_path / "out").exists()


# The page in a browser


@pytest.fixture(scope="module")
def chromium():
    with browser.Browser() as opened:
        yield opened


@pytest.fixture
def page(chromium, tmp_path):
    "The page alone, as on a desk: wide, light, with motion."
    chromium.resize(1280, 1000)
    chromium.prefer(color_scheme="light", reduced_motion="no-preference")
    chromium.open(explore.write_alone(tmp_path))
    return chromium


def shown(page) -> dict:
    "What a reader sees: step, numbers, and where on its sheet each picture is."
    return page.js("""({
      stage: document.querySelector('.explore-stage').textContent,
      slider: document.querySelector('input[type=range]').value,
      numbers: [...document.querySelectorAll('.explore-numbers dd')].map(e => Number(e.textContent.replace('−', '-'))),
      classes: [...document.querySelectorAll('.explore-classes tbody tr')].map(e => Number(e.cells[2].textContent)),
      places: [...document.querySelectorAll('.explore-images [role=img]')].map(e => e.style.backgroundPosition),
      labels: [...document.querySelectorAll('.explore-images [role=img]')].map(e => e.getAttribute('aria-label')),
      address: location.hash})""")


@needs_chromium
def test_arrow_keys_move_along_the_chain(page, data):
    before, pixels = shown(page), page.picture()
    assert before["stage"] == "prior"
    page.press("ArrowRight")
    page.press("ArrowRight")
    after = shown(page)
    assert after["stage"] == data["rows"][-1]["stages"][2] and after["slider"] == "2"
    assert after["numbers"] != before["numbers"] and after["classes"] != before["classes"]
    assert all(a != b for a, b in zip(after["places"], before["places"]))
    assert page.picture() != pixels
    page.press("ArrowLeft")
    assert shown(page)["stage"] == data["rows"][-1]["stages"][1]
    page.js("document.querySelector('input[type=range]').focus()")
    page.press("End")
    assert shown(page)["stage"] == data["rows"][-1]["stages"][-1]
    assert page.errors == []


@needs_chromium
def test_works_from_a_disk_without_a_network(page):
    assert page.errors == []
    assert all(url.startswith("file:") for url in page.requests)
    assert {url.rpartition("/")[2] for url in page.requests} >= {"explore.js", "explore.css", "data.js"}


@needs_chromium
def test_numbers_follow_from_the_logits(page, data):
    for address, row, label, chain, stage, statistics in (
        ("#jempp-energy/frog/2/7/running", 1, 6, 1, 7, "running"),
        ("#robust_jem-combined/ship/3/4/batch", 3, 8, 2, 4, "batch"),
    ):
        page.js(f"location.hash = '{address}'; new Promise(done => setTimeout(done, 100))")
        seen = shown(page)
        logits = torch.tensor(data["rows"][row]["logits"][statistics][stage][label * data["chains"] + chain],
                              dtype=torch.float64)
        expected = [-logits.logsumexp(0).item(), -logits[label].item(), logits.softmax(0)[label].item()]
        assert seen["numbers"] == pytest.approx(expected, abs=0.006)
        assert seen["classes"] == pytest.approx(logits.softmax(0).tolist(), abs=6e-4)
        assert seen["address"] == address
        assert data["classes"][label] in seen["labels"][chain]


@needs_chromium
def test_an_address_within_the_page_stays(page):
    page.js("location.hash = '#what-is-shown'; new Promise(done => setTimeout(done, 100))")
    assert shown(page)["address"] == "#what-is-shown" and shown(page)["stage"] == "prior"
    page.js("location.hash = '#robust_jem-combined/%/no/-7/x'; new Promise(done => setTimeout(done, 100))")
    assert shown(page)["stage"] == "prior"
    page.press("ArrowRight")
    assert shown(page)["address"].startswith("#robust_jem-combined/")
    assert page.errors == []


@needs_chromium
def test_everything_is_reached_by_keyboard(page, data):
    page.press("Tab")
    assert page.js("document.activeElement.name") == "explore-row"
    page.press("ArrowLeft")                                        # within a group the arrows choose, as anywhere
    assert page.js("document.activeElement.value") == data["rows"][2]["key"] and shown(page)["stage"] == "prior"
    reached = []
    for _ in range(8):
        page.press("Tab")
        reached.append(page.js("document.activeElement.name || document.activeElement.type || ''"))
    assert {"explore-label", "explore-chain", "range", "button", "explore-statistics"} <= set(reached)


@needs_chromium
@pytest.mark.parametrize("width", (320, 360, 400))
def test_fits_a_phone(page, width):
    page.resize(width, 700)
    assert page.js("document.documentElement.scrollWidth") == width
    sizes = page.js("[...document.querySelectorAll('.explore-images [role=img]')].map(e => e.offsetWidth)")
    assert len(set(sizes)) == 1 and sizes[0] >= 75


@needs_chromium
def test_plays_unless_motion_is_unwanted(page):
    page.js("document.querySelector('[data-play]').click(); new Promise(done => setTimeout(done, 1500))")
    assert int(shown(page)["slider"]) >= 1
    page.prefer(reduced_motion="reduce")
    assert page.js("getComputedStyle(document.querySelector('[data-play]')).display") == "none"


@needs_chromium
def test_dark_and_light_differ(page):
    light = page.js("getComputedStyle(document.body).backgroundColor")
    page.prefer(color_scheme="dark")
    assert page.js("getComputedStyle(document.body).backgroundColor") != light


@needs_chromium
@pytest.mark.parametrize("scheme", ("light", "dark"))
def test_axe_finds_nothing(page, scheme):
    if not (check_site.TOOLS / "axe.min.js").exists():
        pytest.skip("axe-core isn't here: `make site` downloads it")
    page.prefer(color_scheme=scheme, reduced_motion="reduce")
    page.js(check_site.axe() + "; 0")
    assert page.js(check_site.RUN_AXE % list(check_site.TAGS)) == []


# The checker

GOOD = ('<h1 id="top">A</h1><a href="b.html#there">b</a> <a href="https://example.org/x">out</a>'
        '<img src="i.png" alt="a cat">')


@pytest.fixture
def site(tmp_path):
    (tmp_path / "a.html").write_text(GOOD)
    (tmp_path / "folder").mkdir()
    (tmp_path / "b.html").write_text('<p id="there">b</p><a href="folder/c.html">c</a>')
    (tmp_path / "folder/c.html").write_text('<a href="../a.html#top">a</a><a href="https://here.io/jem/b.html">b</a>')
    (tmp_path / "i.png").write_bytes(b"")
    return tmp_path


def faults(site) -> list[str]:
    pages = check_site.read(site)
    checks = (check_site.wrong_links(site, pages, "https://here.io/jem/"), check_site.wrong_resources(site, pages),
              check_site.wrong_images(pages), check_site.too_large(pages))
    return [wrong for _, found in checks for wrong in found]


def test_a_good_site_passes(site):
    assert faults(site) == []


@pytest.mark.parametrize("html,said", [
    ('<a href="nowhere.html">x</a>', "leads to no file"),
    ('<a href="folder/c.html#nowhere">x</a>', "leads to no such place"),
    ('<a href="#nowhere">x</a>', "leads to no such place"),
    ('<a href="https://here.io/jem/nowhere.html">x</a>', "leads to no file"),
    ('<img src="gone.png" alt="a dog">', "is missing"),
    ('<script src="https://cdn.example.org/x.js"></script>', "comes from elsewhere"),
    ('<img src="i.png">', "no alternative text"),
    ('<img src="i.png" alt="">', "no alternative text"),
    ('<img src="i.png" alt="_images/i.png">', "is its name"),
    ("x" * 400_001, "over 400"),
])
def test_each_fault_is_found(site, html, said):
    (site / "d.html").write_text(html)
    found = faults(site)
    assert len(found) == 1 and said in found[0] and found[0].startswith("d.html")


def test_table_counts():
    text = check_site.table({"links": (1200, []), "sizes": (3, ["a.html: 500 kB"])})
    assert text.splitlines()[1].split() == ["links", "1,200", "0"]
    assert text.endswith("sizes:\n  a.html: 500 kB")


# Texts of pages


@pytest.mark.parametrize("path", sorted((REPO / "nbs/guide").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_guide_page_begins_with_its_finding(path):
    first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]).split("\n")
    said = [line for line in first[:4] if line.startswith("> ")]
    assert first[0].startswith("# ") and len(said) == 1, "a title, then one line that starts with `> `"
    assert 40 <= len(said[0]) <= 350, "the finding in three lines of a page"

def test_a_modules_table_names_what_it_has():
    table = api.contents("ebm.energy", ["joint_energy", "untouched"])
    assert "| [`joint_energy`](#api-ebm-energy-joint-energy) | E(x, y) = -f(x)[y]" in table
    assert table.count("\n") == 4


def test_settings_are_documented_with_their_ranges():
    table = api.document("systems.hybrid_settings", "Attack")
    assert "| `` eps `` | `float ≥0 = 0.1` | radius on the [-1,1] scale (paper) |" in table
    assert "| `` step_size `` | `float \\| None ≥1e-09 = None` | none: 2.5 eps / steps |" in table
    assert "_ArgConfig" not in table
    lines = api.document("systems.score", "ScoreConfig").splitlines()
    inherited = next(line for line in lines if "`` threads ``" in line)
    assert inherited.count("|") == 4 and not inherited.endswith("|  |")


@pytest.fixture(scope="module")
def build():
    pytest.importorskip("nbdev")
    spec = importlib.util.spec_from_file_location("site_build", REPO / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("text,said", [
    ("# Title\n\nFirst. A chain goes down, [as here](x.html):", "A chain goes down, as here"),
    ("It is `f(x)` of $x$.\n\n```python\ncode.\n```\n", "It is f(x) of x."),
    ("Words.\n\n| a | b |\n|---|---|\n", "Words."),
    ("## Only a heading", ""),
])
def test_what_a_page_said_last(build, text, said):
    assert build.last_sentence(text) == said


def test_a_picture_says_what_it_is_of(build):
    import nbformat

    drawn = nbformat.v4.new_output("display_data", data={"image/png": "aGk="})
    cell = nbformat.v4.new_code_cell("plot()", outputs=[drawn])
    assert build.adapt_code(cell, "", "Energies fall.").metadata["mystnb"]["image"]["alt"] == "Figure: Energies fall."
    cell = nbformat.v4.new_code_cell('#| fig-alt: "Two curves that fall"\nplot()', outputs=[drawn])
    assert build.adapt_code(cell, "", "Else.").metadata["mystnb"]["image"]["alt"] == "Two curves that fall"


def test_address_of_a_missing_page_is_answered_at_any_depth(build):
    html = build.not_found()
    assert "{{" not in html and 'href="https://' in html
    assert json.dumps(html)
