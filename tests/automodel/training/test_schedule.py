"""The learning rate follows its formula at the edges and between them."""

from __future__ import annotations

import pytest

from automodel.training.schedule import ScheduleConfig, lr_ratio


def test_warm_up_grows_evenly_to_the_peak():
    config = ScheduleConfig(warmup_steps=4)
    assert [lr_ratio(step, 100, config) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(("decay", "middle"), [("cosine", 0.6), ("linear", 0.6), ("constant", 1.0)])
def test_decay_reaches_its_values(decay, middle):
    config = ScheduleConfig(warmup_steps=2, decay=decay, final_ratio=0.2)
    assert lr_ratio(2, 13, config) == 1.0
    assert lr_ratio(7, 13, config) == pytest.approx(middle)
    assert lr_ratio(12, 13, config) == pytest.approx(1.0 if decay == "constant" else 0.2)


def test_a_quarter_of_a_cosine_is_not_a_line():
    cosine, linear = (lr_ratio(25, 101, ScheduleConfig(decay=d, final_ratio=0.0)) for d in ("cosine", "linear"))
    assert cosine == pytest.approx(0.853553, rel=1e-5)
    assert linear == pytest.approx(0.75)


def test_the_rate_stays_at_its_end_after_the_last_step():
    assert lr_ratio(500, 100, ScheduleConfig(final_ratio=0.1)) == pytest.approx(0.1)
