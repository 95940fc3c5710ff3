"""A browser without a screen: opens a page, runs scripts in it, takes pictures of it."""

import base64
import json
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

KEYS = {"Tab": "\ue004", "Enter": "\ue007"}
"""As WebDriver tells of them."""


class Browser(ABC):
    """One tab."""

    def __enter__(self) -> "Browser":
        return self

    @abstractmethod
    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None: ...

    @abstractmethod
    def open(self, url: str, *, width: int = 1100, height: int = 900, dark: bool = False, still: bool = False) -> None:
        """Opens a page.

        Args:
            url: its address.
            width: of the window, in pixels.
            height: likewise.
            dark: whoever looks at it likes it dark.
            still: likewise, and nothing that moves.
        """

    @abstractmethod
    def run(self, script: str) -> Any:
        """The value of an expression in the page; promises are waited for."""

    @abstractmethod
    def heard(self) -> list[str]:
        """Errors that scripts did not catch, and what the page's policy forbade, since it was last asked."""

    def wait_for(self, condition: str, seconds: float = 30) -> None:
        """Until an expression of the page is true."""
        script = f"""new Promise((done, fail) => {{ const end = Date.now() + {seconds * 1000};
            (function look() {{ if ({condition}) done(true); else if (Date.now() > end) fail("never: " + {condition!r});
            else setTimeout(look, 50); }})(); }})"""
        self.run(script)

    @abstractmethod
    def press(self, key: str) -> None:
        """A key: "Tab" or "Enter"."""

    @abstractmethod
    def write(self, text: str) -> None:
        """Into what has the focus."""

    @abstractmethod
    def choose_files(self, field: str, *files: Path) -> None:
        """In a file input, an expression of the page."""

    def drop_files(self, place: str, *files: Path) -> None:
        """Upon an element, an expression of the page: by events that it takes for a person's."""
        given = [[file.name, base64.b64encode(file.read_bytes()).decode()] for file in files]
        self.run(f"""(() => {{
            const carried = new DataTransfer();
            for (const [name, content] of {json.dumps(given)})
                carried.items.add(new File([Uint8Array.from(atob(content), each => each.charCodeAt(0))], name));
            for (const kind of ["dragenter", "dragover", "drop"])
                {place}.dispatchEvent(new DragEvent(kind, {{dataTransfer: carried, bubbles: true, cancelable: true}}));
        }})()""")

    @abstractmethod
    def download(self, link: str, folder: Path) -> Path:
        """The file that a click on a link, an expression of the page, leaves in an empty folder."""

    @abstractmethod
    def screenshot(self, path: Path) -> None: ...


class Driven(Browser):
    """One that is driven as WebDriver does, and is told what whoever looks at it likes when it begins."""

    def __init__(self) -> None:
        self._liked = {"dark": False, "still": False}
        self._start()

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._running.close()

    def press(self, key: str) -> None:
        self._type(KEYS[key])

    def write(self, text: str) -> None:
        self._type(text)

    def download(self, link: str, folder: Path) -> Path:
        self.run(f"{link}.click()")
        found = downloaded(self._downloads, unfinished=self._unfinished)
        return Path(shutil.move(found, folder / found.name))

    def _like(self, **liked: bool) -> None:
        if liked != self._liked:
            self._running.close()
            self._liked = liked
            self._start()

    def _type(self, text: str) -> None:
        strokes = [{"type": kind, "value": letter} for letter in text for kind in ("keyDown", "keyUp")]
        self._act([{"type": "key", "id": "keyboard", "actions": strokes}])

    def _place(self) -> Path:
        """A folder of its own as long as it runs, with one for downloads."""
        self._running = ExitStack()
        folder = tempfile.TemporaryDirectory(prefix="obsdiff-browser-", ignore_cleanup_errors=True)
        place = Path(self._running.enter_context(folder))
        self._downloads = place / "downloads"
        self._downloads.mkdir()
        return place

    _unfinished: ClassVar[str]
    """How names of files end that are still coming."""

    @abstractmethod
    def _start(self) -> None:
        """Begins with a `_place`."""

    @abstractmethod
    def _act(self, actions: list[dict[str, Any]]) -> None:
        """What fingers do."""


def downloaded(folder: Path, *, unfinished: str) -> Path:
    """The file that comes into a folder, where others end in `unfinished`."""
    end = time.monotonic() + 20
    while not (found := [path for path in folder.iterdir() if path.suffix != unfinished and path.stat().st_size]):
        assert time.monotonic() < end, "nothing was downloaded"
        time.sleep(0.02)
    return found[0]
