"""The finished packages of a pruning run on disk, beside its output, until the output is whole."""

import dataclasses
import json
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from obsdiff.pruning import LayerResult, PackageResult
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
        if not resume:
            self.remove()
        self.folder.mkdir(parents=True, exist_ok=True)
        stamp = self.folder / "recipe"
        if stamp.exists() and stamp.read_text() != digest:
            raise ConfigError(f"{self.folder}: was begun with other settings; repeat them, or drop --resume")
        stamp.write_text(digest)

    def read(self, package: str) -> PackageResult | None:
        try:
            record = json.loads((self.folder / f"{package}.json").read_text())
            weights = load_file(self.folder / f"{package}.safetensors")
        except (FileNotFoundError, json.JSONDecodeError, SafetensorError):
            return None
        return PackageResult(
            weights=weights,
            kept={name: tuple(units) for name, units in record["kept"].items()},
            layers=tuple(LayerResult(**layer) for layer in record["layers"]),
        )

    def write(self, package: str, result: PackageResult) -> None:
        tensors = {name: weight.contiguous() for name, weight in result.weights.items()}
        save_file(tensors, self.folder / f"{package}.safetensors")
        record = {"kept": result.kept, "layers": [dataclasses.asdict(layer) for layer in result.layers]}
        partial = self.folder / f"{package}.json.partial"
        partial.write_text(json.dumps(record))
        partial.replace(self.folder / f"{package}.json")

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
