import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from csm_jax.bridge import MissingDependencyError, missing_dependency
from csm_jax.bridge.arrays import to_jax, to_torch

DTYPES = [
    (jnp.float32, torch.float32),
    (jnp.bfloat16, torch.bfloat16),
    (jnp.float16, torch.float16),
    (jnp.int32, torch.int32),
    (jnp.bool_, torch.bool),
]


@pytest.mark.parametrize(("ours", "theirs"), DTYPES)
def test_there_and_back(ours, theirs):
    array = jnp.arange(24).reshape(2, 3, 4).astype(ours)
    tensor = to_torch(array)
    assert tensor.dtype == theirs
    assert tuple(tensor.shape) == (2, 3, 4)
    back = to_jax(tensor)
    assert back.dtype == ours
    np.testing.assert_array_equal(np.asarray(back), np.asarray(array))


def test_to_torch_shares_memory():
    array = jnp.arange(1024, dtype=jnp.float32)
    assert to_torch(array).data_ptr() == array.unsafe_buffer_pointer()


def test_to_jax_shares_memory():
    # jax aliases host memory only when it is aligned to 64 bytes; torch aligns its own to that.
    tensor = torch.arange(1024, dtype=torch.float32)
    assert tensor.data_ptr() % 64 == 0
    assert to_jax(tensor).unsafe_buffer_pointer() == tensor.data_ptr()


def test_to_jax_takes_views_and_gradients():
    tensor = torch.arange(12, dtype=torch.float32, requires_grad=True).reshape(3, 4).T
    np.testing.assert_array_equal(np.asarray(to_jax(tensor)), np.arange(12).reshape(3, 4).T)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_to_jax_refuses_what_jax_would_narrow(dtype):
    with pytest.raises(TypeError, match=r"use tensor\.to\(torch\.(int|float)32\)"):
        to_jax(torch.zeros(3, dtype=dtype))


def test_to_torch_refuses_sharded_arrays():
    devices = jax.devices()
    assert len(devices) >= 2
    mesh = jax.make_mesh((2,), ("x",), devices=devices[:2])
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    with pytest.raises(ValueError, match="on one device, this one is on 2;"):
        to_torch(jax.device_put(jnp.zeros(4), spec))


def test_missing_dependency_says_how_to_install():
    error = missing_dependency("moshi", "the Mimi codec")
    assert isinstance(error, MissingDependencyError)
    assert isinstance(error, ImportError)
    assert "the Mimi codec needs the Python package 'moshi'" in str(error)
    assert "pip install 'csm_jax[torch]'" in str(error)


@pytest.mark.parametrize("module", ["arrays", "mimi", "watermark", "silentcipher"])
def test_without_torch(module):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import csm_jax.bridge\n"
        f"try: import csm_jax.bridge.{module}\n"
        "except csm_jax.bridge.MissingDependencyError as error: print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "needs the Python package 'torch', which is not installed" in result.stdout


def test_everything_outside_the_bridge_works_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import csm_jax.audio, csm_jax.codec, csm_jax.prompt, csm_jax.hub, csm_jax.watermark_key\n"
        "heavy = {'soundfile', 'huggingface_hub', 'tokenizers', 'scipy', 'jax'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
