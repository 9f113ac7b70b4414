"""Count what can be counted of readability: `python docs/counts.py`, or `make counts`.

Over the exported code (robust_jem/**/*.py but its index), cell marks and blank lines aside. Branch complexity is ruff's
C901, as in pyproject.toml. tests/test_project.py holds the limits, by the functions below."""
import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "robust_jem"
ROOMS = "app report bench judge engine systems ebm networks core".split()     # a room imports from the rooms after it
WIDTHS = (120, 160, 200)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@dataclass(frozen=True)
class Module:
    "One exported file."
    path: Path

    @cached_property
    def name(self) -> str:
        "`room.module`."
        return ".".join(self.path.relative_to(PACKAGE).with_suffix("").parts)

    @property
    def room(self) -> str:
        return self.name.split(".")[0]

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(ast.parse(self.text)))

    @property
    def lines(self) -> list[str]:
        "Lines of code and comments; nbdev's list of exports isn't one."
        text = re.sub(r"^# %% auto #0\n.*?(?=^# %%|\Z)", "", self.text, flags=re.M | re.S)
        return [line for line in text.splitlines() if line.strip() and not re.match(r"# %%|#\|", line)]

    @property
    def cells(self) -> dict[str, int]:
        "Lines of each exported cell, but for blank ones, by the first class or function in it."
        found = {}
        for cell in re.split(r"^# %% .*\n", self.text, flags=re.M)[1:]:
            lines = [line for line in cell.splitlines() if line.strip() and not line.startswith("#|")]
            named = re.search(r"^(?:class|def) (\w+)", cell, re.M)
            found[f"{self.name}.{named[1] if named else lines[0][:40] if lines else ''}"] = len(lines)
        return found

    @property
    def imported_names(self) -> list[tuple[str, str]]:
        "Every import from the package, inside functions too: the full name, and the name it gets here."
        here, found = ["robust_jem", *self.name.split(".")[:-1]], []
        for node in self.nodes:
            base = ""
            if isinstance(node, ast.ImportFrom):              # from ..core.images import x · from . import runs
                outer = here[:len(here) - node.level + 1] if node.level else []
                base = ".".join([*outer, *filter(None, [node.module])]) + "."
            elif not isinstance(node, ast.Import):
                continue
            found += [(base + alias.name, alias.asname or alias.name) for alias in node.names]
        return [(full, name) for full, name in found if full.startswith("robust_jem.")]

    @property
    def imports(self) -> set[str]:
        "What this module imports of the package: `room.module`, or the room alone where it names no module."
        known, used = set(MODULES), set()
        for full, _ in self.imported_names:
            module = ".".join(full.split(".")[1:3])
            used.add(module if module in known else module.split(".")[0])
        return used - {self.name}

    @property
    def upward_imports(self) -> list[str]:
        below = {*ROOMS[ROOMS.index(self.room):], "__version__"}
        return sorted(used for used in self.imports if used.split(".")[0] not in below)

    @property
    def private_imports(self) -> list[str]:
        "Private names of other modules that this one imports, or reaches into an imported module for."
        direct = [full for full, _ in self.imported_names if is_private(full.rpartition(".")[2])]
        modules = {name for full, name in self.imported_names if full.removeprefix("robust_jem.") in MODULES}
        reached = [f"{node.value.id}.{node.attr}" for node in self.nodes if isinstance(node, ast.Attribute)
                   and is_private(node.attr) and isinstance(node.value, ast.Name) and node.value.id in modules]
        return sorted({*direct, *reached})

    @property
    def semicolon_lines(self) -> int:
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        return len({token.start[0] for token in tokens if token.type == tokenize.OP and token.string == ";"})

    @property
    def walruses(self) -> int:
        return sum(isinstance(node, ast.NamedExpr) for node in self.nodes)

    @property
    def lambda_assignments(self) -> int:
        assigned = [node.value for node in self.nodes if isinstance(node, (ast.Assign, ast.AnnAssign))]
        return sum(isinstance(value, ast.Lambda) for value in assigned)


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
MODULES = {module.name: module for module in map(Module, FILES)}


def ruff(*arguments: str) -> list[dict]:
    "What ruff finds; nbdev's list of exports may be wide."
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "json", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode > 1:
        raise RuntimeError(done.stderr)
    return [found for found in json.loads(done.stdout) if found["code"] != "E501" or not is_list_of_exports(found)]


def is_list_of_exports(found: dict) -> bool:
    lines = Path(found["filename"]).read_text(encoding="utf-8").splitlines()
    return lines[found["location"]["row"] - 1].startswith("__all__ = ")


def complexities() -> list[tuple[int, str]]:
    "Branch complexity of each function, the worst first: `(12, 'engine.train.train')`."
    every_function = ["--isolated", "--select", "C901", "--config", "lint.mccabe.max-complexity=0"]
    found = []
    for finding in ruff(*every_function, *map(str, FILES)):
        name, complexity = re.match(r"`(\w+)` is too complex \((\d+)", finding["message"]).groups()
        found.append((int(complexity), f"{Module(Path(finding['filename'])).name}.{name}"))
    return sorted(found, reverse=True)


def counts() -> dict[str, str]:
    "What is counted, and how many there are."
    modules = MODULES.values()
    widths = [len(line) for module in modules for line in module.lines]
    complexity, function = complexities()[0]
    fan_out, widest = max((len(module.imports), module.name) for module in modules)
    cell, first = max((n, name) for module in modules for name, n in module.cells.items())
    upward = [f"{module.name} → {used}" for module in modules for used in module.upward_imports]
    private = [f"{module.name}: {name}" for module in modules for name in module.private_imports]
    return {
        "modules": str(len(modules)),
        "lines": f"{len(widths):,}",
        "mean width": f"{sum(widths) / len(widths):.1f} columns, longest {max(widths)}",
        **{f"lines over {limit} columns": str(sum(w > limit for w in widths)) for limit in WIDTHS},
        "longest cell": f"{cell} lines ({first})",
        "worst branch complexity": f"{complexity} ({function})",
        "lines with `;`": str(sum(module.semicolon_lines for module in modules)),
        "walruses": str(sum(module.walruses for module in modules)),
        "lambda assignments": str(sum(module.lambda_assignments for module in modules)),
        "upward imports": listed(upward),
        "worst fan-out": f"{fan_out} modules ({widest})",
        "private names imported": listed(private),
    }


def listed(found: list[str]) -> str:
    return f"{len(found)}" + (f" ({', '.join(found)})" if found else "")


if __name__ == "__main__":
    for what, count in counts().items():
        print(f"{what:<26}{count}")
