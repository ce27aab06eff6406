"""Four bits: the levels, the bytes and the scales are bitsandbytes', installed or not; errors and their limits."""

import math

import pytest
import torch

from lora_edu.nf4 import (
    DOUBLE_BLOCK,
    DYNAMIC_CODE,
    FP4_CODE,
    INT4_CODE,
    NF4_CODE,
    dequantize_nf4,
    normal_float_code,
    quantize_nf4,
    relative_error,
    rounded_to_code,
    rounded_to_int,
)


def known_weight():
    """Numbers that every machine computes alike, in blocks of growing size: (10, 128)."""
    n = torch.arange(1280)
    return ((n * 37 % 101 - 50).float() / 64 * (n // 64 + 3)).view(10, 128)


# What bitsandbytes 0.50.2 makes of them in blocks of 64, on a CPU.
PACKED_START = (
    "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c1"
    "6d18e3b04c17e29f3b05d17e2af4c06d18e2a04c16e29f3b05d17e29f3c05d18"
)
CODES = [0, 7, 15, 22, 30, 37, 45, 52, 59, 81, 164, 195, 202, 210, 217, 225, 232, 240, 247, 255]
SCALES_SCALE, OFFSET = 7.432031631469727, 9.755468368530273
ROW = [2.3759665489196777, -7.03125, -1.2991881370544434, 3.9559009075164795, -4.895105838775635, 0.0]
ROW_DOUBLE = [2.39202618598938, -7.078775882720947, -1.3079696893692017, 3.982639789581299, -4.928192615509033, 0.0]


def test_levels_are_the_published_ones():
    assert torch.allclose(normal_float_code(), NF4_CODE, rtol=0, atol=1e-7)
    assert len(NF4_CODE) == 16
    assert 0 in NF4_CODE


def test_the_papers_equation_taken_literally_has_no_finite_scale():
    """Eq. 4: q_i = (Q(i / 17) + Q((i + 1) / 17)) / 2 for i = 0 … 16 − 1 or 16: the first quantile is −∞."""
    levels = torch.special.ndtri(torch.arange(17, dtype=torch.float64) / 17)
    literal = (levels[:-1] + levels[1:]) / 2
    assert literal[0] == -math.inf


def test_levels_of_other_widths():
    for bits in (2, 3, 5, 8):
        code = normal_float_code(bits)
        assert len(code) == 2**bits
        assert code[0] == -1
        assert code[-1] == 1
        assert 0 in code
    with pytest.raises(ValueError, match="bits=1: expected 2 to 8"):
        normal_float_code(1)


def test_bytes_scales_and_numbers_are_as_bitsandbytes_left_them():
    state = quantize_nf4(known_weight())
    assert bytes(state.packed[:64].tolist()).hex() == PACKED_START
    assert torch.equal(state.absmax, known_weight().view(-1, 64).abs().amax(1))
    assert dequantize_nf4(state)[3, :6].tolist() == ROW
    double = quantize_nf4(known_weight(), double_quant=True)
    assert torch.equal(double.packed, state.packed)
    assert double.absmax.tolist() == CODES
    assert (double.absmax_scales.item(), double.absmax_offset.item()) == (SCALES_SCALE, OFFSET)
    assert dequantize_nf4(double)[3, :6].tolist() == ROW_DOUBLE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 128), (7, 9), (5, 33), (96, 64), (130, 256)], ids=str)
@pytest.mark.parametrize("block_size", [32, 64])
def test_equal_to_bitsandbytes_bit_for_bit(shape, dtype, block_size):
    theirs = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(0.03).to(dtype)
    weight[0] = 0  # a block without a scale
    packed, their_state = theirs.quantize_4bit(weight, quant_type="nf4", blocksize=block_size)
    state = quantize_nf4(weight, block_size)
    assert torch.equal(state.packed, packed.flatten())
    assert torch.equal(state.absmax, their_state.absmax)
    numbers = dequantize_nf4(state)
    assert numbers.dtype == dtype
    assert torch.equal(numbers, theirs.dequantize_4bit(packed, their_state))


def test_double_quantisation_is_bitsandbytes_up_to_its_choice_among_near_levels():
    """Their CPU code does not always take the nearest level for a scale; what a code stands for is the same."""
    theirs = pytest.importorskip("bitsandbytes").functional
    assert torch.equal(theirs.create_dynamic_map(), DYNAMIC_CODE)
    weight = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0))
    packed, their_state = theirs.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
    state = quantize_nf4(weight, double_quant=True)
    assert torch.equal(state.packed, packed.flatten())
    assert torch.equal(state.absmax_scales, their_state.state2.absmax)
    assert state.absmax_offset == their_state.offset
    assert (state.absmax != their_state.absmax).double().mean() < 0.005
    exact = quantize_nf4(weight).absmax
    their_scales = theirs.dequantize_blockwise(their_state.absmax, their_state.state2) + their_state.offset
    assert ((state.scales() - exact).abs() <= (their_scales - exact).abs()).all()
    state.absmax.copy_(their_state.absmax)
    assert torch.equal(dequantize_nf4(state), theirs.dequantize_4bit(packed, their_state))


