"""Drive an installed Chromium without a window, for tests of the site and for screenshots; needs `websocket-client`.

Chromium speaks its DevTools protocol over a WebSocket: that is all that opening a page, pressing a key, asking for a
value and taking a picture need, so no driver program has to be downloaded."""
import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9, "Home": 36, "End": 35, "Enter": 13}


def find() -> str | None:
    "The browser: $CHROMIUM, or the first of the usual names on the path."
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One browser with one page: `with Browser() as b: b.open(url)`. What the page did is in `requests` and `errors`.

    Raises `RuntimeError` where there is no browser, it doesn't start, or a page's script fails.
    """

    def __init__(self, width: int = 1280, height: int = 900, seconds: float = 60):
        self.program, self.seconds = find(), seconds
        if self.program is None:
            raise RuntimeError(f"no Chromium: none of {', '.join(NAMES)} is on the path, and CHROMIUM isn't set")
        self.size, self.media, self.number = (width, height), {}, 0
        self.requests, self.errors, self.events = [], [], []

    def __enter__(self):
        import websocket                                    # only who drives a browser needs it

        self.profile = tempfile.mkdtemp(prefix="chromium-")
        options = ["--headless=new", "--remote-debugging-port=0", "--no-first-run", "--hide-scrollbars",
                   "--disable-gpu", "--disable-background-networking", "--disable-component-update",
                   "--remote-allow-origins=*", f"--user-data-dir={self.profile}"]
        options += ["--no-sandbox"] if os.geteuid() == 0 else []     # Chromium refuses to sandbox root's pages
        self.process = subprocess.Popen([self.program, *options, "about:blank"], stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            port, path = self._port()
            self.socket = websocket.create_connection(f"ws://127.0.0.1:{port}{path}", timeout=self.seconds)
            self.session = None
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
            self.resize(*self.size)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        if getattr(self, "socket", None):
            self.socket.close()
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        shutil.rmtree(self.profile, ignore_errors=True)

    def _port(self) -> tuple[str, str]:
        "Where it listens: it writes that into its profile."
        written = Path(self.profile) / "DevToolsActivePort"
        until = time.monotonic() + self.seconds
        while time.monotonic() < until and self.process.poll() is None:
            if written.exists() and len(lines := written.read_text().splitlines()) == 2:
                return lines[0], lines[1]
            time.sleep(0.05)
        raise RuntimeError(f"{self.program} didn't start (exit status {self.process.poll()})")

    def call(self, method: str, **parameters) -> dict:
        "One command of the protocol; events that come before its answer are kept."
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.socket.send(json.dumps(message))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self._keep(answer)

    def _keep(self, event: dict):
        name, about = event.get("method"), event.get("params", {})
        self.events.append(name)
        if name == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif name == "Network.loadingFailed" and not about.get("canceled"):
            self.errors.append(f"not loaded: {about['errorText']}")
        elif name == "Runtime.exceptionThrown":
            details = about["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif name == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(a.get("value", a.get("description"))) for a in about["args"]))
        elif name == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.errors.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")

    def open(self, url: str | Path):
        "Load a page, and wait until it and its pictures are there; `requests` and `errors` start anew."
        url = url.resolve().as_uri() if isinstance(url, Path) else url
        self.requests, self.errors, self.events = [], [], []
        self.call("Page.navigate", url=url)
        until = time.monotonic() + self.seconds
        while "Page.loadEventFired" not in self.events and not self.errors:
            if time.monotonic() > until:
                raise RuntimeError(f"{url}: not loaded after {self.seconds:g} seconds")
            self._keep(json.loads(self.socket.recv()))
        self.js("new Promise(done => requestAnimationFrame(() => setTimeout(done, 0)))")

    def js(self, expression: str):
        "The value of a JavaScript expression in the page; a promise is awaited."
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return answer["result"].get("value")

    def press(self, key: str):
        "A key goes down and up, where the focus is."
        code = KEYS[key] if key in KEYS else ord(key.upper())
        text = {"text": key} if key not in KEYS else {"text": "\r"} if key == "Enter" else {}
        about = dict(key=key, code=key, windowsVirtualKeyCode=code)
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)
        self.js("new Promise(done => requestAnimationFrame(() => setTimeout(done, 0)))")

    def resize(self, width: int, height: int):
        "The window, in CSS pixels; below 600 it is a phone's."
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)

    def prefer(self, **media: str):
        "What the reader prefers, `prefer(color_scheme='dark', reduced_motion='reduce')`; it adds to earlier calls."
        self.media |= {f"prefers-{name.replace('_', '-')}": value for name, value in media.items()}
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": name, "value": value} for name, value in self.media.items()])

    def picture(self, path: Path | None = None, whole: bool = False) -> bytes:
        "A PNG of the window, or of the `whole` page; written to `path` where one is given."
        more = {}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            more = dict(captureBeyondViewport=True,
                        clip=dict(x=0, y=0, width=size["width"], height=size["height"], scale=1))
        content = base64.b64decode(self.call("Page.captureScreenshot", format="png", **more)["data"])
        if path is not None:
            path.write_bytes(content)
        return content
