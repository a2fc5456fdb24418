"""What transformers itself makes of the exports."""

from __future__ import annotations

import pytest
import torch

from csm_jax.config import to_transformers
from csm_jax.weights import convert, tables
from tests.support.checkpoints import run, small


def tiny_mimi() -> dict[str, object]:
    return {
        "model_type": "mimi", "hidden_size": 16, "num_filters": 2, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 16,
        "codebook_size": 8, "codebook_dim": 8, "num_quantizers": 32,
        "vector_quantization_hidden_dimension": 8, "upsample_groups": 16,
    }  # fmt: skip


# Each choice twice, and each pair of choices at least once.
@pytest.mark.parametrize(
    ("dtype", "tied", "shard_bytes"),
    [
        ("float32", True, convert.SHARD_BYTES),
        ("float32", False, 40_000),
        ("bfloat16", True, 40_000),
        ("bfloat16", False, convert.SHARD_BYTES),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_the_export(tmp_path, monkeypatch, tied, shard_bytes, dtype):
    """Its own save, through another layout and back, gives it the same logits and the same codec."""
    from transformers import CsmConfig, CsmForConditionalGeneration

    monkeypatch.setattr(convert, "SHARD_BYTES", shard_bytes)
    data = {**to_transformers(small(tied=tied)), "codec_config": tiny_mimi()}
    torch.manual_seed(0)
    original = CsmForConditionalGeneration(CsmConfig(**data)).to(getattr(torch, dtype)).eval()
    if not tied:
        table = original.depth_decoder.model.embed_tokens.weight
        torch.nn.init.normal_(table)
        assert table is not original.backbone_model.embed_tokens.embed_audio_tokens.weight
    original.save_pretrained(tmp_path / "hf")
    run(tmp_path / "hf", tmp_path / "a", "sesame" if tied else "orbax")
    run(tmp_path / "a", tmp_path / "b", "transformers")
    assert (tmp_path / "b" / tables.TRANSFORMERS_INDEX_NAME).exists() == (shard_bytes == 40_000)
    loaded, report = CsmForConditionalGeneration.from_pretrained(
        tmp_path / "b", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.dtype == original.dtype
    state, expected = loaded.state_dict(), original.state_dict()
    assert set(state) == set(expected)
    # (NaN-free, so plain equality is bit equality here.)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    tokens = torch.randint(0, 8, (2, 5, 32))
    codes = torch.randint(0, 8, (6, 32))
    hidden = torch.randn(6, 24, dtype=original.dtype)
    with torch.no_grad():
        for ours, theirs in (
            (loaded(input_ids=tokens), original(input_ids=tokens)),
            (
                loaded.depth_decoder(input_ids=codes, backbone_last_hidden_state=hidden),
                original.depth_decoder(input_ids=codes, backbone_last_hidden_state=hidden),
            ),
        ):
            assert torch.equal(ours.logits, theirs.logits)
