"""Pruning tiny pipelines package by package: what holds afterwards, what stays untouched, that it repeats to the bit.

The default method goes another way: test_streaming.py.
"""

import copy
import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from obsdiff import calibration, pointwise, pruning
from obsdiff.job import computable, given
from obsdiff.journal import FolderJournal
from obsdiff.pruning import Pruned
from obsdiff.recipe import Recipe
from obsdiff.resolving import resolve
from obsdiff.results import PackageResult
from obsdiff.settings import Settings
from obsdiff_runtime.errors import ConfigError

PROMPTS = ["a red circle", "a blue square", "a dog"]
KINDS = ["sd3", "sd15", "flux", "chroma", "pixart", "sana", "lumina2", "zimage"]
WHOLE = {"protect_first": 0, "protect_last": 0, "align": 1}
"""Every block may lose units, to the neuron."""

Prune = Callable[..., Pruned]


def recipe_for(pipeline: DiffusionPipeline, sparsity: str, prompts: list[str], **settings: Any) -> Recipe:
    loaded = given(pipeline)
    tokens = {} if loaded.defaults.max_sequence_length is None else {"max_sequence_length": 2}
    asked = Settings(
        **{"sparsity": sparsity, "steps": 2, "height": 32, "width": 32, "batch_size": 2} | tokens | settings
    )
    return resolve(asked, model="tiny", family=loaded.family, defaults=loaded.defaults, prompts=prompts)


@pytest.fixture
def prune(build_pipeline: Callable[..., DiffusionPipeline]) -> Prune:
    """prune("sd3" | "sd15" | pipeline, sparsity, **settings): a tiny pipeline, pruned as in the paper."""

    def run(
        kind: str | DiffusionPipeline,
        sparsity: str,
        *,
        journal: Any = None,
        prompts: list[str] = PROMPTS,
        **settings: Any,
    ) -> Pruned:
        pipeline = build_pipeline(kind) if isinstance(kind, str) else kind
        settings = {"method": "obsdiff"} | settings
        loaded = given(pipeline)
        stored = computable(loaded)
        recipe = recipe_for(pipeline, sparsity, prompts, **settings)
        return pruning.prune(pipeline, loaded.family, recipe, stored=stored, journal=journal)

    return run


@pytest.fixture
def dense(build_denoiser: Callable[..., nn.Module], build_pipeline: Callable[..., Any]) -> Callable[[str], nn.Module]:
    """dense("sd3"): the denoiser that the pipeline of that kind starts from."""

    def build(kind: str) -> nn.Module:
        pipeline = build_pipeline(kind)
        return getattr(pipeline, given(pipeline).family.denoiser)

    return build


class Memory:
    """A journal that forgets everything after its first `keep` packages."""

    def __init__(self, keep: int | None = None) -> None:
        self.packages: dict[str, PackageResult] = {}
        self._keep = keep

    def read(self, package: str) -> PackageResult | None:
        return self.packages.get(package)

    def write(self, package: str, result: PackageResult) -> None:
        if self._keep is not None and len(self.packages) == self._keep:
            raise KeyboardInterrupt
        self.packages[package] = result


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before: nn.Module, after: nn.Module) -> set[str]:
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


def same(left: nn.Module, right: nn.Module) -> bool:
    old, new = weights(left), weights(right)
    return old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


def holds(weight: Tensor, n: int, m: int) -> bool:
    return bool(((pointwise.matrix(weight).unflatten(1, (-1, m)) == 0).sum(-1) >= n).all())


