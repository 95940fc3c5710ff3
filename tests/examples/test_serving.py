"""The serving page and its example say what is so: commands, flags, files; and the client draws."""

import configparser
import json
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tomllib
import typer.main
import yaml

from obsdiff.cli import app as obsdiff
from obsdiff_export import cli as engines
from obsdiff_runtime import cli

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "02_serve"
PAGES = (ROOT / "docs" / "serving.md", EXAMPLE / "README.md")


def lines_of(page: Path) -> list[list[str]]:
    """The commands of a page, in words."""
    text = page.read_text(encoding="utf-8")
    blocks = [
        *re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL),
        *re.findall(r"^    (.*)$", text, flags=re.MULTILINE),
    ]
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


COMMANDS_WITHOUT_TORCH = {command.program: command for command in (cli.COMMAND, engines.COMMAND)}
COMMANDS = [(page.name, line) for page in PAGES for line in lines_of(page)]


def check(line: list[str]) -> None:
    """Parses a command with the parser of its program; runs nothing."""
    program = Path(line[0]).name
    if program in COMMANDS_WITHOUT_TORCH:
        COMMANDS_WITHOUT_TORCH[program].parser().parse_args(line[1:])
    elif program == "obsdiff":
        verb = typer.main.get_command(obsdiff).commands[line[1]]  # type: ignore[attr-defined]
        verb.make_context(line[1], line[2:])
    elif program in ("pip", "python") or program.startswith("python3"):
        for word in line[1:]:
            if word.endswith(".py"):
                assert (ROOT / word).is_file(), word
            place, bracket, extras = word.partition("[")
            if bracket:
                project = tomllib.loads((ROOT / place / "pyproject.toml").read_text(encoding="utf-8"))["project"]
                assert set(extras.removesuffix("]").split(",")) <= project["optional-dependencies"].keys()
    elif program == "docker":
        assert line[1] in ("build", "run")
        assert "-f" not in line or (ROOT / line[line.index("-f") + 1]).is_file()
    else:
        assert program in ("curl", "serve", "tritonserver"), line


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[" ".join(line)[:50] for _, line in COMMANDS])
def test_a_command_of_the_page_is_one_that_its_program_takes(page: str, line: list[str]) -> None:
    check(line)


def test_flags_and_files_that_the_page_names_exist() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    known = {flag.name for verb in cli.VERBS.values() for flag in verb.flags}
    known |= {
        name for verb in typer.main.get_command(obsdiff).commands.values() for p in verb.params for name in p.opts
    }  # type: ignore[attr-defined]
    known |= {"--build-arg", "--gpus"}  # docker's
    assert set(re.findall(r"`(--[a-z-]+)", text)) <= known
    for name in re.findall(r"`(examples/[^` ]+)`", text):
        assert (ROOT / name).is_file(), name


def instructions() -> list[tuple[str, str]]:
    text = (EXAMPLE / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line and line[0] != "#"]


def test_the_dockerfile_copies_what_exists_and_starts_a_server() -> None:
    steps = instructions()
    assert steps[0] == ("FROM", "python:3.11-slim")
    for step, text in steps:
        if step == "COPY":
            assert (ROOT / text.split()[0]).exists()
    (entry,) = (json.loads(text) for step, text in steps if step == "ENTRYPOINT")
    given = cli.COMMAND.parser().parse_args(entry[1:])
    assert (entry[0], given.verb, given.host) == ("obsdiff-runtime", "serve", "0.0.0.0")
    (health,) = (text for step, text in steps if step == "HEALTHCHECK")
    compile(json.loads(health[health.index("[") :])[2], "HEALTHCHECK", "exec")
    assert f":{given.port}/health" in health
    assert ("EXPOSE", str(given.port)) in steps


def test_the_unit_starts_a_server_and_waits_for_it_to_drain() -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(EXAMPLE / "obsdiff.service", encoding="utf-8")
    line = shlex.split(unit["Service"]["ExecStart"])
    given = cli.COMMAND.parser().parse_args(line[1:])
    assert given.verb == "serve"
    assert given.drain < int(unit["Service"]["TimeoutStopSec"])


