import pytest

from obsdiff_export.ports import Port, read_ports
from obsdiff_export.profiles import profile_for, profiles_for
from obsdiff_runtime.errors import ConfigError, ExportError
from obsdiff_runtime.shapes import Range

LATENTS = Port(name="hidden_states", dtype="float16", shape=("batch", 16, "height", "width"))
TIMESTEP = Port(name="timestep", dtype="float", shape=("batch",))


def test_a_size_is_static_and_three_sizes_are_a_range():
    found = profile_for([LATENTS, TIMESTEP], {"batch": (1, 2, 8), "height": 64, "width": (32, 64, 64)})
    assert found == {
        "hidden_states": Range(min=(1, 16, 64, 32), opt=(2, 16, 64, 64), max=(8, 16, 64, 64)),
        "timestep": Range(min=(1,), opt=(2,), max=(8,)),
    }


def test_sizes_of_other_components_do_no_harm():
    assert profile_for([TIMESTEP], {"batch": 2, "height": 64}) == {"timestep": Range(min=(2,), opt=(2,), max=(2,))}


def test_a_symbol_without_a_size_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match=r"no size is given for 'width' of input hidden_states; .* batch, height"):
        profile_for([LATENTS], {"batch": 1, "height": 64})


@pytest.mark.parametrize("size", [0, (2, 1, 4), (1, 5, 4), (0, 1, 2)])
def test_sizes_out_of_order_are_refused(size):
    with pytest.raises(ConfigError, match="1 <= min <= opt <= max"):
        profile_for([TIMESTEP], {"batch": size})


def test_profiles_that_are_equal_for_these_inputs_are_one():
    tables = [{"batch": 2, "height": 32, "width": 32}, {"batch": 2, "height": 64, "width": 64}]
    assert len(profiles_for([TIMESTEP], tables)) == 1
    assert len(profiles_for([LATENTS, TIMESTEP], tables)) == 2


def test_ports_are_read_from_disk_as_the_export_told_them(exports):
    assert read_ports(exports.float16.path) == (exports.float16.inputs, exports.float16.outputs)


def test_a_file_that_is_no_graph_is_an_error(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(ExportError, match="cannot be read"):
        read_ports(path)
