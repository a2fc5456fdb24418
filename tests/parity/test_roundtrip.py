"""Checkpoints in and out through `csm_jax.weights`, judged by the programs they come from or go to.

Sesame's layout is loaded from a file of the published names; transformers' from what transformers
itself saved, and exported for transformers itself to load. Logits are compared, and every tensor with
the mapping written by hand in `inputs.to_params`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from csm_jax import config as configs
from csm_jax import weights
from csm_jax.config import CSMConfig

from . import cases, inputs
from .cases import VALUE_CASES
from .conftest import Models
from .ours import Ours
from .reference import transformers as theirs

pytestmark = pytest.mark.usefixtures("one_thread")

LOGITS = next(case for case in VALUE_CASES if case.name == "logits")


def _ours(config: CSMConfig, params: dict[str, Any]) -> Ours:
    return Ours.over(config, params, device=jax.devices("cpu")[0])


def _assert_same_tensors(params: dict[str, Any], expected: dict[str, Any]) -> None:
    mine, wanted = (
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (params, expected)
    )
    assert mine.keys() == wanted.keys()
    for path, leaf in mine.items():
        np.testing.assert_array_equal(np.asarray(leaf), wanted[path].numpy(), err_msg=path)


def test_sesame_file_gives_sesame_logits(tiny_models: Models, tmp_path: Path) -> None:
    published = tiny_models.weights("float32")
    save_file(published, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(configs.to_sesame(tiny_models.config)))

    config, params = weights.load_checkpoint(tmp_path)

    assert config == tiny_models.config
    _assert_same_tensors(params, inputs.to_params(config, published))
    reference = tiny_models.outputs(LOGITS, "sesame", "float32")
    cases.check_float32(LOGITS, LOGITS.run(_ours(config, params), config), reference)


def test_what_transformers_saved_gives_its_logits(tiny_models: Models, tmp_path: Path) -> None:
    # Its 5.x versions keep one copy of the audio table, the depth decoder's, and all of the codec.
    tiny_models.get("transformers", "float32").model.save_pretrained(tmp_path)

    config, params = weights.load_checkpoint(tmp_path)

    assert config == tiny_models.config
    _assert_same_tensors(params, inputs.to_params(config, tiny_models.weights("float32")))
    reference = tiny_models.outputs(LOGITS, "transformers", "float32")
    cases.check_float32(LOGITS, LOGITS.run(_ours(config, params), config), reference)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_our_export(tmp_path: Path, tied: bool) -> None:
    config = dataclasses.replace(configs.tiny(), tie_codebooks_embeddings=tied)
    params = inputs.to_params(config, inputs.random_weights(config, seed=3))
    if not tied:
        table = params["backbone"]["audio_embeddings"]
        generator = torch.Generator().manual_seed(4)
        params["decoder"]["audio_embeddings"] = torch.randn(table.shape, generator=generator)
    params = jax.tree.map(lambda x: jax.numpy.asarray(x.numpy()), params)

    weights.save_checkpoint(tmp_path, config, params, layout="transformers")
    # The codec is not ours to export: without one in the file, transformers makes a random one, small
    # where its sizes are written beside ours.
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    written["codec_config"] = theirs.tiny_codec(config).to_dict()
    path.write_text(json.dumps(written))
    model, loading = theirs.CsmForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )

    # With one table for both, a checkpoint may hold either copy or both.
    missing = {name for name in loading["missing_keys"] if not name.startswith("codec_model.")}
    assert not missing
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    ours = LOGITS.run(_ours(config, params), config)
    reference = theirs.TransformersReference.over(config, model)
    cases.check_float32(LOGITS, ours, LOGITS.run(reference, config))

    # And back: what was exported is what is loaded, bit for bit.
    again_config, again = weights.load_checkpoint(tmp_path)
    assert again_config == config
    _assert_same_tensors(again, jax.tree.map(lambda x: torch.from_numpy(np.array(x)), params))