def test_the_file_for_ray_names_arguments_that_the_application_takes() -> None:
    application = yaml.safe_load((EXAMPLE / "ray.yaml").read_text(encoding="utf-8"))["applications"][0]
    source = (ROOT / "obsdiff" / "ray.py").read_text(encoding="utf-8")
    assert application["import_path"] == "obsdiff.ray:build"
    assert "def build(asked: Asked)" in source
    for name in application["args"]:
        assert re.search(rf"^    {name}: ", source, flags=re.MULTILINE), name


class Answers(BaseHTTPRequestHandler):
    """What OpenAI's images API and Triton answer, to what was asked."""

    asked: ClassVar[list[tuple[str, Any, str | None]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body, self.headers["Authorization"]))
        if self.path.endswith("/infer"):
            answer = {
                "outputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 1, 2, 3], "data": [1, 2, 3, 4, 5, 6]}]
            }
        else:
            answer = {"data": [{"b64_json": "UE5H"}]}
        status = 400 if body.get("prompt") == "bad" else 200
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer if status == 200 else {"error": {"message": "no"}}).encode())

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def listening() -> Iterator[str]:
    Answers.asked.clear()
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def client(*arguments: str) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, str(EXAMPLE / "client.py"), *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


def test_the_client_asks_either_kind_of_server_and_writes_what_comes(tmp_path: Path) -> None:
    with listening() as url:
        common = ("a red circle", "--url", url, "--seed", "7", "--steps", "3")
        assert client(*common, "--key", "abc", "-o", str(tmp_path / "a.png")).returncode == 0
        assert client(*common, "--triton", "shapes", "-o", str(tmp_path / "a.ppm")).returncode == 0
        refused = client("bad", "--url", url)
    assert (tmp_path / "a.png").read_bytes() == b"PNG"
    assert (tmp_path / "a.ppm").read_bytes() == b"P6 2 1 255\n" + bytes(range(1, 7))
    (path, asked, key), (triton_path, triton, _) = Answers.asked[:2]
    assert (path, key) == ("/v1/images/generations", "Bearer abc")
    assert asked == {"prompt": "a red circle", "seed": 7, "num_inference_steps": 3}
    assert triton_path == "/v2/models/shapes/infer"
    assert {each["name"]: each["data"] for each in triton["inputs"]} == {
        "prompt": ["a red circle"],
        "seed": [7],
        "num_inference_steps": [3],
    }
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "400" in refused.stderr


def test_what_the_client_asks_of_triton_is_what_the_repository_takes() -> None:
    from obsdiff.triton.configs import Choice, orchestrator_config
    from obsdiff_runtime.bundle import ComponentEntry, Defaults, Manifest
    from obsdiff_runtime.server.options import DEFAULT_BOUNDS

    component = ComponentEntry(onnx="", dtype="float32", inputs=(), outputs=())
    manifest = Manifest(
        created_by="",
        family="sd3",
        pipeline_class="StableDiffusion3Pipeline",
        sparsity="dense",
        defaults=Defaults(height=64, width=64, num_inference_steps=4, guidance_scale=3.0),
        components={"transformer": component},
    )
    choice = Choice(name="shapes", images=1, instances=1, threads=0, bounds=DEFAULT_BOUNDS)
    taken: Any = orchestrator_config(manifest, choice)["input"]
    kinds = {each["name"]: str(each["data_type"]).replace("STRING", "BYTES") for each in taken}
    source = (EXAMPLE / "client.py").read_text(encoding="utf-8")
    asked = dict(re.findall(r'\("(\w+)", "([A-Z0-9]+)", \w+\)', source))
    assert set(asked) == {"prompt", "seed", "num_inference_steps"}
    assert {name: f"TYPE_{kind}" for name, kind in asked.items()}.items() <= kinds.items()
