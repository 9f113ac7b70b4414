// Another CPython, without installing one: Pyodide's build compiles every module, script, test and notebook cell with
// warnings as errors, and makes README.md again. Nothing that needs torch runs.
//   npm install --prefix DIR pyodide@VERSION && node tests/pyodide.mjs DIR
// 0.22.1 is Python 3.10.2, 0.26.4 is 3.12.1, 0.28.3 is 3.13.2.
import { createRequire } from "module";
import { dirname, resolve } from "path";
import { fileURLToPath } from "url";

const folder = resolve(process.argv[2] ?? ".", "node_modules/pyodide") + "/";
const { loadPyodide } = createRequire(import.meta.url)(folder + "pyodide.js");
const python = await loadPyodide({ indexURL: folder });
python.FS.mkdir("/repo");
const root = dirname(dirname(fileURLToPath(import.meta.url)));
python.FS.mount(python.FS.filesystems.NODEFS, { root }, "/repo");
const bad = python.runPython(`
import json, sys, warnings
from pathlib import Path

warnings.simplefilter("error")
sys.dont_write_bytecode = True
sources = {}
for file in (p for part in ("robust_jem", "docs", "tests") for p in Path("/repo", part).rglob("*.py")):
    sources[str(file)] = [file.read_text("utf-8")]
for file in Path("/repo/nbs").rglob("*.ipynb"):
    cells = json.loads(file.read_text("utf-8"))["cells"]
    sources[str(file)] = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
bad = []
for file, texts in sources.items():
    for text in texts:
        try:
            compile(text, file, "exec")
        except Exception as e:
            bad.append(f"{file}: {e!r}")
sys.path.insert(0, "/repo/docs")
from readme import readme
if readme(Path("/repo")) != Path("/repo/README.md").read_text("utf-8"):
    bad.append("README.md is made otherwise")
print(sys.version.split()[0], len(sources), "files,", sum(map(len, sources.values())), "texts")
"\\n".join(bad)
`);
console.log(bad || "all compile, README.md is the same");
process.exit(bad ? 1 : 0);
