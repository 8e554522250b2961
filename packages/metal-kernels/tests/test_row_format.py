import pytest

from metal_kernels import MetalKernelsError, RowFormat


@pytest.mark.parametrize(
    ("key", "value", "bits"),
    [("int8", "int8", 8), ("fp8_e4m3", "int4", 6), ("int4", "int4", 4), ("bfloat16", "int8", 12)],
)
def test_a_row_is_its_elements_and_a_few_scales(key, value, bits):
    row = RowFormat(8, 128, key, value)
    elements = 2 * 8 * 128 * bits // 8
    assert row.part_ends[1] * 4 == elements
    assert elements <= row.row_bytes <= 1.26 * elements
    assert row.row_bytes % 16 == 0


def test_the_layout_of_a_row_in_words():
    row = RowFormat(2, 64, "int8", "int4")
    assert row.part_ends == (32, 32 + 16, 48 + 2, 50 + 4)
    assert (row.content_words, row.row_words) == (54, 56)
    assert RowFormat(2, 64, "int8", "int4", padded_bytes=240).row_words == 60


def test_groups_of_four_bits_divide_the_head():
    sizes = {64: 32, 80: 16, 96: 32, 72: 8, 256: 32}
    assert {size: RowFormat(1, size, "int4", "int4").group_size("int4") for size in sizes} == sizes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RowFormat(2, 60, "int8", "int8"), "multiple of 8, got 2 of 60"),
        (lambda: RowFormat(0, 64, "int8", "int8"), "at least one head"),
        (lambda: RowFormat(2, 64, "int8", "int8", padded_bytes=256), "at least 272, got 256"),
    ],
)
def test_what_cannot_be_stored_is_refused(make, message):
    with pytest.raises(MetalKernelsError, match=message):
        make()
