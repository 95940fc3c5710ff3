"""The table of docs/families.md, filled in by the tests themselves: family by stage.

A test that shows a stage for a family is marked `stage("runtime")`, or `stage("structured", refused=True)` where it
shows that the stage is refused; the family is its parameter `kind` or `pair`, or named: `stage("saved", kind="sd3")`.
A run of the whole suite fails where the page says something else; `pytest --write-families` writes it.
"""

import difflib
from pathlib import Path
from typing import Final

import pytest

PAGE: Final = Path(__file__).parent.parent / "docs" / "families.md"
BEGIN: Final = "<!-- written by the tests: pytest --write-families -->\n"

FAMILIES: Final = {
    "sd15": "`unet`: SD 1.5, SD 2.1",
    "sdxl": "`unet`: SDXL",
    "controlnet": "`unet`: SD 1.5, SDXL, with a ControlNet",
    "inpaint": "`unet`: SD 1.5, SDXL for inpainting",
    "sd3": "`sd3`: SD3, SD3.5",
    "flux": "`flux`: FLUX.1",
    "kontext": "`flux`: FLUX.1 Kontext",
    "fill": "`flux`: FLUX.1 Fill",
    "chroma": "`chroma`: Chroma",
    "flux2": "`flux2`: FLUX.2-klein, FLUX.2-dev",
    "pixart": "`pixart`: PixArt-alpha, PixArt-sigma",
    "auraflow": "`auraflow`: AuraFlow",
    "sana": "`sana`: Sana",
    "sana_sprint": "`sana`: Sana-Sprint",
    "qwen": "`qwen`: Qwen-Image",
    "qwen_edit": "`qwen`: Qwen-Image-Edit",
    "lumina2": "`lumina2`: Lumina-2",
    "zimage": "`zimage`: Z-Image, Z-Image-Turbo",
    "hunyuan": "`hunyuan`: HunyuanDiT",
    "dit": "`dit`: DiT, class-conditional",
    "wan": "`wan`: Wan 2.1, text to film",
    "wan22": "`wan`: Wan 2.2 A14B, text to film",
    "wan_ti2v": "`wan`: Wan 2.2 TI2V 5B, text or picture to film",
    "wan_i2v": "`wan`: Wan 2.1 I2V, picture to film",
    "wan_flf2v": "`wan`: Wan 2.1 FLF2V, two pictures to film",
    "wan22_i2v": "`wan`: Wan 2.2 I2V A14B, picture to film",
    "ltx": "`ltx`: LTX-Video, text or picture to film",
    "cogview3": "no family: CogView3-Plus",
    "cogvideox": "no family: CogVideoX, text to film",
    "mochi": "no family: Mochi 1, text to film",
}
STAGES: Final = {
    "weights": "2:4, unstructured",
    "structured": "structured",
    "saved": "saved and loaded",
    "engine": "TensorRT-RTX engine",
    "runtime": "ONNX, runtime",
}
ALIASES: Final = {
    "sd": "sd15",
    "lcm": "sd15",
    "controlnet_xl": "controlnet",
    "inpaint_xl": "inpaint",
    "flux2_dev": "flux2",
    "sd3_t5": "sd3",
    "pixart_alpha": "pixart",
    "pixart_sigma": "pixart",
}
CELL: Final = "cell of docs/families.md"

Cells = dict[tuple[str, str], str]


class SupportMatrix:
    """Collects outcomes where the reports of all workers arrive."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._cells: Cells = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == CELL:
                kind, stage, answer = value
                if report.failed:
                    self._cells[kind, stage] = "failed"
                elif report.when == "call" and report.passed:
                    self._cells.setdefault((kind, stage), answer)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._config.getoption("--write-families"):
            PAGE.write_text(page(self._cells), encoding="utf-8")
        elif self._whole() and PAGE.read_text(encoding="utf-8") != page(self._cells):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._whole() and PAGE.read_text(encoding="utf-8") != page(self._cells):
            terminalreporter.write_line(
                f"{PAGE.name} is not what the tests show; pytest --write-families writes it", red=True
            )
            own = PAGE.read_text(encoding="utf-8").splitlines()
            for line in difflib.unified_diff(own, page(self._cells).splitlines(), "page", "tests", lineterm="", n=0):
                terminalreporter.write_line(line)

    def _whole(self) -> bool:
        """Whether every row and column that the page has a yes for could have been filled."""
        return {stage for _, stage in self._cells} == STAGES.keys() and not self._config.getoption("-k")


def cells(item: pytest.Item) -> list[tuple[str, str, str]]:
    """Kind, stage and answer for each stage that a test is marked with."""
    marker = item.get_closest_marker("stage")
    if marker is None:
        return []
    parameters = getattr(item, "callspec", None)
    given = {} if parameters is None else parameters.params
    kind = str(marker.kwargs.get("kind") or given.get("kind") or given["pair"])
    answer = "refused" if marker.kwargs.get("refused") else "yes"
    return [(ALIASES.get(kind, kind), str(stage), answer) for stage in marker.args]


def page(cells: Cells) -> str:
    head = PAGE.read_text(encoding="utf-8").split(BEGIN)[0] if PAGE.is_file() else ""
    lines = ["| family | " + " | ".join(STAGES.values()) + " |", "|---" * (len(STAGES) + 1) + "|"]
    for kind, label in FAMILIES.items():
        found = (cells.get((kind, stage), "not tested") for stage in STAGES)
        lines.append(f"| {label} | " + " | ".join(found) + " |")
    return head + BEGIN + "\n".join(lines) + "\n"
