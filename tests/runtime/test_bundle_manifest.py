import dataclasses
import json
from pathlib import Path

import pytest

from obsdiff_runtime import bundle as bundles
from obsdiff_runtime.bundle import (
    Bundle,
    ComponentEntry,
    Defaults,
    EngineEntry,
    FileEntry,
    Manifest,
    TensorEntry,
    open_bundle,
    write_manifest,
)
from obsdiff_runtime.errors import BundleError, CompatibilityError

MANIFEST = Manifest(
    created_by="obsdiff 0.1.0",
    family="sd3",
    pipeline_class="StableDiffusion3Pipeline",
    sparsity="2:4",
    defaults=Defaults(height=64, width=64, num_inference_steps=20, guidance_scale=3.5, max_sequence_length=1),
    components={
        "transformer": ComponentEntry(
            onnx="transformer/model.onnx",
            dtype="float32",
            inputs=(TensorEntry(name="hidden_states", dtype="float32", shape=("batch", 4, "height", "width")),),
            outputs=(TensorEntry(name="out_hidden_states", dtype="float32", shape=("batch", 4, "height", "width")),),
            engines=(
                EngineEntry(
                    path="engines/transformer/abc.plan",
                    key="abc",
                    backend="tensorrt_rtx",
                    backend_version="1.7.1",
                    targets=("8.6", "8.9"),
                    sparse_requested=True,
                    sparsity="this backend ignores sparsity",
                    receipt="engines/transformer/abc.json",
                ),
            ),
        )
    },
    recipe={"steps": 20, "nested": {"a": [1, None]}},
    measurements={"psnr": 31.5},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "bundle"
    for relative, content in {
        "transformer/model.onnx": b"graph",
        "transformer/model.onnx.data": bytes(range(256)) * 9,
        "engines/transformer/abc.plan": b"plan",
        "engines/transformer/abc.json": b"{}",
        "scheduler/scheduler_config.json": b'{"_class_name": "FlowMatchEulerDiscreteScheduler"}',
        "README.md": b"a card",
    }.items():
        (root / relative).parent.mkdir(parents=True, exist_ok=True)
        (root / relative).write_bytes(content)
    write_manifest(root, MANIFEST)
    return root


def edit(folder: Path, **changes: object) -> None:
    path = folder / "obsdiff.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_written_manifest_reads_back_equal(folder: Path) -> None:
    opened = open_bundle(folder)
    assert opened.manifest == dataclasses.replace(MANIFEST, files=opened.manifest.files)
    assert opened.scheduler() == {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    assert opened.onnx("transformer").read_bytes() == b"graph"
    assert opened.total_bytes() == sum(entry.bytes for entry in opened.manifest.files.values())


def test_the_files_are_listed_with_their_sha256(folder: Path) -> None:
    files = open_bundle(folder).manifest.files
    assert files["engines/transformer/abc.json"] == FileEntry(
        sha256="44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a", bytes=2
    )


def test_the_card_may_be_edited_and_files_added_but_not_used(folder: Path) -> None:
    (folder / "README.md").write_text("a longer card")
    (folder / "tokenizer.json").write_text("{}")
    opened = open_bundle(folder)
    assert not opened.has("tokenizer.json")
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a file of this bundle"):
        opened.path("tokenizer.json")


@pytest.mark.parametrize("verify", ["full", "sizes"])
def test_a_missing_file_is_named(folder: Path, verify: bundles.Verify) -> None:
    (folder / "transformer/model.onnx.data").unlink()
    with pytest.raises(BundleError, match=r"model\.onnx\.data is missing"):
        open_bundle(folder, verify)


@pytest.mark.parametrize("verify", ["full", "sizes"])
def test_a_truncated_file_is_named(folder: Path, verify: bundles.Verify) -> None:
    (folder / "transformer/model.onnx.data").write_bytes(b"short")
    with pytest.raises(BundleError, match=r"model\.onnx\.data is truncated: 5 bytes, the manifest says 2304"):
        open_bundle(folder, verify)


def test_an_altered_file_is_named(folder: Path) -> None:
    (folder / "transformer/model.onnx").write_bytes(b"grapH")
    with pytest.raises(BundleError, match=r"model\.onnx was altered"):
        open_bundle(folder)


def test_a_file_larger_than_declared_is_never_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise AssertionError(f"{path} was read")

    (folder / "transformer/model.onnx").write_bytes(b"graph and more")
    monkeypatch.setattr(bundles, "sha256", refuse)
    with pytest.raises(BundleError, match=r"model\.onnx is larger than exported"):
        open_bundle(folder)


def test_a_link_is_refused_when_opening_and_when_writing(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (folder / "transformer").rename(outside)
    (folder / "transformer").symlink_to(outside)
    with pytest.raises(BundleError, match=r"transformer is a link"):
        open_bundle(folder)
    with pytest.raises(BundleError, match=r"transformer is a link"):
        write_manifest(folder, MANIFEST)


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../../b", "C:\\x", "a//b", "./a", "", "a/."])
def test_a_path_that_leaves_the_bundle_is_refused(folder: Path, path: str) -> None:
    edit(folder, files={path: {"sha256": "0" * 64, "bytes": 1}})
    with pytest.raises(BundleError, match="no plain path inside the bundle"):
        open_bundle(folder)


def test_a_graph_that_is_not_listed_is_refused(folder: Path) -> None:
    files = json.loads((folder / "obsdiff.json").read_text())["files"]
    del files["transformer/model.onnx"]
    edit(folder, files=files)
    with pytest.raises(BundleError, match=r"transformer names transformer/model\.onnx"):
        open_bundle(folder)


def test_a_newer_schema_asks_for_an_upgrade(folder: Path) -> None:
    edit(folder, schema=2, something_new=1)
    with pytest.raises(CompatibilityError, match=r"schema 2.*upgrade"):
        open_bundle(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "1"}, "schema should be 1, not '1'"),
        ({"family": 3}, "family should be a string, not an integer"),
        ({"colour": "red"}, "unknown field colour"),
        ({"defaults": {"height": 64}}, r"field defaults\.width is missing"),
        ({"components": {"unet": {"onnx": None}}}, r"components\.unet\.onnx should be a string, not null"),
        ({"files": {"a": {"sha256": "0", "bytes": 1}}}, r"files\.a has no valid size"),
        ({"files": {"a": {"sha256": "0" * 64, "bytes": True}}}, r"files\.a\.bytes should be an integer"),
    ],
)
def test_a_wrong_field_is_named(folder: Path, changes: dict[str, object], message: str) -> None:
    edit(folder, **changes)
    with pytest.raises(BundleError, match=message):
        open_bundle(folder)


def test_broken_json_and_no_bundle_are_told_apart(folder: Path, tmp_path: Path) -> None:
    (folder / "obsdiff.json").write_text('{"schema": 1')
    with pytest.raises(BundleError, match=r"obsdiff\.json is not valid JSON"):
        open_bundle(folder)
    with pytest.raises(BundleError, match=r"is no bundle: it has no obsdiff\.json"):
        open_bundle(tmp_path)


def test_an_unknown_component_lists_the_known(folder: Path) -> None:
    opened: Bundle = open_bundle(folder)
    with pytest.raises(BundleError, match="no component unet; it has transformer"):
        opened.component("unet")


def test_a_manifest_that_cannot_be_written_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"content")
    empty = dataclasses.replace(MANIFEST, components={})
    write_manifest(tmp_path, empty)
    before = (tmp_path / "obsdiff.json").read_bytes()

    def full(self: Path, text: str, **options: object) -> int:
        self.write_bytes(text.encode()[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_manifest(tmp_path, dataclasses.replace(empty, sparsity="4:8"))
    assert (tmp_path / "obsdiff.json").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"file", "obsdiff.json"}