def test_fp4_is_bitsandbytes():
    theirs = pytest.importorskip("bitsandbytes").functional
    assert torch.equal(theirs.get_4bit_type("fp4", "cpu").unique(), FP4_CODE)


def test_bits_are_counted():
    weight = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(0))
    assert quantize_nf4(weight).bits_per_parameter == 4 + 32 / 64
    double = 4 + 8 / 64 + 32 / (64 * DOUBLE_BLOCK)
    assert math.isclose(quantize_nf4(weight, double_quant=True).bits_per_parameter, double, rel_tol=1e-5)
    assert round(double, 3) == 4.127
    assert quantize_nf4(weight, block_size=32).bits_per_parameter == 5


def test_a_second_time_loses_nothing():
    """Each block's largest value is a level, so its scale comes back, and the others are levels already."""
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    once = dequantize_nf4(quantize_nf4(weight))
    assert torch.equal(dequantize_nf4(quantize_nf4(once)), once)


def test_errors_on_normal_and_on_uniform_weights():
    """NF4 is made for normal weights: on uniform ones equal steps are better."""
    generator = torch.Generator().manual_seed(0)
    normal, uniform = torch.randn(512, 512, generator=generator), torch.rand(512, 512, generator=generator) - 0.5
    errors = {
        (name, kind): relative_error(weight, rounded_to_code(weight, code))
        for kind, weight in (("normal", normal), ("uniform", uniform))
        for name, code in (("nf4", NF4_CODE), ("int4", INT4_CODE), ("fp4", FP4_CODE))
    }
    assert round(errors["nf4", "normal"], 3) == 0.092
    assert round(errors["int4", "normal"], 3) == 0.108
    assert round(errors["fp4", "normal"], 3) == 0.122
    assert errors["int4", "uniform"] < errors["nf4", "uniform"]
    assert relative_error(normal, dequantize_nf4(quantize_nf4(normal))) == errors["nf4", "normal"]
    assert round(relative_error(normal, rounded_to_int(normal)), 3) == 0.09  # with a second number a block: a tie


def test_integers_with_offset():
    weight = torch.tensor([[0.0, 1, 2, 3, 15, 7.4]])
    assert rounded_to_int(weight, 4, 6).tolist() == [[0, 1, 2, 3, 15, 7]]
    assert torch.equal(rounded_to_int(torch.full((3, 5), 0.7)), torch.full((3, 5), 0.7))  # no step, no division
    steps = torch.tensor([1.0, 2, 3, 4]).repeat(9)  # four equal steps come back from two bits, a short last block too
    assert torch.equal(rounded_to_int(steps, 2, 7), steps)


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 127])
def test_any_number_of_weights(size):
    weight = torch.randn(size, generator=torch.Generator().manual_seed(size))
    for state in (quantize_nf4(weight), quantize_nf4(weight, 7, double_quant=True)):
        numbers = dequantize_nf4(state)
        assert numbers.shape == weight.shape
        assert len(state.packed) == -(-size // 2)
        assert relative_error(weight, numbers) < 0.2


def test_float64_and_other_precisions_on_the_way_back():
    weight = torch.randn(8, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state = quantize_nf4(weight)
    assert dequantize_nf4(state).dtype == torch.float64
    assert torch.equal(dequantize_nf4(state, torch.float32), dequantize_nf4(state).float())
    half = quantize_nf4(weight.bfloat16())
    assert torch.equal(dequantize_nf4(half, torch.float32), dequantize_nf4(half).float())  # rounded as it is stored


def test_other_levels():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for code in (normal_float_code(2), INT4_CODE, FP4_CODE):
        assert torch.equal(dequantize_nf4(quantize_nf4(weight, code=code)), rounded_to_code(weight, code))


@pytest.mark.errors
@pytest.mark.parametrize(
    ("weight", "settings", "error", "words"),
    [
        ([1.0], {}, TypeError, "the weight holds list"),
        (torch.ones(3, dtype=torch.int8), {}, TypeError, "the weight holds torch.int8"),
        (torch.ones(2, 2, device="meta"), {}, ValueError, "on the meta device"),
        (torch.ones(0, 2), {}, ValueError, r"shape \(0, 2\) is empty"),
        (torch.tensor([1.0, math.nan]), {}, ValueError, "infinite or NaN"),
        (torch.tensor([1.0, math.inf]), {}, ValueError, "infinite or NaN"),
        (torch.ones(4), {"block_size": 0}, ValueError, "block_size=0: expected a whole number of at least 1"),
        (torch.ones(4), {"block_size": 2.5}, ValueError, r"block_size=2\.5"),
        (torch.ones(4), {"block_size": True}, ValueError, "block_size=True"),
        (torch.ones(4), {"code": torch.ones(16)}, ValueError, "rising levels within"),
        (torch.ones(4), {"code": torch.linspace(-1, 1, 17)}, ValueError, "expected 2 to 16 rising levels"),
        (torch.ones(4), {"code": torch.linspace(-2, 1, 16)}, ValueError, "rising levels within"),
    ],
    ids=str,
)
def test_bad_input(weight, settings, error, words):
    with pytest.raises(error, match=words):
        quantize_nf4(weight, **settings)
