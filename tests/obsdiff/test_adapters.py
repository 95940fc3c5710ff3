"""A LoRA on a pruned model does what it does to the dense one, in the rows and columns that are left."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from obsdiff import adapters, checkpoint, verbs
from obsdiff.adapters import Adapter, Delta
from obsdiff.families import Family
from obsdiff.families.table import family_of
from obsdiff.loading import load_pipeline
from obsdiff.manifest import GroupCut, PrunedManifest
from obsdiff.settings import Settings
from obsdiff.shrinking import shrink
from obsdiff_runtime.errors import BundleError, ConfigError, ModelError

RANK = 3


def lora_of(denoiser: nn.Module, family: Family, scale: float = 0.5) -> Adapter:
    """Random, on every prunable linear and what writes into its groups."""
    generator = torch.Generator().manual_seed(7)
    names = {linear.name for linear in family.linears(denoiser)}
    deltas = {}
    for name in sorted(names):
        n, k = denoiser.get_parameter(f"{name}.weight").shape
        down, up = torch.randn(RANK, k, generator=generator), torch.randn(n, RANK, generator=generator)
        deltas[name] = Delta(down=down, up=up, scale=scale)
    return Adapter(deltas=deltas, others={})


def every_other(denoiser: nn.Module, family: Family) -> dict[str, GroupCut]:
    return {
        group.name: GroupCut(units=group.units, kept=tuple(range(0, group.units, 2)))
        for group in family.groups(denoiser)
    }


def weights(denoiser: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}


@pytest.mark.parametrize(
    "name", ["sd3", "sd35", "sd15", "flux", "chroma", "flux2", "pixart", "auraflow", "lumina2", "zimage"]
)
def test_merged_then_cut_is_cut_then_merged(build_denoiser: Callable[..., nn.Module], name: str) -> None:
    dense = build_denoiser(name)
    family = family_of(dense)
    manifest = PrunedManifest(family=family.name, sparsity="structured:0.5", groups=every_other(dense, family))
    lora = lora_of(dense, family)
    first = copy.deepcopy(dense)
    adapters.merge(first, lora, PrunedManifest(family=family.name, sparsity="dense"))
    shrink(first, family, manifest.keep)
    then = copy.deepcopy(dense)
    shrink(then, family, manifest.keep)
    adapters.merge(then, adapters.cut(lora, dense, family, manifest), manifest)
    for key, tensor in weights(then).items():
        torch.testing.assert_close(tensor, weights(first)[key], rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["sd3", "sd15", "flux"])
def test_channels_that_moved_take_their_part_along(build_denoiser: Callable[..., nn.Module], name: str) -> None:
    dense = build_denoiser(name)
    family = family_of(dense)
    generator = torch.Generator().manual_seed(3)
    orders = {}
    for group in family.groups(dense):
        blocks = [torch.randperm(group.width, generator=generator) + group.width * unit for unit in range(group.units)]
        order = torch.cat(blocks) if group.width > 1 else torch.randperm(group.units, generator=generator)
        orders[group.name] = tuple(order.tolist())
    manifest = PrunedManifest(family=family.name, sparsity="2:4", orders=orders)
    lora = lora_of(dense, family)
    moved = adapters.cut(lora, dense, family, manifest)
    rows, columns = adapters.places(dense, family, manifest)
    assert rows
    assert columns
    for layer, delta in moved.deltas.items():
        n, k = dense.get_parameter(f"{layer}.weight").shape
        expected = lora.deltas[layer].product()
        expected = expected[rows.get(layer, torch.arange(n))][:, columns.get(layer, torch.arange(k))]
        torch.testing.assert_close(delta.product(), expected)
    for group in family.groups(dense):
        order = torch.tensor(orders[group.name])
        for producer in group.producers:
            if producer.name in moved.deltas and producer.free and producer.parts == 1:
                assert torch.equal(moved.deltas[producer.name].up, lora.deltas[producer.name].up[order])
            elif producer.name in moved.deltas and not producer.free:
                assert torch.equal(moved.deltas[producer.name].up, lora.deltas[producer.name].up)


def test_streamed_pruning_records_the_order_it_left(sd3_folder: Path, tmp_path: Path) -> None:
    loaded = load_pipeline(sd3_folder)
    dense = copy.deepcopy(loaded.denoiser)
    settings: dict[str, Any] = {"steps": 4, "height": 32, "width": 32, "num_samples": 4}
    settings["method_options"] = {"metric": 0}  # else weights are too unlike the dense ones to tell who moved
    pruned = verbs.prune(loaded.pipeline, sparsity="2:4", prompts=["a", "b", "c", "d"], **settings)
    moved = {name: order for name, order in pruned.orders.items() if order != tuple(range(len(order)))}
    assert len(moved) > 1
    verbs.save(pruned, tmp_path / "out")
    manifest = checkpoint.require_manifest(tmp_path / "out")
    assert manifest.orders == dict(pruned.orders), "as they were"
    rows, columns = adapters.places(dense, loaded.family, manifest)
    for name in moved:
        group = next(group for group in loaded.family.groups(dense) if group.name == name)
        reader = group.readers[0]
        now, before = (each.get_parameter(f"{reader}.weight") for each in (pruned.denoiser, dense))
        alike = torch.nn.functional.cosine_similarity
        told = alike(now.flatten(), before[:, columns[reader]].flatten(), dim=0)
        assert told > 0.6, name
        assert told > alike(now.flatten(), before.flatten(), dim=0) + 0.1, name
    assert set(rows)


def test_later_runs_are_told_from_the_dense_model_on() -> None:
    """Cut, moved, cut and moved again: the record is what the same gathers do to numbers."""
    places = torch.arange(12)
    heads = PrunedManifest(family="sd3", sparsity="x", groups={"g": GroupCut(units=4, kept=(0, 2, 3))})  # 3 wide
    order = (2, 0, 1, 3, 5, 4, 6, 7, 8)
    moved = PrunedManifest(family="sd3", sparsity="x", orders={"g": order})
    again = PrunedManifest(family="sd3", sparsity="x", groups={"g": GroupCut(units=3, kept=(1, 2))})
    total = again.after(moved.after(heads))
    expected = places.view(4, 3)[[0, 2, 3]].flatten()[list(order)].view(3, 3)[[1, 2]].flatten()
    assert total.orders["g"] == tuple(expected.tolist())
    assert total.groups["g"] == GroupCut(units=4, kept=(2, 3))
    assert PrunedManifest.model_validate(total.model_dump(mode="json")) == total


def test_neurons_that_had_moved_are_cut_under_their_own_numbers() -> None:
    moved = PrunedManifest(family="sd3", sparsity="x", orders={"f": (3, 1, 0, 2)})
    cut = PrunedManifest(family="sd3", sparsity="x", groups={"f": GroupCut(units=4, kept=(0, 2))}).after(moved)
    assert cut.orders["f"] == (3, 0)
    assert cut.groups["f"] == GroupCut(units=4, kept=(0, 3))


def test_units_that_go_and_channels_that_move_in_one_run_are_told_together() -> None:
    cut = PrunedManifest(family="sd3", sparsity="x", groups={"g": GroupCut(units=4, kept=(0, 2, 3))})  # 3 wide
    both = PrunedManifest(
        family="sd3", sparsity="x", groups={"g": GroupCut(units=3, kept=(1, 2))}, orders={"g": (4, 3, 5, 6, 8, 7)}
    )
    total = both.after(cut)
    expected = torch.arange(12).view(4, 3)[[0, 2, 3]].flatten()[list(both.orders["g"])]
    assert total.orders["g"] == tuple(expected.tolist())
    assert total.groups["g"] == GroupCut(units=4, kept=(2, 3))
    cut = PrunedManifest(family="sd3", sparsity="x", groups={"f": GroupCut(units=6, kept=(0, 1, 4, 5))})  # neurons
    both = PrunedManifest(
        family="sd3", sparsity="x", groups={"f": GroupCut(units=4, kept=(0, 2, 3))}, orders={"f": (3, 0, 2)}
    )
    assert both.after(None) == both
    assert both.after(cut).orders["f"] == (5, 0, 4)
    assert both.after(cut).groups["f"] == GroupCut(units=6, kept=(0, 4, 5))


@pytest.fixture
def pruned(sd3_folder: Path, tmp_path: Path) -> Path:
    out = tmp_path / "pruned"
    more: dict[str, Any] = {"method": "magnitude", "align": 1, "height": 32, "width": 32}
    verbs.prune_to_folder(Settings(model=str(sd3_folder), sparsity="structured:0.3+2:4", **more), out)
    return out


@pytest.fixture
def lora_file(sd3_folder: Path, tmp_path: Path) -> Path:
    denoiser = load_pipeline(sd3_folder).denoiser
    path = tmp_path / "style.safetensors"
    adapters.write(lora_of(denoiser, family_of(denoiser)), path, "transformer")
    return path


def test_a_merged_checkpoint_keeps_its_zeros(pruned: Path, lora_file: Path, tmp_path: Path) -> None:
    found = verbs.lora(pruned, lora_file, tmp_path / "merged", strength=0.5)
    before, after = (checkpoint.load(folder).transformer for folder in (pruned, tmp_path / "merged"))
    manifest = checkpoint.require_manifest(pruned)
    assert checkpoint.require_manifest(tmp_path / "merged") == manifest
    patterned = [name for name, record in manifest.linears.items() if record.zeros]
    assert found.masked == len(patterned) > 0
    assert 0 < found.cut <= found.layers
    for name in patterned:
        old, new = (each.get_parameter(f"{name}.weight") for each in (before, after))
        assert torch.equal(new == 0, old == 0), name
        assert not torch.equal(new, old), name


def test_the_cut_file_is_what_diffusers_loads(pruned: Path, lora_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "cut.safetensors"
    found = verbs.lora(pruned, lora_file, out, strength=0.5)
    assert (found.masked, found.left_out) == (0, 0)
    (tmp_path / "any file").touch()
    assert out.stat().st_mode == (tmp_path / "any file").stat().st_mode
    pipeline = verbs.load(pruned)
    expected = copy.deepcopy(pipeline.transformer)
    whole = adapters.read(lora_file, "StableDiffusion3Pipeline", "transformer")
    manifest = checkpoint.require_manifest(pruned)
    dense = _dense(expected)
    adapters.merge(
        expected,
        adapters.cut(whole, dense, family_of(dense), manifest),
        manifest.model_copy(update={"linears": {}}),
        strength=0.5,
    )
    pipeline.load_lora_weights(str(out))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(pipeline.transformer.get_parameter(name), parameter, rtol=1e-4, atol=1e-5, msg=name)


def _dense(shrunk: Any) -> nn.Module:
    with torch.device("meta"):
        dense: nn.Module = type(shrunk).from_config(shrunk.config)
    return dense


def test_kohyas_layout_and_alphas_are_understood(build_denoiser: Callable[..., nn.Module], tmp_path: Path) -> None:
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    n, k = build_denoiser("sd15").get_parameter(f"{block}.weight").shape
    key = f"lora_unet_{block.replace('.', '_')}"
    state = {
        f"{key}.lora_down.weight": torch.ones(RANK, k),
        f"{key}.lora_up.weight": torch.ones(n, RANK),
        f"{key}.alpha": torch.tensor(1.5),
    }
    save_file(state, tmp_path / "kohya.safetensors")
    found = adapters.read(tmp_path / "kohya.safetensors", "StableDiffusionPipeline", "unet")
    assert list(found.deltas) == [block]
    torch.testing.assert_close(found.deltas[block].product(), torch.full((n, k), RANK * 1.5 / RANK))


@pytest.mark.parametrize("pipeline_class", ["FluxPipeline", "ChromaPipeline"])
def test_a_lora_of_fused_layers_is_written_part_by_part(pipeline_class: str, tmp_path: Path) -> None:
    """kohya's of FLUX.1, whose width diffusers knows: queries, keys and values share the matrix that reads."""
    key, width = "lora_unet_double_blocks_0_img_attn_qkv", 3072
    state = {
        f"{key}.lora_down.weight": torch.ones(1, width),
        f"{key}.lora_up.weight": torch.arange(3.0 * width)[:, None],
        f"{key}.alpha": torch.tensor(1.0),
    }
    save_file(state, tmp_path / "kohya.safetensors")
    adapters.write(
        adapters.read(tmp_path / "kohya.safetensors", pipeline_class, "transformer"),
        tmp_path / "out.safetensors",
        "transformer",
    )
    found = adapters.read(tmp_path / "out.safetensors", pipeline_class, "transformer")
    parts = [found.deltas[f"transformer_blocks.0.attn.to_{part}"].product()[:, 0] for part in "qkv"]
    assert torch.equal(torch.cat(parts), torch.arange(3.0 * width))


