"""The finished packages of a pruning run on disk, beside its output, until the output is whole."""

import json
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from obsdiff.results import PackageResult
from obsdiff_runtime.errors import ConfigError


class FolderJournal:
    """A folder `<output>.journal`: per package a safetensors file, then a JSON file that makes it count.

    Args:
        output: what the run is to produce.
        digest: of the recipe; packages of another recipe are refused.
        resume: read what is there; otherwise an old journal is removed.

    Raises:
        ConfigError: resuming with another recipe.
    """

    def __init__(self, output: Path, digest: str, *, resume: bool) -> None:
        self.folder = output.with_name(output.name + ".journal")
        self._digest = digest
        if not resume:
            self.remove()
        stamp = self.folder / "recipe"
        if stamp.exists() and stamp.read_text() != digest:
            raise ConfigError(f"{self.folder}: was begun with other settings; repeat them, or drop --resume")

    def read(self, package: str) -> PackageResult | None:
        try:
            record = json.loads((self.folder / f"{package}.json").read_text())
            return PackageResult.of_json(record, load_file(self.folder / f"{package}.safetensors"))
        except (FileNotFoundError, json.JSONDecodeError, SafetensorError, KeyError):
            return None

    def write(self, package: str, result: PackageResult) -> None:
        self._begin()
        tensors = {name: weight.contiguous() for name, weight in result.weights.items()}
        try:
            save_file(tensors, self.folder / f"{package}.safetensors")
            self._put(f"{package}.json", json.dumps(result.to_json()))
        except BaseException:
            (self.folder / f"{package}.safetensors").unlink(missing_ok=True)
            if not any(self.folder.glob("*.json")):
                self.remove()
            raise

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _begin(self) -> None:
        """Makes the folder with the first package: a run that failed before leaves nothing behind."""
        if not (self.folder / "recipe").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._put("recipe", self._digest)

    def _put(self, name: str, text: str) -> None:
        partial = self.folder / f"{name}.partial"
        partial.write_text(text)
        partial.replace(self.folder / name)
