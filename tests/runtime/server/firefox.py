"""Firefox, over WebDriver BiDi."""

import base64
import itertools
import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from browser import Driven
from websockets.sync.client import connect

FIREFOX = shutil.which("firefox-esr") or shutil.which("firefox")
LONGEST = 1 << 26  # bytes of a message


class Firefox(Driven):
    _unfinished = ".part"

    def open(self, url: str, *, width: int = 1100, height: int = 900, dark: bool = False, still: bool = False) -> None:
        self._like(dark=dark, still=still)
        self._call("browsingContext.setViewport", viewport={"width": width, "height": height}, devicePixelRatio=1)
        for address in ("about:blank", url):
            self._call("browsingContext.navigate", url=address, wait="complete")

    def run(self, script: str) -> Any:
        return _plain(self._evaluate(script))

    def heard(self) -> list[str]:
        self.run("0")  # hears what there was until then
        found, self._complaints = self._complaints, []
        return found

    def choose_files(self, field: str, *files: Path) -> None:
        element = {"sharedId": self._evaluate(field)["sharedId"]}
        self._call("input.setFiles", element=element, files=[str(file) for file in files])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("browsingContext.captureScreenshot", origin="document")["data"]))

    def _start(self) -> None:
        profile = self._place() / "profile"
        profile.mkdir()
        self._complaints: list[str] = []
        settings = {
            "browser.download.dir": str(self._downloads),
            "browser.download.folderList": 2,
            "layout.css.prefers-color-scheme.content-override": 0 if self._liked["dark"] else 1,
            "ui.prefersReducedMotion": int(self._liked["still"]),
        }
        lines = (f"user_pref({json.dumps(name)}, {json.dumps(value)});\n" for name, value in settings.items())
        (profile / "user.js").write_text("".join(lines))
        log = profile / "said"
        with log.open("w") as said:
            command = [str(FIREFOX), "--headless", "--remote-debugging-port=0", "--profile", str(profile)]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        self._running.callback(process.wait)
        self._running.callback(process.kill)
        end = time.monotonic() + 60
        while not (found := re.search(r"BiDi listening on (ws://\S+)", log.read_text())):
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        self._socket = self._running.enter_context(connect(f"{found[1]}/session", max_size=LONGEST, proxy=None))
        self._numbers, self._context = itertools.count(), ""
        self._call("session.new", capabilities={})
        self._call("session.subscribe", events=["log.entryAdded"])
        # unlike the first, another tab has the focus
        self._context = self._call("browsingContext.create", type="tab")["context"]

    def _act(self, actions: list[dict[str, Any]]) -> None:
        self._call("input.performActions", actions=actions)

    def _evaluate(self, script: str) -> Any:
        """The value as BiDi tells it."""
        target = {"context": self._context}
        found = self._call("script.evaluate", expression=script, target=target, awaitPromise=True)
        if found["type"] == "exception":
            raise AssertionError(found["exceptionDetails"]["text"])
        return found["result"]

    def _call(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        if method.startswith(("browsingContext.", "input.")) and self._context:
            params["context"] = self._context
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("method") == "log.entryAdded":
                entry = answer["params"]
                if entry["type"] == "javascript" and entry["level"] in ("error", "warn"):
                    self._complaints.append(entry["text"])
            elif answer.get("id") == number:
                if answer["type"] == "error":
                    raise AssertionError(f"{method}: {answer['error']}: {answer['message']}")
                return answer["result"]


def _plain(value: Any) -> Any:
    """What BiDi tells of a value, as Python has it."""
    match value["type"]:
        case "array":
            return [_plain(each) for each in value["value"]]
        case "object":
            return {name: _plain(each) for name, each in value["value"]}
        case _:
            return value.get("value")
