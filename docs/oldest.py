"""Print settings.ini's lower bounds as pip's constraints, to install the oldest versions that it admits:

    python docs/oldest.py > constraints.txt
    PIP_CONSTRAINT=constraints.txt make test PYTHON=python3.10

Needs nothing installed."""
from configparser import ConfigParser
from pathlib import Path


def bounds(settings: Path) -> list[str]:
    "`name==bound` for each `name>=bound` in the lists of requirements; upper bounds and pins stay with pip."
    ini = ConfigParser(delimiters=["="])
    ini.read(settings, encoding="utf-8")
    groups = [value for key, value in ini["DEFAULT"].items() if key.endswith("requirements")]
    requirements = {requirement for group in groups for requirement in group.split()}
    return sorted(requirement.replace(">=", "==") for requirement in requirements if ">=" in requirement)


if __name__ == "__main__":
    print("\n".join(bounds(Path(__file__).parent.parent / "settings.ini")))
