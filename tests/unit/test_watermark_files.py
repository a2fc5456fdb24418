import shutil

import numpy as np
import pytest
import torch

from csm_jax.watermark import files
from tests.support import silentcipher as support


@pytest.fixture(scope="module")
def readable_dir(tmp_path_factory):
    return support.write_readable(tmp_path_factory.mktemp("silentcipher") / "readable")


@pytest.fixture
def copy(readable_dir, tmp_path):
    return shutil.copytree(readable_dir, tmp_path / "copy")


def edit(copy, old, new):
    text = (copy / "hparams.yaml").read_text()
    assert old in text
    (copy / "hparams.yaml").write_text(text.replace(old, new))


def test_sizes_and_weights_are_those_of_the_files(readable_dir):
    sizes, weights = files.load(readable_dir)
    assert sizes == files.Sizes(
        sample_rate=8000, n_fft=512, band=128, message_len=21, num_symbols=5
    )
    assert (sizes.hop, sizes.bins) == (256, 257)
    assert [x.weight.shape for x in weights.encoder] == [(64, 1, 3, 3)] + [(64, 32, 3, 3)] * 2
    assert [x.weight.shape for x in weights.marker] == (
        [(192, 34, 3, 3)] + [(192, 96, 3, 3)] * 2 + [(2, 96, 1, 1)]
    )
    assert len(weights.reader) == 10
    state = torch.load(readable_dir / "dec_m_0.ckpt")
    layer = weights.reader[9]
    np.testing.assert_array_equal(layer.weight[:5], state["module.main.19.conv.weight"])
    np.testing.assert_array_equal(layer.weight[5:], state["module.main.19.gate.weight"])
    np.testing.assert_array_equal(layer.scale, state["module.main.19.bn.weight"])
    assert all(x.weight.dtype == np.float32 for x in weights.marker)


def test_copies_of_carrier_and_message_are_summed(copy):
    state = torch.load(copy / "dec_c.ckpt")
    weight = torch.randn(96, 96, 3, 3)
    state["module.main.0.gate.weight"] = weight
    torch.save(state, copy / "dec_c.ckpt")
    gate = files.load(copy)[1].marker[0].weight[96:]
    np.testing.assert_array_equal(gate[:, :32], weight[:, :32])
    np.testing.assert_allclose(gate[:, 32], weight[:, 32:64].sum(1), atol=1e-5)
    np.testing.assert_allclose(gate[:, 33], weight[:, 64:].sum(1), atol=1e-5)


def test_names_need_no_prefix_and_half_precision_is_widened(copy, readable_dir):
    state = torch.load(copy / "enc_c.ckpt")
    plain = {
        name.removeprefix("module."): x.half() if x.is_floating_point() else x
        for name, x in state.items()
    }
    torch.save(plain, copy / "enc_c.ckpt")
    ours, theirs = files.load(copy)[1].encoder[0], files.load(readable_dir)[1].encoder[0]
    assert ours.weight.dtype == np.float32
    np.testing.assert_array_equal(ours.weight, theirs.weight)


def test_missing_files_are_all_named(copy, tmp_path):
    (copy / "enc_c.ckpt").unlink()
    (copy / "hparams.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"hparams\.yaml, enc_c\.ckpt$"):
        files.load(copy)
    with pytest.raises(FileNotFoundError, match="no directory of watermark files"):
        files.load(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 10, 2000, -1, -100])
def test_truncated_checkpoint(copy, keep):
    data = (copy / "dec_c.ckpt").read_bytes()
    (copy / "dec_c.ckpt").write_bytes(data[:keep])
    with pytest.raises(ValueError, match=r"dec_c\.ckpt is damaged or not a checkpoint"):
        files.load(copy)


def test_flipped_bits_are_noticed(copy):
    data = bytearray((copy / "dec_c.ckpt").read_bytes())
    data[len(data) // 2] ^= 0x10
    (copy / "dec_c.ckpt").write_bytes(data)
    with pytest.raises(ValueError, match=r"dec_c\.ckpt is damaged"):
        files.load(copy)


def test_hostile_checkpoint_runs_nothing(copy, tmp_path):
    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    torch.save({"module.main.0.conv.weight": Hostile()}, copy / "enc_c.ckpt")
    with pytest.raises(ValueError, match=r"enc_c\.ckpt is damaged or not a checkpoint"):
        files.load(copy)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {"a": {"b": torch.zeros(1)}}])
