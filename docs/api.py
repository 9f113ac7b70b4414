"""How a function or class is documented on the site: call, docstring, a table of its arguments, its source.

nbdev puts a `show_doc` cell where a notebook exports a name; build.py replaces each by `document(module, name)`. The
table comes from the comment beside each argument; the source is folded, so that a page reads without leaving it."""
import dataclasses
import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Annotated, get_args, get_origin

from fastcore.docments import docments

EMPTY = inspect.Parameter.empty


def target(module: str, name: str) -> str:
    "The label of a name's section; a module is `room.module`."
    return "api-" + re.sub(r"\W|_", "-", f"{module}-{name}").lower()


def _type(annotation) -> str:
    if annotation is EMPTY or annotation is None:
        return ""
    if get_origin(annotation) is Annotated:                      # a setting's type, and its range as the help has it
        kind, *notes = get_args(annotation)
        ranges = [re.search(r"≥?-?\d.*", getattr(note, "metavar", None) or "") for note in notes]
        return " ".join([_type(kind), *(found[0].rstrip("]} ") for found in ranges if found)])
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", text)               # torch.Tensor → Tensor


class _Default:
    "A default value, printed as in the source."

    def __init__(self, value):
        self.value = value

    def __repr__(self) -> str:
        if isinstance(self.value, Path):
            return repr(str(self.value))
        return getattr(self.value, "__name__", None) or re.sub(r" at 0x[0-9a-f]+", "", repr(self.value))


def _text(text: str) -> str:
    "Prose from a comment or docstring, where `<name>` is a placeholder and not HTML; inline code stays as it is."
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(parts))


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _table(*rows: tuple[str, ...]) -> str:
    "A Markdown table, the first row its head; columns that are empty below the head are left out."
    if len(rows) < 2:
        return ""
    keep = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    lines = ["| " + " | ".join(row[i].replace("|", r"\|").replace("\n", " ") for i in keep) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(keep), *lines[1:]])


def _signature(sym) -> inspect.Signature | None:
    try:
        return inspect.signature(sym)
    except (TypeError, ValueError):
        return None


def _call(sym, name: str, width: int = 88) -> str:
    "`name(a, b=1)`, wrapped where it is long; types are in the table, and so is the rest of a very long one."
    signature = _signature(sym)
    if signature is None:
        return name
    words, kinds = [], set()
    for p in signature.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not kinds & {p.KEYWORD_ONLY, p.VAR_POSITIONAL}:
            words.append("*")                     # what follows needs its name
        kinds.add(p.kind)
        default = EMPTY if p.default is EMPTY else _Default(p.default)
        words.append(str(p.replace(annotation=EMPTY, default=default)))
    if len(words) > 16:
        words = words[:3] + ["..."]
    lines, indent = [name + "("], " " * (len(name) + 1)
    for i, word in enumerate(words):
        word += ")" if i == len(words) - 1 else ", "
        if len(lines[-1] + word) > width:
            lines.append(indent)
        lines[-1] += word
    return "\n".join(line.rstrip() for line in lines) + ("" if words else ")")


def _comments(sym) -> dict | None:
    "What stands beside each argument or field; a class has those of the classes that it extends as well."
    classes = [c for c in reversed(sym.__mro__) if dataclasses.is_dataclass(c)] if dataclasses.is_dataclass(sym) else []
    try:
        comments = docments(sym, full=True)
        for c in classes:
            for name, about in docments(c, full=True).items():
                if about.get("docment") and not (comments.get(name) or {}).get("docment"):
                    comments[name] = about
    except Exception:                             # builtins and the like have no source to read comments from
        return None
    return comments


def _arguments(sym) -> str:
    "A table of arguments, or of a dataclass's fields."
    comments = _comments(sym)
    if comments is None:
        return ""
    signature, rows = _signature(sym), []
    for name, p in (signature.parameters if signature else {}).items():
        if name == "self":
            continue
        kind = _type(p.annotation) + ("" if p.default is EMPTY else f" = {_Default(p.default)}")
        named = f"`` {name} ``"                   # so written, it doesn't become a link to a function of this name
        rows.append((named, _code(kind), _text((comments.get(name) or {}).get("docment") or "")))
    returned = comments.get("return") or {}
    kind, meaning = _type(returned.get("anno")), returned.get("docment") or ""
    if not inspect.isclass(sym) and (kind or meaning):
        rows.append(("**returns**", _code(kind), _text(meaning)))
    return _table(("argument", "type and default", "meaning"), *rows)


def _methods(sym) -> str:
    "A table of a class's own public methods and properties."
    rows = []
    for name, method in vars(sym).items():
        function = method.__func__ if isinstance(method, (classmethod, staticmethod)) else method
        if name.startswith("_") and name not in ("__call__", "__iter__", "__len__"):
            continue
        if isinstance(function, property):
            call = name
        elif inspect.isfunction(function):
            call = re.sub(r"\((self|cls)(, )?", "(", _call(function, name, width=10**6))
        else:
            continue
        rows.append((_code(call), _text((inspect.getdoc(function) or "").split("\n\n")[0])))
    return _table(("method", "meaning"), *rows)


def resolve(module: str, name: str):
    "The object itself, from the package."
    sym = import_module(f"robust_jem.{module}")
    for part in name.split("."):
        sym = getattr(sym, part)
    return sym


def line_number(module: str, name: str) -> int:
    "Where in its module a name is defined."
    return inspect.getsourcelines(resolve(module, name))[1]


def _docstring(sym) -> str:
    "A dataclass without a docstring gets its signature for one: nothing to repeat."
    automatic = dataclasses.is_dataclass(sym) and (sym.__doc__ or "").startswith(sym.__name__ + "(")
    return "" if automatic else _text(inspect.getdoc(sym) or "")


def _source(sym) -> str:
    try:
        source = inspect.getsource(sym).rstrip()
    except (OSError, TypeError):
        return ""
    return f"<details><summary>Source</summary>\n\n```python\n{source}\n```\n\n</details>"


def _first_sentence(text: str) -> str:
    "Of a docstring: what a table has room for."
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s+(?=[A-Z`\"(])", paragraph)[0]


def contents(module: str, names: list[str]) -> str:
    "A module's functions and classes as a table at the top of its page: each name leads to its section."
    rows = [(f"[`{name}`](#{target(module, name)})", _text(_first_sentence(_docstring(resolve(module, name)))))
            for name in names]
    return "{.names}\n" + _table(("name", "what it is for"), *rows)


def document(module: str, name: str, level: int = 3) -> str:
    "The Markdown section that documents an exported name; `<a id>` keeps the addresses that nbdev gives out."
    sym = resolve(module, name)
    parts = [
        f"({target(module, name)})=",
        f"{'#' * level} {name}",
        f'<a id="{name.lower()}"></a>',
        f"```python\n{_call(sym, name)}\n```",
        _docstring(sym),
        _arguments(sym),
        _methods(sym) if inspect.isclass(sym) else "",
        _source(sym),
    ]
    return "\n\n".join(filter(None, parts))
