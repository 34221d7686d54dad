import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxloom.core.padding import axis_pieces, check_padding_mode
from voxloom.errors import ModeError


@given(
    st.integers(1, 7),
    st.integers(0, 20),
    st.integers(0, 20),
    st.sampled_from(["edge", "reflect", "symmetric", "wrap", "constant"]),
    st.data(),
)
def test_pieces_put_together_are_what_numpy_pads(size, before, after, mode, data):
    values = np.arange(1, size + 1)
    padded = np.pad(values, (before, after), mode=mode)
    start = data.draw(st.integers(-before, size + after - 1))
    stop = data.draw(st.integers(start + 1, size + after))
    result = np.zeros(stop - start, dtype=int)
    for piece in axis_pieces(start, stop, size, mode):
        run = values[piece.source]
        assert len(run) in (1, piece.target.stop - piece.target.start)
        result[piece.target] = run[:: piece.step or 1]
    np.testing.assert_array_equal(result, padded[start + before : stop + before])


@pytest.mark.parametrize("mode", ["empty", "mirror", True, None, [0]])
def test_an_unknown_padding_mode_is_refused_with_the_known_ones(mode):
    with pytest.raises(ModeError, match="it must be a number or one of 'constant', 'minimum'"):
        check_padding_mode(mode, 0)


def test_a_fill_that_would_not_be_used_is_refused():
    assert check_padding_mode("constant", 5) == 5.0
    assert check_padding_mode(-3, 0) == -3.0
    with pytest.raises(ModeError, match="only padding_mode='constant' uses"):
        check_padding_mode("edge", 5)