def test_other_contents_are_no_checkpoint(copy, content):
    torch.save(content, copy / "enc_c.ckpt")
    with pytest.raises(ValueError, match=r"enc_c\.ckpt is damaged or not a checkpoint"):
        files.load(copy)


def test_wrong_tensors_are_all_listed(copy):
    state = torch.load(copy / "enc_c.ckpt")
    del state["module.linear.bias"]
    state["module.main.1.conv.bias"] = torch.zeros(3)
    state["module.main.0.conv.bias"] = torch.zeros(32, dtype=torch.int64)
    state["module.main.2.gate.weight"].fill_(torch.nan)
    state["module.other"] = torch.zeros(1)
    torch.save(state, copy / "enc_c.ckpt")
    other = torch.load(copy / "dec_m_0.ckpt")
    other["module.linear.weight"] = torch.zeros(2, 128)
    torch.save(other, copy / "dec_m_0.ckpt")
    with pytest.raises(ValueError, match="does not hold silentcipher") as info:
        files.load(copy)
    for problem in (
        "enc_c.ckpt: linear.bias is missing",
        "enc_c.ckpt: main.1.conv.bias has shape [3], expected [32]",
        "enc_c.ckpt: main.0.conv.bias is missing",
        "enc_c.ckpt: main.2.gate.weight holds NaN",
        "enc_c.ckpt: other is not part of it",
        "dec_m_0.ckpt: linear.weight has shape [2, 128], expected [1, 128]",
    ):
        assert problem in str(info.value)


def test_another_networks_file(copy):
    shutil.copy(copy / "enc_c.ckpt", copy / "dec_m_0.ckpt")
    with pytest.raises(ValueError, match=r"dec_m_0.ckpt: main.1.conv.weight has shape"):
        files.load(copy)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("message_len: 21", "message_len: 20", "message_len is 20, expected 21"),
        ("n_messages: 1", "n_messages: true", "n_messages is True, expected 1"),
        ("n_messages: 1\n", "", "n_messages is None, expected 1"),
        ("no_normalization: false", "no_normalization: 0", "no_normalization is 0"),
        ("HOP_LENGTH: 256", "HOP_LENGTH: 128", "N_FFT=512 is not twice HOP_LENGTH=128"),
        ("SR: 8000", "SR: fast", "SR is 'fast'"),
        ("SR: 8000", "SR: [", "SR is '\\['"),
        ("SR: 8000", "SR: 8000.5", "SR is '8000.5'"),
        ("SR: 8000", "SR: true", "SR is True"),
        ("SR: 8000", "SR: 8000\nSR: 9000", "SR is there twice"),
        ("SR: 8000", "SR 8000", r"line \d+ is not 'name: value': 'SR 8000'"),
        ("message_band_size: 128", "message_band_size: 900", "exceeds the bins"),
    ],
)
def test_other_models_are_refused(copy, old, new, match):
    edit(copy, old, new)
    with pytest.raises(ValueError, match=match):
        files.load(copy)


def test_settings_of_the_training_do_not_matter(copy, readable_dir):
    edit(
        copy,
        "SR: 8000",
        "# rates\n---\nSR:   8000  # hertz\r\n\nbatch_size: 7 # SR: 1\ndatasets:\n  - SR: 3\n- x\n"
        "name: 'a: b #c'\nempty:",
    )
    assert files.load(copy)[0] == files.load(readable_dir)[0]


def test_settings_that_are_no_text(copy):
    (copy / "hparams.yaml").write_bytes(b"\xff\xfe\x00SR: 8000")
    with pytest.raises(ValueError, match="not a text of settings"):
        files.load(copy)
    (copy / "hparams.yaml").write_bytes(b"#" * (1 << 21))
    with pytest.raises(ValueError, match="too large"):
        files.load(copy)
