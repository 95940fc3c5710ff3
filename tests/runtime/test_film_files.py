"""Films as files, read by Pillow and numpy."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.films import check, write

FRAMES = 9


def film() -> np.ndarray:
    """Each frame one brightness, and none like the one before."""
    return np.repeat(np.linspace(0, 240, FRAMES), 24 * 32 * 3).reshape(FRAMES, 24, 32, 3).astype(np.uint8)


def frames(path: Path) -> tuple[np.ndarray, list[float]]:
    """(frames, height, width, 3), and how long each is shown, in ms."""
    shown, durations = [], []
    with Image.open(path) as image:
        for index in range(image.n_frames):  # type: ignore[attr-defined]
            image.seek(index)
            image.load()
            shown.append(np.asarray(image.convert("RGB")))
            durations.append(image.info["duration"])
    return np.stack(shown), durations


@pytest.mark.parametrize(
    ("name", "error", "unit"), [("a.webp", 4, 1), ("a.gif", 0, 10), ("a.png", 0, 1), ("a.APNG", 0, 1)]
)
def test_a_film_moves_at_its_pace(name: str, error: int, unit: int, tmp_path: Path) -> None:
    """16 frames a second are 62.5 ms each, which no format can say; nine of them are within one unit of 562.5 ms."""
    path = tmp_path / name
    write(film(), path)
    shown, durations = frames(path)
    assert np.abs(shown.astype(int) - film()).max() <= error
    assert abs(sum(durations) - 1000 * FRAMES / 16) <= unit
    assert all(abs(duration - 62.5) <= unit for duration in durations)


def test_a_film_is_an_array_or_a_folder_of_frames(tmp_path: Path) -> None:
    for name in ("film.npy", "frames"):
        write(film(), tmp_path / name)
    np.testing.assert_array_equal(np.load(tmp_path / "film.npy"), film())
    files = sorted((tmp_path / "frames").iterdir())
    assert [file.name for file in files[:2]] == ["0000.png", "0001.png"]
    np.testing.assert_array_equal(np.stack([np.asarray(Image.open(file)) for file in files]), film())


@pytest.mark.parametrize(
    ("name", "fps", "message"),
    [
        ("a.mp4", 16, r"a\.mp4: no film has such a file; use \.webp, \.gif, \.png, \.apng, \.npy, or a folder"),
        ("", 16, "is there already"),
        ("a.webp", 0.5, "--fps 0.5: should be between 1 and 50"),
        ("a.webp", 60, "--fps 60: should be between 1 and 50"),
    ],
)
def test_what_cannot_be_written_is_said_before_it_is_drawn(name: str, fps: float, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "taken"
    folder.mkdir()
    with pytest.raises(ConfigError, match=message):
        check(folder / name, fps)