def test_what_peft_records_of_the_scale_counts(pruned: Path, sd3_folder: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(sd3_folder).pipeline
    pipeline.transformer.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_out.0"]))
    layers = get_peft_model_state_dict(pipeline.transformer)
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path, layers, **_collate_lora_metadata({"transformer": pipeline.transformer})
    )
    file = tmp_path / "pytorch_lora_weights.safetensors"
    found = adapters.read(file, "StableDiffusion3Pipeline", "transformer")
    assert {delta.scale for delta in found.deltas.values()} == {3.0}
    assert verbs.lora(pruned, file, tmp_path / "out.safetensors").layers == len(found.deltas)


def _without_half(state: dict[str, Tensor]) -> None:
    del state[next(name for name in state if "lora_A" in name)]


def _dora(state: dict[str, Tensor]) -> None:
    state["transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector"] = torch.ones(2)


def _of_another_width(state: dict[str, Tensor]) -> None:
    name = next(name for name in state if "lora_A" in name)
    state[name] = torch.ones(RANK, 5)


def _of_another_network(state: dict[str, Tensor]) -> None:
    for name in list(state):
        state[name.replace("transformer.", "unet.", 1)] = state.pop(name)


def _as_peft_names_it(state: dict[str, Tensor]) -> None:
    for name in list(state):
        state[name.replace("transformer.", "base_model.model.", 1)] = state.pop(name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_as_peft_names_it, r"base_model.model. is PEFT's own; save it with save_lora_weights\(\)"),
        (_without_half, "has only one of the two matrices"),
        (_dora, "is no plain LoRA's"),
        (_of_another_width, "is for another model: for its .* this one has a layer of"),
        (_of_another_network, "it holds no LoRA of a transformer"),
    ],
)
def test_what_is_no_lora_of_this_model_is_named(
    pruned: Path, lora_file: Path, tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    state = load_file(lora_file)
    damage(state)
    save_file(state, lora_file)
    with pytest.raises(ModelError, match=message):
        verbs.lora(pruned, lora_file, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_names_that_diffusers_does_not_know_are_not_all_told(tmp_path: Path) -> None:
    state = {f"lora_unet_block_{index}.lora_down.weight": torch.ones(1, 2) for index in range(50)}
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(ModelError, match=r"cannot be read as a LoRA: .*block_") as found:
        adapters.read(tmp_path / "odd.safetensors", "ChromaPipeline", "transformer")
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 400


def test_wrong_arguments_are_answered_plainly(pruned: Path, lora_file: Path, sd3_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no such file; download the LoRA"):
        verbs.lora(pruned, tmp_path / "none.safetensors", tmp_path / "out.safetensors")
    with pytest.raises(ConfigError, match="exists; choose another name"):
        verbs.lora(pruned, lora_file, lora_file)
    with pytest.raises(BundleError, match="is it a pruned checkpoint"):
        verbs.lora(sd3_folder, lora_file, tmp_path / "out.safetensors")
    with pytest.raises(ConfigError, match=r"--second .*: one denoiser takes all steps of this model"):
        verbs.lora(pruned, lora_file, tmp_path / "out.safetensors", second=lora_file)
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"x" * 99)
    with pytest.raises(ModelError, match="cannot be read as a LoRA"):
        verbs.lora(pruned, garbage, tmp_path / "out.safetensors")


def test_tensors_for_text_encoders_pass_through_a_file_and_are_counted(
    pruned: Path, lora_file: Path, tmp_path: Path
) -> None:
    state = load_file(lora_file) | {"text_encoder.x.lora_A.weight": torch.ones(RANK, 2)}
    save_file(state, lora_file)
    verbs.lora(pruned, lora_file, tmp_path / "out.safetensors")
    assert "text_encoder.x.lora_A.weight" in load_file(tmp_path / "out.safetensors")
    assert verbs.lora(pruned, lora_file, tmp_path / "merged").left_out == 1


def test_a_pipeline_is_as_it_was_where_nothing_is_added(pruned: Path, lora_file: Path, tmp_path: Path) -> None:
    verbs.lora(pruned, lora_file, tmp_path / "merged", strength=0.0)
    before, after = (checkpoint.load(folder).transformer for folder in (pruned, tmp_path / "merged"))
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert isinstance(verbs.load(tmp_path / "merged"), DiffusionPipeline)
