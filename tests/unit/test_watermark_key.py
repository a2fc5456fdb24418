import numpy as np
import pytest

from csm_jax.watermark_key import DEFAULT_KEY, check_key, parse_key


def test_default_key_is_the_published_one():
    assert check_key(DEFAULT_KEY) == (212, 211, 146, 56, 201)


def test_check_key_accepts_any_integers():
    assert check_key(np.array([0, 255, 1, 2, 3])) == (0, 255, 1, 2, 3)


@pytest.mark.parametrize("key", [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 256], [-1] * 5])
def test_check_key_refuses_values(key):
    with pytest.raises(ValueError, match=r"5 integers in 0\.\.255, got"):
        check_key(key)


@pytest.mark.parametrize("key", ["12345", 5, None, [1.0, 2, 3, 4, 5], [True, 1, 2, 3, 4]])
def test_check_key_refuses_types(key):
    with pytest.raises(TypeError, match=r"5 integers in 0\.\.255, got"):
        check_key(key)


@pytest.mark.parametrize("text", ["1,2,3,4,5", "1 2 3 4 5", " 1, 2,3 4,5 "])
def test_parse_key(text):
    assert parse_key(text) == (1, 2, 3, 4, 5)


@pytest.mark.parametrize("text", ["", "1,2,3,4", "a,b,c,d,e", "1,2,3,4,500"])
def test_parse_key_refuses(text):
    with pytest.raises(ValueError, match=r"5 numbers in 0\.\.255 such as '212,211,146,56,201'"):
        parse_key(text)
