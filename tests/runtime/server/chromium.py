"""Chromium, over its debugging pipe."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from browser import Browser, downloaded

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--remote-debugging-pipe"),
)

KEYS = {"Tab": (9, ""), "Enter": (13, "\r")}
"""The number that Windows has for a key, and what it writes."""


class Chromium(Browser):
    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="obsdiff-browser-", ignore_cleanup_errors=True)
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()

        def connect() -> None:  # Chromium reads commands from 3 and writes answers to 4
            os.dup2(os.dup(commands), 3)
            os.dup2(os.dup(answers), 4)

        self._process = subprocess.Popen(
            [str(CHROMIUM), *FLAGS, f"--user-data-dir={self._folder.name}"],
            preexec_fn=connect,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._rest, self._number, self._session = b"", 0, ""
        self._complaints: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._call("Runtime.enable")
        self._call("Log.enable")

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            os.close(self._commands)
        self._process.kill()
        self._process.wait()
        os.close(self._answers)
        self._folder.cleanup()

    def open(self, url: str, *, width: int = 1100, height: int = 900, dark: bool = False, still: bool = False) -> None:
        media = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "reduce" if still else "",
        }
        self._call("Emulation.setEmulatedMedia", features=[{"name": name, "value": media[name]} for name in media])
        shape = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self._call("Emulation.setDeviceMetricsOverride", **shape)
        self._call("Page.navigate", url="about:blank")
        self._call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        found = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise AssertionError(found["exceptionDetails"])
        return found["result"].get("value")

    def heard(self) -> list[str]:
        self.run("0")  # hears what there was until then
        found, self._complaints = self._complaints, []
        return found

    def press(self, key: str) -> None:
        code, text = KEYS[key]
        told = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self._call("Input.dispatchKeyEvent", type="keyDown", text=text, **told)
        self._call("Input.dispatchKeyEvent", type="keyUp", **told)

    def write(self, text: str) -> None:
        self._call("Input.insertText", text=text)

    def choose_files(self, field: str, *files: Path) -> None:
        found = self._call("Runtime.evaluate", expression=field)["result"]["objectId"]
        self._call("DOM.setFileInputFiles", objectId=found, files=[str(file) for file in files])

    def drop_files(self, place: str, *files: Path) -> None:
        box = self.run(f"{place}.getBoundingClientRect().toJSON()")
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            middle = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
            self._call("Input.dispatchDragEvent", type=kind, data=data, **middle)

    def download(self, link: str, folder: Path) -> Path:
        self._call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        self.run(f"{link}.click()")
        return downloaded(folder, unfinished=".crdownload")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def _call(self, method: str, **params: Any) -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._next())
            self._hear(answer.get("method"), answer.get("params", {}))
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                return answer["result"]

    def _hear(self, event: str | None, told: Any) -> None:
        if event == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self._complaints.append(details.get("exception", {}).get("description", details["text"]))
        if event == "Log.entryAdded" and told["entry"]["source"] in ("javascript", "security"):
            self._complaints.append(told["entry"]["text"])

    def _next(self) -> bytes:
        while b"\0" not in self._rest:
            more = os.read(self._answers, 1 << 16)
            if not more:
                raise AssertionError("Chromium ended")
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return message
