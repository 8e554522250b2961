"""Positions of grids among text."""

import numpy as np

from metal_models.multimodal.rope_grid import Grid, grid_positions


def test_text_alone_counts_up() -> None:
    positions, delta = grid_positions(3, [])
    assert positions.tolist() == [[0, 1, 2]] * 3
    assert delta == 0


def test_a_grid_starts_after_the_text_and_the_text_goes_on_beyond_it() -> None:
    positions, delta = grid_positions(9, [Grid(2, 1, 2, 3)])
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert delta == -3


def test_time_steps_are_cut_to_integers() -> None:
    positions, delta = grid_positions(4, [Grid(0, 3, 1, 1, time_step=1.5)])
    assert positions.tolist() == [[0, 1, 3, 4], [0, 0, 0, 4], [0, 0, 0, 4]]
    assert delta == 1


def test_grids_follow_each_other() -> None:
    positions, _ = grid_positions(4, [Grid(0, 1, 1, 2), Grid(2, 1, 2, 1)])
    assert positions.tolist() == [[0, 0, 2, 2], [0, 0, 2, 3], [0, 1, 2, 2]]
    assert positions.dtype == np.int32
