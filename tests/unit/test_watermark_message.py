import numpy as np
import pytest

from csm_jax.watermark import message

KEY = (1, 35, 69, 103, 255)
PERIOD = 21


def scores_of(symbols, *, margin=2.0):
    return margin * np.eye(5, dtype=np.float32)[np.asarray(symbols)]


def test_symbols_are_the_keys_bits_from_the_highest_and_an_end():
    symbols = message.symbols((0b00_01_10_11, 0, 255, 0, 0), 0, 21)
    assert symbols.tolist() == [1, 2, 3, 4] + [1] * 4 + [4] * 4 + [1] * 8 + [0]
    assert symbols.dtype == np.int32


def test_symbols_repeat_and_may_start_anywhere():
    whole = message.symbols(KEY, 0, 100)
    np.testing.assert_array_equal(whole[:21], whole[21:42])
    np.testing.assert_array_equal(message.symbols(KEY, 17, 30), whole[17:47])


@pytest.mark.parametrize("start", [0, 1, 13, 20])
def test_a_key_is_read_wherever_the_message_begins(start):
    reading = message.read(scores_of(message.symbols(KEY, start, 3 * PERIOD + 5)), PERIOD)
    assert reading == message.Reading(KEY, 1.0, 2.0)


def test_the_majority_of_the_periods_wins():
    symbols = message.symbols(KEY, 0, 3 * PERIOD)
    symbols[3] = (symbols[3] + 1) % 5
    reading = message.read(scores_of(symbols), PERIOD)
    assert reading.key == KEY
    assert reading.agreement == pytest.approx(1 - 1 / (3 * PERIOD))
    assert reading.clarity == pytest.approx(2 * reading.agreement)


@pytest.mark.parametrize("symbols", [[0] * 21, [1] * 21, [1, 0] * 10 + [1]])
def test_messages_without_exactly_one_end_are_no_key(symbols):
    assert message.read(scores_of(symbols), PERIOD) == message.Reading(None, 1.0, 2.0)


@pytest.mark.parametrize("scores", [np.zeros((20, 5)), np.full((42, 5), np.nan), np.zeros((0, 5))])
def test_nothing_is_read_from_too_little_or_from_nan(scores):
    assert message.read(scores.astype(np.float32), PERIOD) == message.NOTHING
