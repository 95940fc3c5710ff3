"""WebKitGTK's MiniBrowser, whose engine is Safari's, over WebDriver."""

import base64
import contextlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
from browser import Driven

WEBKIT = shutil.which("WebKitWebDriver") if shutil.which("Xvfb") else None
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
WATCHING = """(() => {
    window.complaints = [];
    addEventListener("error", event => complaints.push(event.message));
    addEventListener("unhandledrejection", event => complaints.push(String(event.reason)));
    document.addEventListener("securitypolicyviolation", event =>
        complaints.push("Content Security Policy: " + event.effectiveDirective));
})()"""


class WebKit(Driven):
    """Hears of errors from when a page is loaded on."""

    _unfinished = ".wkdownload"

    def open(self, url: str, *, width: int = 1100, height: int = 900, dark: bool = False, still: bool = False) -> None:
        self._like(dark=dark, still=still)
        self._call("POST", "url", url="about:blank")
        self._call("POST", "window/rect", width=width, height=height)
        around = self.run("[outerWidth - innerWidth, outerHeight - innerHeight]")
        self._call("POST", "window/rect", width=width + around[0], height=height + around[1])
        self._call("POST", "url", url=url)
        self.run(WATCHING)

    def run(self, script: str) -> Any:
        told = "const tell = arguments[0]; (async () => { SCRIPT })()"
        told += ".then(value => tell([value ?? null]), error => tell(String(error)));"
        try:
            found = self._call("POST", "execute/async", script=told.replace("SCRIPT", f"return ({script}\n);"), args=[])
        except SyntaxError:  # several statements have no value
            found = self._call("POST", "execute/async", script=told.replace("SCRIPT", script), args=[])
        if isinstance(found, str):
            raise AssertionError(found)
        return found[0]

    def heard(self) -> list[str]:
        found: list[str] = self.run("window.complaints?.splice(0) ?? []")
        return found

    def choose_files(self, field: str, *files: Path) -> None:
        element = self._call("POST", "execute/sync", script=f"return {field};", args=[])[ELEMENT]
        self._call("POST", f"element/{element}/value", text="\n".join(map(str, files)))

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", "screenshot")))

    def _start(self) -> None:
        place = self._place()
        (place / "gtk-3.0").mkdir()
        (place / "gtk-3.0" / "settings.ini").write_text(
            f"[Settings]\ngtk-enable-animations={int(not self._liked['still'])}\n"
        )
        (place / "user-dirs.dirs").write_text(f'XDG_DOWNLOAD_DIR="{self._downloads}"\n')
        told, answer = os.pipe()
        self._run(["Xvfb", "-displayfd", str(answer), "-screen", "0", "1600x1600x24"], pass_fds=(answer,))
        os.close(answer)
        with os.fdopen(told) as number:
            display = f":{number.readline().strip()}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        theme = "Adwaita:dark" if self._liked["dark"] else "Adwaita"
        own = {"DISPLAY": display, "GTK_THEME": theme, "XDG_CONFIG_HOME": str(place), "HOME": str(place)}
        self._run([str(WEBKIT), f"--port={port}"], env={**os.environ, **own})
        self._client = self._running.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=90))
        end = time.monotonic() + 30
        while True:
            with contextlib.suppress(httpx.ConnectError):
                self._client.get("/status")
                break
            assert time.monotonic() < end, "WebKitWebDriver does not answer"
            time.sleep(0.05)
        self._session = ""
        self._session = "/" + self._call("POST", "", capabilities={"alwaysMatch": {}})["sessionId"]
        self._call("POST", "timeouts", script=60000)

    def _run(self, command: list[str], **options: Any) -> None:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
        self._running.callback(process.wait)
        self._running.callback(process.terminate)

    def _act(self, actions: list[dict[str, Any]]) -> None:
        self._call("POST", "actions", actions=actions)

    def _call(self, method: str, what: str, **given: Any) -> Any:
        path = f"/session{self._session}/{what}".rstrip("/")
        answer = self._client.request(method, path, json=given if method == "POST" else None).json()["value"]
        if isinstance(answer, dict) and "error" in answer:
            if "Unexpected token" in answer["message"]:
                raise SyntaxError(answer["message"])
            raise AssertionError(f"{what}: {answer['error']}: {answer['message']}")
        return answer
