"""Whatever happens to a bundle, it opens as it was exported or says what is wrong; it never crashes and never lies."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from obsdiff_runtime.bundle import ComponentEntry, Defaults, Manifest, TensorEntry, open_bundle, write_manifest
from obsdiff_runtime.errors import BundleError, CompatibilityError

CONTENT = {"unet/model.onnx": b"graph", "unet/model.onnx.data": bytes(range(64)), "model_index.json": b"{}"}
TENSOR = TensorEntry(name="sample", dtype="float32", shape=("batch", 4))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for relative, content in CONTENT.items():
        (tmp_path / relative).parent.mkdir(exist_ok=True)
        (tmp_path / relative).write_bytes(content)
    write_manifest(
        tmp_path,
        Manifest(
            created_by="a test",
            family="unet",
            pipeline_class="StableDiffusionPipeline",
            sparsity="2:4",
            defaults=Defaults(height=8, width=8, num_inference_steps=1, guidance_scale=1.0),
            components={
                "unet": ComponentEntry(onnx="unet/model.onnx", dtype="float32", inputs=(TENSOR,), outputs=(TENSOR,))
            },
        ),
    )
    return tmp_path


@QUICK
@given(name=st.sampled_from(sorted(CONTENT)), content=st.binary(max_size=80))
def test_a_file_of_other_content_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    try:
        if content == CONTENT[name]:
            open_bundle(folder)
        else:
            with pytest.raises(BundleError, match=name):
                open_bundle(folder)
    finally:
        (folder / name).write_bytes(CONTENT[name])


@QUICK
@given(data=st.data())
def test_a_manifest_with_any_value_replaced_opens_or_is_refused(folder: Path, data: st.DataObject) -> None:
    path = folder / "obsdiff.json"
    text = path.read_text()
    manifest = json.loads(text)
    places = list(_places(manifest))
    parent, key = data.draw(st.sampled_from(places))
    if isinstance(parent, dict) and data.draw(st.booleans()):
        parent[data.draw(st.text())] = parent.pop(key)
    else:
        parent[key] = data.draw(JSON)
    path.write_text(json.dumps(manifest))
    try:
        open_bundle(folder)
    except (BundleError, CompatibilityError):
        pass
    finally:
        path.write_text(text)


@QUICK
@given(content=st.binary(max_size=60))
def test_a_manifest_that_is_no_json_is_refused(folder: Path, content: bytes) -> None:
    path = folder / "obsdiff.json"
    text = path.read_text()
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"obsdiff\.json"):
        open_bundle(folder)
    path.write_text(text)


def _places(value: Any) -> Any:
    """Every (container, key) in parsed JSON."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)
