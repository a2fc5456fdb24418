"""Directories that Sesame's own `Model.save_pretrained` writes, as fine-tuning forks of it do."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors.numpy import load_file

from csm_jax import config as config_module
from csm_jax import weights
from csm_jax.weights.tables import flatten
from tests.support.checkpoints import assert_same_bits, run, sesame_shapes, small, tensors_of

CONFIG = small()


@dataclasses.dataclass
class ModelArgs:
    backbone_flavor: str
    decoder_flavor: str
    text_vocab_size: int
    audio_vocab_size: int
    audio_num_codebooks: int


class Model(torch.nn.Module, PyTorchModelHubMixin, pipeline_tag="text-to-speech"):
    """A model with the parameters of Sesame's, by name and shape, and nothing else."""

    def __init__(self, config: ModelArgs):
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(0)
        for name, shape in sesame_shapes(CONFIG).items():
            *parents, leaf = name.split(".")
            module = self
            for parent in parents:
                if not hasattr(module, parent):
                    module.add_module(parent, torch.nn.Module())
                module = getattr(module, parent)
            module.register_parameter(
                leaf, torch.nn.Parameter(torch.randn(shape, generator=generator))
            )


@pytest.fixture
def saved(tmp_path, monkeypatch):
    # Its config.json names its sizes: these names mean small ones here.
    monkeypatch.setitem(config_module.FLAVORS, "llama-1B", CONFIG.backbone)
    monkeypatch.setitem(config_module.FLAVORS, "llama-100M", CONFIG.decoder)
    model = Model(
        ModelArgs("llama-1B", "llama-100M", CONFIG.text_vocab_size, CONFIG.audio_vocab_size, 32)
    )
    model.save_pretrained(tmp_path / "fork")
    return tmp_path / "fork", model


def test_the_directory_is_read_as_it_is(saved):
    directory, model = saved
    assert {file.name for file in directory.iterdir()} == {
        "README.md", "config.json", "model.safetensors",
    }  # fmt: skip
    assert json.loads((directory / "config.json").read_text()).keys() == {
        "audio_num_codebooks", "audio_vocab_size", "backbone_flavor", "decoder_flavor",
        "text_vocab_size",
    }  # fmt: skip
    config, params = weights.load_checkpoint(directory)
    assert config == CONFIG
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert np.array_equal(params["decoder"]["audio_head"], state["audio_head"].swapaxes(-1, -2))
    assert np.array_equal(
        flatten(params)["backbone.layers.2.mlp.w_down"], state["backbone.layers.2.mlp.w2.weight"]
    )
    assert sum(leaf.size for leaf in flatten(params).values()) == sum(
        array.size for array in state.values()
    )


def test_it_comes_back_as_it_was(saved, tmp_path):
    directory, _ = saved
    run(directory, tmp_path / "hf", "transformers")
    run(tmp_path / "hf", tmp_path / "back", "sesame")
    assert_same_bits(tensors_of(tmp_path / "back"), load_file(directory / "model.safetensors"))
    ours, theirs = (
        json.loads((path / "config.json").read_text()) for path in (tmp_path / "back", directory)
    )
    assert ours == theirs


def test_the_model_reads_what_we_write(saved, tmp_path):
    directory, model = saved
    config, params = weights.load_checkpoint(directory)
    weights.save_checkpoint(tmp_path / "ours", config, params, layout="sesame")
    torch.nn.init.zeros_(model.audio_head)
    again = Model.from_pretrained(tmp_path / "ours")
    assert again.config == model.config
    assert_same_bits(
        {name: tensor.numpy() for name, tensor in again.state_dict().items()},
        load_file(directory / "model.safetensors"),
    )
