"""The layout grammar, its arithmetic and its errors."""

import pytest

from lightning_par.errors import LayoutError
from lightning_par.layout import EXAMPLES, Layout, looks_like_layout, nearest_layouts, parse_layout


@pytest.mark.parametrize(
    ("word", "layout"),
    [
        ("single", Layout(dp=1)),
        ("tp2", Layout(tp=2)),
        ("tp2_pp3_dp5_zero1_mb7", Layout(tp=2, pp=3, dp=5, zero=1, microbatches=7)),
        ("zero3_dp4", Layout(dp=4, zero=3)),
        ("pp4_mb16", Layout(pp=4, microbatches=16)),
    ],
)
def test_words_are_read_in_any_order(word: str, layout: Layout) -> None:
    assert parse_layout(word) == layout
    assert parse_layout("_".join(reversed(word.split("_")))) == layout


@pytest.mark.parametrize("word", EXAMPLES)
def test_every_example_is_a_layout_and_prints_as_it_was_typed(word: str) -> None:
    assert str(parse_layout(word)) == word


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "tp4_xx2",
            r"parallel=tp4_xx2: unknown token 'xx2'; a layout is 'single', 'auto' or tokens .* tpN, ppN, .* Did you mean tp4",
        ),
        ("tp", "unknown token 'tp'"),
        ("", "unknown token ''"),
        ("single_tp2", "unknown token 'single'"),
        ("tp2_tp4", r"parallel=tp2_tp4: 'tp' is given twice \(tp2 and tp4\): keep one of them"),
        ("tp0", "parallel=tp0: tp0: tensor-parallel size must be an integer of at least 1"),
        ("mb0_pp2", "mb0: microbatches per batch must be an integer of at least 1"),
        ("dp2_zero4", "parallel=dp2_zero4: zero4: the ZeRO stage must be 0, 1, 2 or 3"),
    ],
)
def test_words_that_cannot_be_read(word: str, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        parse_layout(word)


def test_typing_errors_are_told_from_other_words() -> None:
    assert looks_like_layout("tp4_xx2")
    assert not looks_like_layout("my_cluster")


@pytest.mark.parametrize("devices", [1, 2, 3, 6, 7, 12])
def test_dp_is_what_is_left_of_the_devices(devices: int) -> None:
    assert parse_layout("zero1").resolve(devices) == Layout(dp=devices, zero=1)
    assert parse_layout("tp3_pp2").resolve(6 * devices).dp == devices
    fixed = Layout(tp=devices, dp=2)
    assert fixed.resolve(2 * devices) is fixed


@pytest.mark.parametrize(
    ("layout", "devices", "message"),
    [
        (
            Layout(tp=4, pp=2),
            6,
            r"parallel=tp4_pp2 needs a multiple of 8 processes \(tp 4 x pp 2\), the trainer has 6 ",
        ),
        (Layout(dp=3), 1, r"parallel=dp3 needs 3 processes \(tp 1 x pp 1 x dp 3\), the trainer has 1 process: use .*devices=3"),
        (Layout(tp=2), 5, "use parallel=dp5 or parallel=tp5 or devices=4|use parallel=tp5 or parallel=dp5 or devices=4"),
    ],
)
def test_degrees_that_do_not_fit_the_devices(layout: Layout, devices: int, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        layout.resolve(devices)


def test_the_error_quotes_the_word_as_it_was_typed() -> None:
    with pytest.raises(LayoutError, match="parallel=pp2_tp4 needs"):
        parse_layout("pp2_tp4").resolve(6, typed="pp2_tp4")


@pytest.mark.parametrize("devices", [1, 4, 6, 7, 16])
def test_nearest_layouts_use_every_device_and_keep_the_rest(devices: int) -> None:
    wanted = Layout(tp=4, pp=2, zero=1, microbatches=8)
    for near in nearest_layouts(wanted, devices):
        assert near.resolve(devices) == near
        assert (near.zero, near.microbatches) == (1, 8)


def test_a_layout_that_fits_is_its_own_nearest() -> None:
    assert nearest_layouts(Layout(tp=2, pp=3, dp=2), 12)[0] == Layout(tp=2, pp=3, dp=2)


@pytest.mark.parametrize("layout", [Layout(dp=1), Layout(tp=2, pp=3, dp=5), Layout(tp=3, dp=2), Layout(pp=4, dp=2)])
def test_ranks_and_coordinates_are_one_to_one(layout: Layout) -> None:
    coordinates = [layout.coordinate_of(rank) for rank in range(layout.world_size)]
    assert len(set(coordinates)) == layout.world_size
    assert [layout.rank_of(at.pp, at.dp, at.tp) for at in coordinates] == list(range(layout.world_size))
    assert all(at.pp < layout.pp and at.dp < (layout.dp or 1) and at.tp < layout.tp for at in coordinates)


def test_tensor_peers_are_neighbours() -> None:
    layout = Layout(tp=2, pp=2, dp=2)
    assert [str(layout.coordinate_of(rank)) for rank in (0, 1, 2, 4)] == [
        "pp 0, dp 0, tp 0",
        "pp 0, dp 0, tp 1",
        "pp 0, dp 1, tp 0",
        "pp 1, dp 0, tp 0",
    ]