@pytest.mark.parametrize("method", ["obsdiff", "wanda", "magnitude"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_pattern_holds_in_every_linear_and_nothing_else_changes(
    kind: str, method: str, prune: Prune, dense: Callable[[str], nn.Module]
) -> None:
    pruned = prune(kind, "2:4", method=method)
    linears = {linear.name for linear in pruned.family.linears(pruned.denoiser)}
    assert {layer.name for layer in pruned.layers} == linears
    for layer in pruned.layers:
        assert holds(pruned.denoiser.get_submodule(layer.name).weight, 2, 4), layer.name
        assert (layer.pattern, layer.zeros) == ("2:4", 0.5)
    assert changed(dense(kind), pruned.denoiser) == {f"{name}.weight" for name in linears}


def test_the_pattern_holds_in_weights_as_float16_stores_them(
    prune: Prune, build_pipeline: Callable[..., DiffusionPipeline]
) -> None:
    pruned = prune(build_pipeline("sd3").to(torch.float16), "2:4")
    for layer in pruned.layers:
        weight = pruned.denoiser.get_submodule(layer.name).weight
        assert holds(weight.half(), 2, 4)
        assert torch.equal(weight.half().float(), weight)  # rounded already: what later layers saw is what is stored


@pytest.mark.parametrize("sparsity", ["1:4", "4:8", "0.5+heads:0.25"])
def test_other_patterns_hold_too(sparsity: str, prune: Prune) -> None:
    pruned = prune("sd3", sparsity, method="magnitude", **WHOLE)
    for layer in pruned.layers:
        weight = pruned.denoiser.get_submodule(layer.name).weight
        if layer.pattern in ("1:4", "4:8"):
            assert holds(weight, int(layer.pattern[0]), int(layer.pattern[2]))
        elif layer.pattern == "0.5":
            assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=1 / weight.shape[1])
    assert any(layer.pattern == sparsity.partition("+")[0] for layer in pruned.layers)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shrunk_model_computes_what_the_masked_one_does(
    kind: str, prune: Prune, dense: Callable[[str], nn.Module], denoise: Callable[[nn.Module], Tensor]
) -> None:
    masked, journal = dense(kind), Memory()
    whole = sum(parameter.numel() for parameter in masked.parameters())
    pruned = prune(kind, "structured:0.5", journal=journal, packages=2, **WHOLE)
    for package in journal.packages.values():
        for name, weight in package.weights.items():
            pointwise.write(masked.get_parameter(name), weight)
    assert pruned.kept
    assert all(len(kept) == pruned.units[name] // 2 for name, kept in pruned.kept.items())
    assert sum(parameter.numel() for parameter in pruned.denoiser.parameters()) < 0.95 * whole
    expected = denoise(masked)
    # float32 sums over fewer terms in another order: a few ulp
    assert (denoise(pruned.denoiser) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_pattern_follows_on_what_the_cut_leaves(
    kind: str, prune: Prune, denoise: Callable[[nn.Module], Tensor]
) -> None:
    pruned = prune(kind, "structured:0.5+2:4", method="wanda", **WHOLE)
    patterned = [layer for layer in pruned.layers if layer.pattern == "2:4"]
    assert len(patterned) == len(pruned.family.linears(pruned.denoiser))
    for layer in patterned:
        assert holds(pruned.denoiser.get_submodule(layer.name).weight, 2, 4)
    assert torch.isfinite(denoise(pruned.denoiser)).all()


def test_first_and_last_block_keep_their_units_unless_told_otherwise(prune: Prune) -> None:
    assert {name.split(".")[1] for name in prune("sd3", "heads:0.5").kept} == {"1"}
    assert len({name.split(".")[1] for name in prune("sd3", "heads:0.5", **WHOLE).kept}) == 3


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({"include": ["*.ff.net.*"]}, lambda name: ".ff.net." in name),
        ({"exclude": ["*.attn.*"]}, lambda name: ".attn." not in name),
        ({"include": ["*.1.*"], "exclude": ["*.to_q"]}, lambda name: ".1." in name and not name.endswith(".to_q")),
        ({"blocks": ["1-"]}, lambda name: not name.startswith("transformer_blocks.0.")),
    ],
)
def test_what_is_left_out_stays_bit_identical(
    selection: dict[str, Any], expected: Callable[[str], bool], prune: Prune, dense: Callable[[str], nn.Module]
) -> None:
    pruned = prune("sd3", "2:4", method="magnitude", **selection)
    before = dense("sd3")
    names = [linear.name for linear in pruned.family.linears(before)]
    assert changed(before, pruned.denoiser) == {f"{name}.weight" for name in names if expected(name)}


@pytest.mark.parametrize("sparsity", ["structured:0", "0", "0%"])
def test_no_sparsity_changes_no_bit(sparsity: str, prune: Prune, dense: Callable[[str], nn.Module]) -> None:
    assert same(dense("sd3"), prune("sd3", sparsity).denoiser)


@pytest.mark.parametrize("sparsity", ["2:4", "structured:0.5"])
def test_the_same_seed_gives_the_same_bits(sparsity: str, prune: Prune) -> None:
    assert same(prune("sd3", sparsity, **WHOLE).denoiser, prune("sd3", sparsity, **WHOLE).denoiser)


def test_the_batch_size_decides_nothing(prune: Prune) -> None:
    one, all_at_once = (prune("sd3", "structured:0.5+2:4", batch_size=size, **WHOLE) for size in (1, 99))
    assert one.kept == all_at_once.kept
    left, right = weights(one.denoiser), weights(all_at_once.denoiser)
    # grams are sums in another order: the choice may differ only where two weights are worth the same
    differing = sum(int(((left[name] == 0) != (right[name] == 0)).sum()) for name in left)
    assert differing <= 0.005 * sum(weight.numel() for weight in left.values())


def test_a_width_that_m_does_not_divide_stays_dense_and_is_reported(
    prune: Prune, dense: Callable[[str], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    pruned = prune("sd3", "2:5", method="magnitude")  # widths 32 and 128
    assert same(dense("sd3"), pruned.denoiser)
    assert {layer.pattern for layer in pruned.layers} == {"dense"}
    assert pruned.layers[0].reason == "32 inputs are not divisible by 5"
    assert f"{pruned.layers[0].name} stays dense" in caplog.text


def packages_of(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The gram keys of every calibration pass that follows."""
    passes: list[list[str]] = []
    calibrate = calibration.calibrate

    def watched(pipeline: Any, family: Any, linears: Any, *args: Any, **options: Any) -> Any:
        grams = calibrate(pipeline, family, linears, *args, **options)
        passes.append(list(grams))
        return grams

    monkeypatch.setattr(calibration, "calibrate", watched)
    return passes


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (3, 3), (1000, 12)])
def test_packages_by_count_never_split_a_tier(
    count: int, expected: int, prune: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = packages_of(monkeypatch)
    prune("sd3", "2:4", packages=count, prompts=PROMPTS[:1])
    assert len(passes) == expected  # three blocks of four tiers


def test_a_joint_block_has_eight_grams(prune: Prune, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = packages_of(monkeypatch)
    pruned = prune("sd3", "2:4", packages=1, include=["transformer_blocks.1.*"], prompts=PROMPTS[:1])
    second_attention = any(".attn2." in layer.name for layer in pruned.layers)
    assert len(passes[0]) == 8 + 2 * second_attention


def test_packages_by_bytes_hold_no_more_than_the_budget(prune: Prune, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = packages_of(monkeypatch)
    pruned = prune("sd3", "2:4", gram_budget="300KB", prompts=PROMPTS[:1])
    widths = {linear.reads: linear.in_features for linear in pruned.family.linears(pruned.denoiser)}
    assert len(passes) > 1
    assert all(sum(4 * widths[reads] ** 2 for reads in grams) <= 300_000 for grams in passes)
    assert sorted(reads for grams in passes for reads in grams) == sorted(widths)


def test_grams_of_a_package_are_gone_before_the_next_ones_are_collected(
    prune: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    seen: list[weakref.ref[Tensor]] = []
    calibrate = calibration.calibrate

    def watched(*args: Any, **options: Any) -> Any:
        held.append(sum(gram() is not None for gram in seen))
        grams = calibrate(*args, **options)
        seen.extend(weakref.ref(gram.matrix) for gram in grams.values())
        return grams

    monkeypatch.setattr(calibration, "calibrate", watched)
    prune("sd3", "2:4", packages=3, prompts=PROMPTS[:1])
    assert held == [0, 0, 0]


@pytest.mark.parametrize("finished", [1, 3])
def test_a_resumed_run_ends_in_the_same_bits(finished: int, prune: Prune, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"packages": 2, **WHOLE}
    undisturbed = prune("sd3", "structured:0.5+2:4", **options)
    journal = Memory(keep=finished)
    with pytest.raises(KeyboardInterrupt):
        prune("sd3", "structured:0.5+2:4", journal=journal, **options)
    left = Memory()
    left.packages = journal.packages
    passes = packages_of(monkeypatch)
    resumed = prune("sd3", "structured:0.5+2:4", journal=left, **options)
    assert len(passes) == 4 - finished
    assert same(resumed.denoiser, undisturbed.denoiser)
    assert (resumed.kept, resumed.layers) == (undisturbed.kept, undisturbed.layers)


def test_a_journal_on_disk_gives_back_what_it_was_given(tmp_path: Path) -> None:
    result = PackageResult(
        weights={"a.b": torch.randn(3, 4).half()},
        kept={"a.heads": (0, 2)},
        layers=(pruning.LayerResult(name="a.b", pattern="2:4", loss=None, zeros=0.5, reason="why"),),
    )
    FolderJournal(tmp_path / "out", "digest", resume=False).write("weights-0", result)
    read = FolderJournal(tmp_path / "out", "digest", resume=True).read("weights-0")
    assert read is not None
    assert torch.equal(read.weights["a.b"], result.weights["a.b"])
    assert read.weights["a.b"].dtype == torch.float16
    assert (read.kept, read.layers) == (result.kept, result.layers)


def test_a_journal_of_another_recipe_is_refused(tmp_path: Path) -> None:
    FolderJournal(tmp_path / "out", "one", resume=False).write("weights-0", PackageResult())
    with pytest.raises(ConfigError, match="begun with other settings"):
        FolderJournal(tmp_path / "out", "another", resume=True)
    assert FolderJournal(tmp_path / "out", "another", resume=False).read("weights-0") is None


def test_a_journal_leaves_nothing_behind_before_its_first_package(tmp_path: Path) -> None:
    FolderJournal(tmp_path / "out", "digest", resume=False)
    assert not list(tmp_path.iterdir())


def test_a_package_that_was_half_written_counts_as_absent(tmp_path: Path) -> None:
    journal = FolderJournal(tmp_path / "out", "digest", resume=False)
    journal.write("weights-0", PackageResult(weights={"a": torch.ones(64)}))
    whole = (journal.folder / "weights-0.safetensors").read_bytes()
    (journal.folder / "weights-0.safetensors").write_bytes(whole[:-8])
    assert journal.read("weights-0") is None
    (journal.folder / "weights-0.safetensors").write_bytes(whole)
    (journal.folder / "weights-0.json").write_text('{"kept": {')
    assert journal.read("weights-0") is None
    (journal.folder / "weights-0.json").write_text("{}")
    assert journal.read("weights-0") is None


def test_anything_that_can_change_the_result_changes_the_digest(
    build_pipeline: Callable[..., DiffusionPipeline],
) -> None:
    recipe = recipe_for(build_pipeline("sd3"), "2:4", PROMPTS)
    others = [
        dataclasses.replace(recipe, prompts=("another",) * len(PROMPTS)),
        dataclasses.replace(recipe, damp=0.02),
        dataclasses.replace(recipe, sampling=dataclasses.replace(recipe.sampling, seed=1)),
        dataclasses.replace(recipe, packages=recipe.packages + 1),
    ]
    assert recipe.digest() == copy.deepcopy(recipe).digest()
    assert len({recipe.digest(), *(other.digest() for other in others)}) == 5
