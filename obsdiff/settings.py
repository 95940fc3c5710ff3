"""What a user can ask for: the fields of every verb, before anything is resolved.

A field is a flag (`--max-sequence-length`), a key of a configuration file (`max_sequence_length`) and a keyword of
the Python functions. `None` means "not given"; recipe.py resolves it. Nothing heavy is imported here, because
`obsdiff --help` reads this module.
"""

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tomllib

from obsdiff_export.settings import EngineSettings
from obsdiff_runtime.errors import ConfigError, require_file


@dataclass(frozen=True, kw_only=True)
class Settings(EngineSettings):
    """Everything optional; the text beside each field is its `--help`."""

    model: Annotated[str | None, "diffusers folder or Hub id; default: the small trained pipeline in the package"] = (
        None
    )
    revision: Annotated[str | None, "branch, tag or commit on the Hub"] = None
    variant: Annotated[str | None, "file variant, such as fp16"] = None
    device: Annotated[str | None, "cpu, cuda or cuda:N; default: cuda where there is one"] = None

    offload: Annotated[
        bool | None,
        "the model lies in the host's memory, a GPU holds one block at a time; streamed only",
    ] = None

    low_memory: Annotated[
        bool | None,
        "for a model larger than the memory: weights go from file to file one by one; nothing is pruned, run or timed",
    ] = None

    sparsity: Annotated[
        str | None, "2:4, any N:M (N of every M zero), 0.5 or 50%, structured:0.25, heads:0.2, ffn:0.3; joined with +"
    ] = None
    method: Annotated[
        str | None,
        "streamed, obsdiff (the paper), sparsegpt, dsnot (single weights only), wanda or magnitude; default: streamed",
    ] = None
    include: Annotated[list[str] | None, "prune only linears whose name matches this glob; repeatable"] = None
    exclude: Annotated[list[str] | None, "leave linears whose name matches this glob dense; repeatable"] = None
    blocks: Annotated[list[str] | None, "prune only these blocks: 3, 2-24, 5- or -3; repeatable"] = None
    protect_first: Annotated[int | None, "blocks left whole at the start, structured only; default: the family's"] = (
        None
    )
    protect_last: Annotated[int | None, "blocks left whole at the end, structured only; default: the family's"] = None
    allocation: Annotated[
        str | None,
        "measured (units and single weights go where the output suffers least), uniform, or latency:FILE (measured, "
        "and what counts is time by a table of obsdiff whatif); default: the method's",
    ] = None
    dense_share: Annotated[
        float | None, "share of the MACs that a pattern leaves dense, where it would cost most; default: 0"
    ] = None
    align: Annotated[int | None, "round kept FFN widths to a multiple; 1 is the paper's; default: 64"] = None
    damp: Annotated[float | None, "added to a gram's diagonal, as a share of its mean; default: 0.01"] = None

    prompts_file: Annotated[str | None, "calibration prompts, one a line; default: the built-in set"] = None
    num_samples: Annotated[int | None, "calibration prompts used; default: 100, or 24 on the shipped pipeline"] = None
    steps: Annotated[int | None, "denoising steps; default: the pipeline's"] = None
    guidance_scale: Annotated[float | None, "classifier-free guidance; default: the pipeline's"] = None
    guidance_scale_2: Annotated[
        float | None, "of the second denoiser, of pipelines that have one (Wan 2.2); default: as the first one's"
    ] = None
    height: Annotated[int | None, "image height in pixels; default: the pipeline's"] = None
    width: Annotated[int | None, "image width in pixels; default: the pipeline's"] = None
    num_frames: Annotated[int | None, "frames of a film: 1, 5, 9, ...; default: the pipeline's"] = None
    max_sequence_length: Annotated[int | None, "T5 tokens; default: the pipeline's"] = None
    references: Annotated[
        str | None,
        "folder of pictures for the prompts, by turns: that FLUX.1 Kontext, FLUX.2 and Qwen-Image-Edit are told, that "
        "a ControlNet steers by, of which inpainting models draw a part anew, or that films begin with",
    ] = None
    batch_size: Annotated[int | None, "prompts per batch; default: 4, fewer of large pictures: 1 of 1024 x 1024"] = None
    seed: Annotated[int | None, "each prompt's noise is seeded by this plus its index; default: 0"] = None
    time_weights: Annotated[
        str | None,
        "log-decrease (1.2 to 0.8), uniform, linear-increase, linear-decrease or log-increase; default: the method's",
    ] = None
    packages: Annotated[int | None, "calibration passes the layers are split into, unless streamed; default: 4"] = None
    fast: Annotated[bool | None, "streamed only: a third of the calibration, for about half more error"] = None
    draws: Annotated[
        int | None, "pictures drawn of each prompt by a streamed method; default: 1 to 3, so that there are 72; fast: 1"
    ] = None
    trajectory_steps: Annotated[
        int | None,
        "denoising steps at which it computes; default: half of --steps, two fifths where shares are measured or with "
        "--fast, and at least 8",
    ] = None
    kept_steps: Annotated[int | None, "steps of each picture that it looks at; default: 2"] = None
    gram_budget: Annotated[
        str | None, "split by memory for grams instead, such as 8GiB; streamed: the most that one tier may take"
    ] = None

    dtype: Annotated[str | None, "precision in the ONNX graphs: auto, fp32, fp16 or bf16; auto: fp16 for engines"] = (
        None
    )
    precision: Annotated[
        str | None, "int8 or fp8 in the denoiser's linears, or a --dtype; a sparsity can be joined: fp8+2:4"
    ] = None
    keep_float: Annotated[
        list[str] | None, "leave linears whose name matches this glob out of --precision; repeatable"
    ] = None
    quantize_outputs: Annotated[bool | None, "round what int8 or fp8 linears give, too; some kernels need it"] = None
    opset: Annotated[int | None, "ONNX opset; default: 20, or 22 for bf16"] = None
    trt: Annotated[bool | None, "build TensorRT engines (TensorRT-RTX ahead of time where there is no GPU)"] = None
    eval_prompts: Annotated[
        int | None, "held-out prompts for the comparison; default: 16, or 32 on the shipped one"
    ] = None
    eval_prompts_file: Annotated[str | None, "held-out prompts, one a line"] = None
    clip_model: Annotated[str | None, "score pictures with this CLIP model: a folder or Hub id"] = None
    lpips: Annotated[str | None, "measure LPIPS, with AlexNet's weights from this file"] = None
    fid_reference: Annotated[str | None, "folder of real pictures: FID to them in the features of --clip-model"] = None
    judge: Annotated[
        list[str] | None, "score pictures with name=module:function, called with picture and prompt; repeatable"
    ] = None
    guidance_sweep: Annotated[
        str | None, "judge both models at these guidance scales too, such as 1,2,3.5,5, and each at its best"
    ] = None
    fail_if: Annotated[list[str] | None, "exit with 3 if so, such as 'velocity_error>0.01'; repeatable"] = None
    method_options: Annotated[dict[str, float] | None, "knobs of the method (--set method_options.block=64)"] = field(
        default=None, metadata={"flag": False}
    )


