"""The first page keeps its promises: what it prints runs, its numbers are the record's, its citations are valid."""
import datetime
import re
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT / "docs"))
import figure  # noqa: E402
import readme  # noqa: E402
import results  # noqa: E402


def test_it_is_short():
    assert len(README.splitlines()) < 120


def test_first_screen_has_the_figure():
    "Before the first heading below the title: the figure, with words for who can't see it, and what it isn't for."
    first = README.split("\n## ")[0]
    alt, path = re.search(r"!\[(.+)\]\((\S+)\)", first).groups()
    assert len(alt) > 40 and "**Good for**" in first and "**Not for**" in first
    with Image.open(ROOT / path) as picture:
        assert picture.width > 800 and "RGB" in picture.mode
    assert (ROOT / path).stat().st_size < 200_000


def test_python_runs_as_printed():
    "With torchvision's network in it, nothing added: the samples are images, and the classifier is as it was."
    code, = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    samples, x = names["samples"], names["x"]
    assert samples.shape == x.shape == names["adversarial"].shape and samples.abs().max() <= 1
    assert names["log_density"].shape == (4,) and names["log_density"].isfinite().all()
    assert not torch.equal(samples, x) and not names["classifier"].training
    assert all(p.grad is None for p in names["classifier"].parameters())


def test_robustbench_works_as_said():
    "A network for [0, 1] behind `SignedInterval` has the energies of its own images."
    from robust_jem.ebm.energy import energy
    from robust_jem.judge.robustness import SignedInterval
    assert "`SignedInterval(load_model(…))`, from `robust_jem.judge.robustness`" in README
    torch.manual_seed(0)
    unit = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10))
    x = torch.rand(5, 3, 2, 2)
    torch.testing.assert_close(energy(SignedInterval(unit), 2 * x - 1), -unit(x).logsumexp(1))


@pytest.mark.parametrize("name", ["readme.md", "readme-figure.md"])
def test_numbers_are_the_records(monkeypatch, tmp_path, name):
    "The generated files, made anew."
    monkeypatch.setattr(results, "FIGURES", tmp_path)
    monkeypatch.setattr(sys, "argv", ["results.py"])
    results.main()
    text = (tmp_path / name).read_text(encoding="utf-8")
    assert text == (ROOT / "figures" / name).read_text(encoding="utf-8"), "run `python docs/results.py`"
    assert text.strip() in README


def test_table_is_small():
    rows = [line for line in (ROOT / "figures/readme.md").read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    assert len(rows) == 2 + 5 and {line.count("|") for line in rows} == {5}


def test_headings_of_included_files_go_below_the_section(tmp_path):
    (tmp_path / "a.md").write_text("## Accuracy\n\nText #1.\n")
    text = readme.expand_includes("## All\n\n<!-- include: a.md -->\n", tmp_path)
    assert text == "## All\n\n### Accuracy\n\nText #1.\n"


def test_map_of_the_code_is_made(tmp_path):
    for name in ("00_first", "01_second"):
        (tmp_path / "nbs/room").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"nbs/room/{name}.ipynb").touch()
    assert readme.expand_includes("| <!-- modules: room --> |", tmp_path) == "| `first` `second` |"
    linked = readme.expand_includes("<!-- modules: room -->", tmp_path, linked=True)
    assert linked == "[`first`](room/00_first.ipynb) [`second`](room/01_second.ipynb)"


def test_figure_has_a_row_a_stage():
    rows = {name: torch.zeros(10, 3, 8, 8, dtype=torch.uint8) for name in figure.SHOWN}
    fig = figure.draw(rows, tuple("abcdefghij"))
    said = [t.get_text() for t in fig.axes[0].texts]
    assert said[:3] == list(figure.SHOWN.values()) and said[3:] == list("abcdefghij")


# Citations


def metadata():
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]


def test_citation_file():
    "What the format's schema (1.2.0) requires, of the software and of each reference; `cffconvert --validate` agrees."
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cff["cff-version"] == "1.2.0" and cff["type"] == "software" and cff["message"] and cff["title"]
    assert (cff["version"], cff["license"]) == (metadata()["version"], "Apache-2.0")
    for cited in (cff, *cff["references"]):
        assert cited["title"] and cited["type"] and cited["authors"]
        people = {"family-names", "given-names", "alias", "affiliation", "email", "orcid", "website", "name-particle"}
        assert all("name" in a or set(a) <= people for a in cited["authors"])
        assert 1900 < cited.get("year", 2020) <= datetime.date.today().year
    kinds = {"article", "conference-paper", "software", "generic"}
    assert {r["type"] for r in cff["references"]} <= kinds
    assert all(set(i) == {"type", "value"} for r in cff["references"] for i in r.get("identifiers", ()))


def entries(text):
    "BibTeX entries, strictly: kind, key, fields in balanced braces, one a line, commas between them."
    found = {}
    for kind, key, body in re.findall(r"^@(\w+)\{([\w:-]+),\n(.*?)\n\}$", text, re.M | re.S):
        lines = body.splitlines()
        fields = [re.fullmatch(r"  (\w+) *= \{(.*)\}(,?)", line) for line in lines]
        assert all(fields), lines
        assert [bool(m[3]) for m in fields] == [True] * (len(lines) - 1) + [False]
        assert all(m[2].count("{") == m[2].count("}") for m in fields)
        found[key] = {"kind": kind} | {m[1]: m[2] for m in fields}
    return found


def test_bibtex_entry():
    text = (ROOT / "CITATION.bib").read_text(encoding="utf-8")
    found = entries(text)
    assert len(found) == text.count("@") == 2 and text.strip() in README
    software, paper = found["robust_jem"], found["korst_adversarial"]
    assert software["version"] == metadata()["version"] and software["url"] == metadata()["git_url"]
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert software["title"] == cff["title"] and paper["title"] == cff["references"][0]["title"]
    assert all(a["family-names"] in paper["author"] for a in cff["references"][0]["authors"])
