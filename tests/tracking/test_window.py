import time

import pytest
import torch

from selfsight.tracking.window import Clock, Window


def test_means_of_scalars_and_sums_of_counts():
    window = Window()
    for value in (1.0, 2.0, 6.0):
        window.add({"a": torch.tensor(value), "counts": torch.tensor([1.0, value])})
    window.add({"b": torch.tensor(5.0)})
    means, sums = window.reduce()
    assert means == {"a": 3.0, "b": 5.0}
    assert sums["counts"].tolist() == [3.0, 9.0]
    window.add({"a": torch.tensor(4.0)})
    assert window.reduce()[0] == {"a": 4.0}


def test_adding_does_not_change_what_is_added():
    window, value = Window(), torch.tensor([1.0, 2.0])
    window.add({"counts": value})
    window.add({"counts": value})
    assert value.tolist() == [1.0, 2.0]


def test_pauses_do_not_count():
    clock = Clock(10)
    clock.update()
    with clock.paused():
        time.sleep(0.3)
    clock.mark_line(waited=0.0)
    assert clock.line["images_per_second"] > 10 / 0.25
    assert clock.images_per_second == pytest.approx(clock.line["images_per_second"])


def test_the_overall_rate_is_that_of_all_lines():
    clock = Clock(10)
    clock.update()
    time.sleep(0.05)
    clock.mark_line(waited=0.0)
    first = clock.line["images_per_second"]
    time.sleep(0.05)
    clock.mark_line(waited=0.0)
    assert clock.line["images_per_second"] == 0.0
    assert clock.images_per_second is not None and 0 < clock.images_per_second < 0.8 * first


def test_the_share_of_waiting_is_between_calls():
    clock = Clock(1)
    clock.update()
    time.sleep(0.05)
    clock.mark_line(waited=100.0)
    assert clock.line["data_wait"] == 1.0
    clock.update()
    time.sleep(0.05)
    clock.mark_line(waited=100.0)
    assert clock.line["data_wait"] == 0.0