FIELDS: dict[str, "dataclasses.Field[Any]"] = {f.name: f for f in dataclasses.fields(Settings)}


def gather(flags: Mapping[str, Any], *, config: Path | None = None, assignments: Iterable[str] = ()) -> Settings:
    """Settings from a file, then flags, then `--set` assignments; the later ones win.

    Raises:
        ConfigError: an unreadable file, an unknown key (names the nearest), or a value of the wrong type.
    """
    values: dict[str, Any] = dict(_read(config)) if config is not None else {}
    values.update({key: value for key, value in flags.items() if value is not None})
    for assignment in assignments:
        _assign(values, assignment)
    return validate(values)


def validate(values: Mapping[str, Any]) -> Settings:
    """Settings from plain data, types checked.

    Raises:
        ConfigError: an unknown key (names the nearest) or a value of the wrong type.
    """
    for key in values:
        if key not in FIELDS:
            near = difflib.get_close_matches(key, FIELDS, n=1)
            raise ConfigError(f"{key}: no such setting" + (f"; did you mean {near[0]}?" if near else ""))
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Settings).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}: {first['msg'].lower()}, got {first['input']!r}") from None


def given_as(settings: Settings | None, more: Mapping[str, Any]) -> Settings:
    """Settings with keywords laid over them, types checked; a list of one may be given as its only item.

    Raises:
        ConfigError: an unknown key (names the nearest) or a value of the wrong type.
    """
    values = {} if settings is None else {field: getattr(settings, field) for field in FIELDS}
    for key, value in more.items():
        is_list = key in FIELDS and "list[" in str(FIELDS[key].type)
        values[key] = [value] if is_list and isinstance(value, str) else value
    return validate(values)


def save(settings: Settings, path: Path) -> None:
    """Writes what was given as a TOML or YAML file that `--config` reads back.

    Raises:
        ConfigError: there can be no such file.
    """
    require_file("--save-config", path)
    given = {key: value for key, value in dataclasses.asdict(settings).items() if value is not None}
    if path.suffix in (".yaml", ".yml"):
        import yaml

        text = yaml.safe_dump(given, sort_keys=False)
    else:
        tables = {key: value for key, value in given.items() if isinstance(value, dict)}
        lines = [f"{key} = {json.dumps(value)}" for key, value in given.items() if key not in tables]
        for name, table in tables.items():
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
        text = "\n".join(lines) + "\n"
    path.write_text(text, encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    try:
        if path.suffix in (".yaml", ".yml", ".json"):
            import yaml

            data = yaml.safe_load(text)
        else:
            data = tomllib.loads(text)
    except Exception as error:
        raise ConfigError(f"--config {path}: {' '.join(str(error).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"--config {path}: expected keys and values, found a {type(data).__name__}")
    return {str(key).replace("-", "_"): value for key, value in data.items()}


def _assign(values: dict[str, Any], assignment: str) -> None:
    """Sets one `key=value` or `table.key=value` in `values`."""
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {assignment}: expected key=value")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    *tables, last = key.replace("-", "_").split(".")
    for table in tables:
        nested = values.setdefault(table, {})
        if not isinstance(nested, dict):
            raise ConfigError(f"--set {assignment}: {table} is no table")
        values = nested
    values[last] = value
