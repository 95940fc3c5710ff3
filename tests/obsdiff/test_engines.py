"""Orders for engines, and engines in a bundle, with a builder that builds nothing real."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import obsdiff
from bundles import CONFIG, LATENTS, write_tiny
from obsdiff import verbs
from obsdiff.cli import main
from obsdiff.settings import Settings, given_as
from obsdiff_export import build as build_module
from obsdiff_export import contest, engines, orders
from obsdiff_export.builders.request import Answer
from obsdiff_export.engines import build_engines
from obsdiff_export.orders import Order, order_of, served
from obsdiff_export.requested import in_tiles
from obsdiff_runtime.bundle import open_bundle, write_manifest
from obsdiff_runtime.errors import BundleError, CompatibilityError, ConfigError, SparsityProofError

CHOSE = """
(Sparsity) Found 1 layer(s) eligible to use sparse tactics: fc
(Sparsity) Chose 1 layer(s) using sparse tactics: fc
"""


class FakeBuilder:
    """Its engines are the name of what they were built from; its log says what a test wants it to say."""

    name = "fake"
    extra = "fake"
    environment: Mapping[str, str] = {}
    times_tactics = False

    def missing(self) -> str:
        return ""

    def version(self) -> str:
        return "1.0"

    def device(self) -> str:
        return "a GPU"

    def targets(self, asked: Any) -> tuple[str, ...]:
        return tuple(asked) or ("9.0",)

    def check(self, flags: Any, targets: Any) -> None:
        if flags.refit == "stripped":
            raise CompatibilityError("no engine of mine is stripped")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """The fake in place of every builder, and the requests that it was given."""
    seen = SimpleNamespace(requests=[], log=CHOSE)

    def run(request: Any, builder: Any, log: Path) -> Answer:
        seen.requests.append(request)
        Path(request.plan).write_bytes(f"built from {request.onnx} {len(seen.requests)}".encode())
        (Path(request.answer).parent / "log").write_text(seen.log)
        return Answer(failure="", message="", seconds=1.0, notes=("a note",))

    monkeypatch.setenv("OBSDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build_module.process, "run", run)
    monkeypatch.setattr(orders, "choose_builder", lambda name: FakeBuilder())
    return seen


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "bundle")


def test_engines_are_ordered_by_keywords(bundle: Path, builds: SimpleNamespace) -> None:
    built = obsdiff.build(bundle, profile="512,512x768@1-2", optimization_level=3, weight_streaming=True)
    denoiser, decoder = builds.requests
    assert [each["hidden_states"]["opt"] for each in denoiser.profiles] == [(2, 4, 64, 8), (2, 4, 96, 8)]
    assert [each["hidden_states"]["max"] for each in denoiser.profiles] == [(8, 4, 64, 8), (4, 4, 96, 8)]
    assert (denoiser.flags.sparse, decoder.flags.sparse) == (True, False)
    assert (denoiser.flags.optimization_level, decoder.flags.weight_streaming) == (3, True)
    assert [entry.device for entry in built.entries] == ["a GPU", "a GPU"]
    listed = open_bundle(bundle).component("transformer").engines
    assert listed == built.entries[:1]
    assert listed[0].profiles == built.engines["transformer"].profiles


def test_the_decoder_is_timed_at_one_image_and_the_denoiser_at_two_rows(bundle: Path, builds: SimpleNamespace) -> None:
    obsdiff.build(bundle)
    (denoiser,), (decoder,) = (request.profiles for request in builds.requests)
    assert [denoiser["hidden_states"][end][0] for end in ("min", "opt", "max")] == [1, 2, 8]
    assert [decoder["latent_sample"][end][0] for end in ("min", "opt", "max")] == [1, 1, 4]


def test_decoders_of_tiles_take_one_tile_at_a_time_or_a_part_of_it(bundle: Path, builds: SimpleNamespace) -> None:
    assert open_bundle(bundle).manifest.defaults.vae_tile is None
    obsdiff.build(bundle, profile="256-1024", vae_tile=512)
    (denoiser,), (decoder,) = (request.profiles for request in builds.requests)
    assert [denoiser["hidden_states"][end][2] for end in ("min", "opt", "max")] == [32, 64, 128]
    assert [decoder["latent_sample"][end] for end in ("min", "opt", "max")] == [(1, 4, 1, 8), *[(1, 4, 64, 8)] * 2]
    assert open_bundle(bundle).manifest.defaults.vae_tile == 512
    obsdiff.build(bundle, profile="256", components=["vae_decoder"])  # stays so; no picture fills a tile
    assert builds.requests[2].profiles[0]["latent_sample"]["max"] == (1, 4, 32, 8)
    assert open_bundle(bundle).manifest.defaults.vae_tile == 512
    obsdiff.build(bundle, components=["vae_decoder"], min_shapes="latent_sample:1x4x64x8", vae_tile=256)
    assert builds.requests[3].profiles[0]["latent_sample"]["max"] == (1, 4, 64, 8)  # the user says
    with pytest.raises(ConfigError, match="tiles of 300 pixels: should be a multiple of 8; near are 296, 304"):
        obsdiff.build(bundle, vae_tile=300)


def test_pictures_are_read_in_larger_tiles_where_pixels_are_patches() -> None:
    """As diffusers has it of Wan 2.2 TI2V: up to the size of the picture."""
    vae = {"temperal_downsample": [False, True, True], "patch_size": 2}
    what = served({**LATENTS, "width": 160}, "StableDiffusion3Pipeline", CONFIG, vae=vae, tile=512)
    table = in_tiles(what.sizes, what)
    assert (table["height"], table["width"]) == ((1, 64, 64), (1, 64, 64))
    assert (table["image_height"], table["image_width"]) == ((8, 512, 512), (8, 1024, 1024))


def test_receipts_of_build_hold_the_verdict_of_every_linear(bundle: Path, builds: SimpleNamespace) -> None:
    built = obsdiff.build(bundle, require_sparse=True)
    built.hold()
    denoiser, decoder = engines.receipts(built.engines.values())
    assert [(layer.weight, layer.weights, layer.verdict) for layer in denoiser.proof.layers] == [
        ("fc.weight", "holds", "active")
    ]
    assert not decoder.proof.layers


def test_sparsity_that_is_not_proven_exits_with_6_and_leaves_the_engines(
    bundle: Path, builds: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    builds.log = ""
    monkeypatch.setattr("sys.argv", ["obsdiff", "build", str(bundle), "--require-sparse", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 6
    out, err = capsys.readouterr()
    assert "no proof of sparsity" in err
    assert [engine["component"] for engine in json.loads(out)["engines"]] == ["transformer", "vae_decoder"]
    assert open_bundle(bundle).component("transformer").engines


def test_a_person_is_told_what_was_built_for_what(
    bundle: Path, builds: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["obsdiff", "build", str(bundle), "--component", "transformer", "-q"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "fake 1.0 for 9.0" in out
    assert "takes batch 1 to 8 (timed at 2), height 64" in out
    assert "1 of 1 linears run on sparse kernels" in out
    assert "note: a note" in out
    assert "vae_decoder" not in out


def test_an_equal_engine_of_another_bundle_is_taken_from_the_cache(
    bundle: Path, builds: SimpleNamespace, tmp_path: Path
) -> None:
    shutil.copytree(bundle, tmp_path / "other")
    obsdiff.build(bundle, cache_dir=str(tmp_path / "cache"))
    again = obsdiff.build(tmp_path / "other", cache_dir=str(tmp_path / "cache"))
    assert all(engine.reused for engine in again.engines.values())
    assert len(builds.requests) == 2
    assert not obsdiff.build(tmp_path / "other", no_cache=True, optimization_level=1).engines["transformer"].reused


def test_shapes_by_input_hold_for_every_component_that_shares_their_axes(bundle: Path, builds: SimpleNamespace) -> None:
    obsdiff.build(bundle, min_shapes="hidden_states:1x4x32x8", max_shapes="hidden_states:2x4x96x8")
    (denoiser,), (decoder,) = (request.profiles for request in builds.requests)
    assert denoiser["hidden_states"] == {"min": (1, 4, 32, 8), "opt": (2, 4, 96, 8), "max": (2, 4, 96, 8)}
    assert decoder["latent_sample"] == {"min": (1, 4, 32, 8), "opt": (1, 4, 96, 8), "max": (4, 4, 96, 8)}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"profile": "520"}, "no multiple of 16"),
        ({"profile": "4096"}, "at most 3072 pixels a side"),
        ({"profile": "512", "opt_shapes": "hidden_states:1"}, "give one of them"),
        ({"opt_shapes": "hidden_state:1"}, "did you mean hidden_states"),
        ({"refit": "perhaps"}, "there are no, yes, stripped"),
        ({"optimization_level": 6}, "levels are 0"),
        ({"no_cache": True, "cache_dir": "x"}, "give one of them"),
        ({"components": ["unet"]}, "the bundle has transformer, vae_decoder"),
        ({"profiles": "512"}, "did you mean profile"),
        ({"optimization_level": "high"}, "valid integer"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_built(
    bundle: Path, builds: SimpleNamespace, more: dict[str, Any], message: str
) -> None:
    before = sorted(bundle.rglob("*"))
    with pytest.raises(ConfigError, match=message):
        obsdiff.build(bundle, **more)
    assert not builds.requests
    assert sorted(bundle.rglob("*")) == before


def test_a_bundle_without_a_denoiser_gets_no_engines(bundle: Path, builds: SimpleNamespace) -> None:
    manifest = open_bundle(bundle).manifest
    write_manifest(bundle, dataclasses.replace(manifest, components={"vae": manifest.components["vae_decoder"]}))
    with pytest.raises(BundleError, match="has neither transformer nor unet"):
        obsdiff.build(bundle)
    assert not builds.requests


def test_what_the_builder_cannot_serve_is_refused_before_anything_is_read(builds: SimpleNamespace) -> None:
    with pytest.raises(CompatibilityError, match="no engine of mine is stripped"):
        obsdiff.build("no bundle", refit="stripped")


def test_proof_is_not_asked_of_a_builder_that_never_has_it() -> None:
    with pytest.raises(SparsityProofError, match="--require-sparse: ONNX Runtime multiplies zeros like any other"):
        order_of(Settings(builder="onnxruntime", require_sparse=True))


@pytest.mark.parametrize("more", [{"profile": "512"}, {"require_sparse": True}, {"targets": ["8.6"]}])
def test_export_without_trt_takes_no_flags_about_engines(tmp_path: Path, more: dict[str, Any]) -> None:
    (name,) = more
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} is about engines, and none are built without"):
        obsdiff.export(output=tmp_path / "out", **more)


def test_export_takes_keywords_and_names_the_nearest_of_a_wrong_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean sparsity"):
        obsdiff.export(output=tmp_path / "out", sparsty="2:4")
    with pytest.raises(ConfigError, match=r"name it, as in export\(output="):
        obsdiff.export(sparsity="2:4")
    assert verbs._asked("a model", {"targets": "8.9"}) == Settings(model="a model", targets=["8.9"])


def test_keywords_are_laid_over_settings() -> None:
    base = Settings(sparsity="2:4", targets=["8.6"])
    assert given_as(base, {"targets": "8.9", "seed": 3}) == Settings(sparsity="2:4", targets=["8.9"], seed=3)


def test_orders_are_for_every_component(builds: SimpleNamespace, bundle: Path) -> None:
    order = order_of(Settings(targets=["8.6,8.9"], no_cache=True))
    assert isinstance(order, Order)
    assert (order.targets, order.cache) == (("8.6", "8.9"), None)
    graphs = {name: bundle / name / "model.onnx" for name in ("transformer", "vae_decoder")}
    what = served(LATENTS, "StableDiffusion3Pipeline", CONFIG, vae={})
    assert (what.rows, what.scale, what.step, what.largest) == (2, 8, 16, 3072)
    found = build_engines(graphs, bundle, what, order, denoisers={"transformer": None})
    assert list(found.built) == ["transformer", "vae_decoder"]


def test_export_finds_a_profile_that_cannot_be_drawn_before_any_work(
    builds: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verbs, "load_model", lambda settings: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match="--profile 33: width 33 is no multiple of"):
        obsdiff.export(output=tmp_path / "out", sparsity="2:4", trt=True, profile="33")
    with pytest.raises(ConfigError, match="tiles of 17 pixels: should be a multiple of 4"):
        obsdiff.export(output=tmp_path / "out", sparsity="2:4", vae_tile=17)
    assert not (tmp_path / "out").exists()


def clock(slower: str) -> Any:
    """Times by turns in which engines of one variant take a fifth longer."""

    def timing(backend: str, inputs: Any, **_: Any) -> Any:
        def run_all(found: Mapping[str, Any]) -> dict[str, list[float]]:
            return {
                name: [(1.2 if name == slower else 1.0) + 0.001 * (index % 3) for index in range(20)] for name in found
            }

        return run_all

    return timing


@pytest.mark.parametrize(("slower", "sparse"), [("pruned", True), ("sparse", False)])
def test_the_faster_of_the_engines_with_and_without_sparse_kernels_is_kept(
    slower: str, sparse: bool, bundle: Path, builds: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contest, "timing_here", clock(slower))
    built = obsdiff.build(bundle, components=["transformer"], require_sparse=True, builds=2)
    assert [request.flags.sparse for request in builds.requests] == [True, False] * 2
    entry = built.entries[0]
    assert entry.sparse_requested is sparse
    assert len(list((bundle / "engines" / "transformer").glob("*.plan"))) == 1
    measured: Any = open_bundle(bundle).manifest.measurements["engines/transformer"]
    assert measured["shipped"] == entry.key
    assert f"the engine {'with' if sparse else 'without'} the flag is shipped" in measured["decision"]["why"]
    assert measured["decision"]["why"] in "\n".join(engines.lines(built))
    if sparse:
        built.hold()
    else:
        with pytest.raises(SparsityProofError):
            built.hold()


def test_no_builds_to_compare_build_once_with_sparse_kernels(bundle: Path, builds: SimpleNamespace) -> None:
    built = obsdiff.build(bundle, components=["transformer"], builds=0)
    assert [request.flags.sparse for request in builds.requests] == [True]
    assert not built.contests
    with pytest.raises(ConfigError, match="--builds -1"):
        obsdiff.build(bundle, builds=-1)


def test_what_cannot_be_timed_says_so(bundle: Path, builds: SimpleNamespace) -> None:
    built = obsdiff.build(bundle, components=["transformer"])
    assert len(builds.requests) == 1
    assert "not measured: engines of fake are not timed here" in "\n".join(engines.lines(built))


def test_usual_targets_without_a_format_of_the_bundle_are_left_out(bundle: Path, builds: SimpleNamespace) -> None:
    manifest = open_bundle(bundle).manifest
    components = {
        name: dataclasses.replace(component, precision="fp8") for name, component in manifest.components.items()
    }
    write_manifest(bundle, dataclasses.replace(manifest, components=components))
    with pytest.raises(CompatibilityError, match=r"8\.6 has no fp8"):
        obsdiff.build(bundle, targets="8.6,8.9")
    assert obsdiff.build(bundle).entries[0].targets == ("9.0",)
