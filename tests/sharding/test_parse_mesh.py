"""A mesh as it is written on the command line."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import AxisType

from csm_jax.sharding import parse_mesh

pytestmark = pytest.mark.skipif(
    len(jax.devices()) != 8,
    reason="needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8",
)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("data=4,tensor=2", {"data": 4, "tensor": 2}),
        (" tensor = 2 , data = 4 ", {"tensor": 2, "data": 4}),
        ("data=8", {"data": 8}),
        ("tensor=8,data=1", {"tensor": 8, "data": 1}),
    ],
)
def test_meshes(text: str, shape: dict[str, int]) -> None:
    mesh = parse_mesh(text)
    assert list(mesh.shape.items()) == list(shape.items())
    assert set(mesh.axis_types) == {AxisType.Explicit}
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no axis ''; the axes are data, tensor"),
        ("model=8", "no axis 'model'; the axes are data, tensor"),
        ("data=4,", "no axis ''"),
        ("8", "no axis '8'"),
        ("data", "size of 'data' must be a whole number of 1 or more, got ''"),
        ("data=x", "got 'x'"),
        ("data=0,tensor=8", "got '0'"),
        ("data=-8", "got '-8'"),
        ("data=²", "got '²'"),
        ("data=4=2", "got '4=2'"),
        ("data=2,data=4", "names the axis 'data' twice"),
        ("data=4", "takes 4 devices, but there are 8"),
        ("data=4,tensor=4", "takes 16 devices, but there are 8"),
        ("data=" + "9" * 5000, "takes 999,999,999 devices"),
    ],
)
def test_mistakes(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"^mesh ") as caught:
        parse_mesh(text)
    assert said in str(caught.value)
