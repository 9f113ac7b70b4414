"""Packaging, from settings.ini. A wheel also holds the papermill notebooks, as `robust_jem/replication/*.ipynb`:
`robust-jem replicate` runs them wherever the package is installed."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(ROOT / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
status = {"3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}[cfg["status"]]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"] + "/"},
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    classifiers=[
        f"Development Status :: {status}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require={extra: cfg[f"{extra}_requirements"].split() for extra in ("dev", "docs", "cluster", "hub")},
    packages=[*find_packages(include=["robust_jem", "robust_jem.*"]), "robust_jem.replication"],
    package_dir={"robust_jem.replication": "nbs/replication"},
    package_data={"robust_jem.replication": ["*.ipynb"]},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": ["robust_jem=robust_jem._modidx:d"]},
    zip_safe=False,
)
