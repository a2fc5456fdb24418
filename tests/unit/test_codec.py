import jax.numpy as jnp
import numpy as np
import pytest

from csm_jax.codec import check_codes


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray, lambda x: x.astype(np.int64).tolist()])
def test_check_codes_returns_int32(make):
    codes = np.arange(12, dtype=np.int32).reshape(3, 4)
    out = check_codes(make(codes), num_codebooks=4, codebook_size=12)
    assert out.dtype == np.int32
    np.testing.assert_array_equal(out, codes)


def test_check_codes_accepts_no_frames():
    assert check_codes(np.zeros((0, 4), np.int32), num_codebooks=4, codebook_size=12).shape == (
        0,
        4,
    )


@pytest.mark.parametrize(
    ("codes", "error", "match"),
    [
        (np.zeros((3, 4), np.float32), TypeError, "integers, got float32"),
        (np.zeros((3, 5), np.int32), ValueError, r"shape \[frames, 4\], got \[3, 5\]$"),
        (np.zeros((4, 7), np.int32), ValueError, "last axis, so transpose"),
        (np.zeros((1, 3, 4), np.int32), ValueError, "shape"),
        (np.array([[0, 1, 2, 3], [0, 12, 0, -1]]), ValueError, r"2 codes.*0\.\.11.*\(12\).*1.*1"),
    ],
)
def test_check_codes_refuses(codes, error, match):
    with pytest.raises(error, match=match):
        check_codes(codes, num_codebooks=4, codebook_size=12)
