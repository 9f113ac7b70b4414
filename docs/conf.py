"""Sphinx's configuration; docs/build.py makes its input and calls it."""
import importlib.util
import shutil
from configparser import ConfigParser
from pathlib import Path

ini = ConfigParser(delimiters=["="])
ini.read(Path(__file__).parent.parent / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]

project, author, copyright, release = cfg["title"], cfg["author"], cfg["copyright"], cfg["version"]
html_title = f"{project} {release}"
html_baseurl = f"{cfg['doc_host']}{cfg['doc_baseurl']}/"

extensions = ["myst_nb", "sphinx.ext.mathjax"]
nb_execution_mode = "off"                              # build.py has run them
nb_merge_streams = True
nb_render_markdown_format = "myst"                     # tables and equations that a cell displays
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "attrs_block", "attrs_inline", "html_image"]
myst_heading_anchors = 3
# documentation of a name is a third-level heading, also where it comes right after the title
suppress_warnings = ["myst.header"]

html_theme = "furo"
pygments_dark_style = "a11y-high-contrast-dark"    # the theme's own underlines the names of imported modules
html_static_path = ["static", "../_build/static"]      # ours, and what build.py makes for the interactive page
html_css_files = ["site.css"]
html_js_files = [("site.js", {"defer": "defer"})]
html_use_index = False                                 # modules have tables of their names instead
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "source_repository": cfg["git_url"] + "/",
    "source_branch": cfg["branch"],
    "source_directory": "nbs/",
    "top_of_page_buttons": [],
    "light_css_variables": {"color-brand-primary": "#1a5a96", "color-brand-content": "#1a5a96"},
    "dark_css_variables": {"color-brand-primary": "#8ec1f0", "color-brand-content": "#8ec1f0"},
}

# MathJax comes with the site, from a Python package, so that equations need no network. Of its 24 MB a page loads one
# script and a few fonts; only those are copied.
_package = importlib.util.find_spec("sphinx-mathjax-offline").submodule_search_locations[0]
_mathjax = Path(_package) / "static" / "mathjax"
mathjax_path = "mathjax/tex-chtml.js"


def level_headings(app, page, template, context, doctree):
    "The navigation's captions say that they are headings, but not of which level: screen readers need both."
    tree = context.get("furo_navigation_tree", "")
    context["furo_navigation_tree"] = tree.replace('role="heading"', 'role="heading" aria-level="2"')


def setup(app):
    app.connect("html-page-context", level_headings, priority=900)         # after the theme has made its tree
    static = Path(app.outdir) / "_static" / "mathjax"

    def copy(app, exception):
        if exception is None:
            shutil.copytree(_mathjax / "output", static / "output", dirs_exist_ok=True)
            shutil.copy(_mathjax / "tex-chtml.js", static)
    app.connect("build-finished", copy)
