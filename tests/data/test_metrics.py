"""Text metrics against values computed by hand."""

import math

import pytest
import torch

from fastvar.data import Reading, mean_interval, normalised_edit_distance, wilson_interval, word_accuracy
from fastvar.data.metrics import diversity, edit_distance, edit_similarity, ratio_interval


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("12", "", 2), ("12", "12", 0), ("12", "13", 1), ("12", "21", 2), ("123", "23", 1)]
    + [("kitten", "sitting", 3), ("saturday", "sunday", 3)],
)
def test_edit_distance(first, second, distance):
    assert edit_distance(first, second) == edit_distance(second, first) == distance


def test_edit_similarity():
    assert edit_similarity("", "") == 1
    assert edit_similarity("", "12") == 0
    assert edit_similarity("kitten", "sitting") == pytest.approx(4 / 7)


def test_word_accuracy_and_ned():
    read, texts = ["12", "13", "", "123"], ["12", "12", "45", "12"]
    assert word_accuracy(read, texts) == 0.25
    # 1, 1/2, 0 and 2/3
    assert normalised_edit_distance(read, texts) == pytest.approx((1 + 0.5 + 0 + 2 / 3) / 4)
    reading = Reading("12", torch.zeros(2, 4), torch.ones(2), 1.0)
    assert word_accuracy([reading], ["12"]) == normalised_edit_distance([reading], ["12"]) == 1


@pytest.mark.parametrize("function", [word_accuracy, normalised_edit_distance])
@pytest.mark.parametrize(("read", "texts"), [([], []), (["1"], ["1", "2"])])
def test_errors(function, read, texts):
    with pytest.raises(ValueError, match=f"{function.__name__}: readings: expected as many as texts, at least 1, got"):
        function(read, texts)


def test_wilson_interval():
    # 5 of 10: centre 1/2, half width z / (1 + z^2/10) * sqrt(1/40 + z^2/400) = 0.26341.
    low, high = wilson_interval(5, 10)
    assert (low, high) == pytest.approx((0.236593, 0.763407), abs=1e-6)
    # 10 of 10: 1 / (1 + z^2/10).
    assert wilson_interval(10, 10) == pytest.approx((0.722467, 1.0), abs=1e-6)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    for successes, trials in ((1, 0), (-1, 3), (4, 3)):
        with pytest.raises(ValueError, match="wilson_interval: successes"):
            wilson_interval(successes, trials)


def test_mean_interval():
    # Mean 2.5, standard deviation sqrt(5/3), n = 4.
    half = 1.959963984540054 * math.sqrt(5 / 3) / 2
    assert mean_interval([1, 2, 3, 4]) == pytest.approx((2.5 - half, 2.5 + half))
    with pytest.raises(ValueError, match="mean_interval: values: expected at least 2, got 1"):
        mean_interval([1.0])


def test_diversity():
    """The mean over the pairs of a group: of three images two are equal, and the third differs from them by one."""
    images = torch.tensor([0.0, 0.0, 1.0, 0.5, 0.5, 0.5])[:, None, None, None].expand(6, 3, 2, 2)
    assert diversity(images, 3) == pytest.approx([2 / 3, 0])
    with pytest.raises(ValueError, match=r"diversity: images: expected groups of 4 \(at least 2\), got 6 images"):
        diversity(images, 4)


def test_ratio_interval():
    """The delta method: the spread of part - ratio * whole, over the mean whole."""
    parts, wholes = [2, 1, 2, 0], [3, 2, 4, 1]
    ratio = 5 / 10
    rest = [2 - 1.5, 1 - 1, 2 - 2, 0 - 0.5]
    deviation = math.sqrt(sum(value**2 for value in rest) / 3)  # their mean is 0
    half = 1.959963984540054 * deviation / math.sqrt(4) / (10 / 4)
    assert ratio_interval(parts, wholes) == pytest.approx((ratio - half, ratio + half))
    assert ratio_interval([1, 2], [2, 4]) == (0.5, 0.5)  # all alike
    ones = [0.2, 0.5, 0.9]
    assert ratio_interval(ones, [1, 1, 1]) == pytest.approx(mean_interval(ones))
    for bad in (([1], [1]), ([1, 2], [1]), ([0, 0], [0, 0])):
        with pytest.raises(ValueError, match="ratio_interval: wholes: expected as many as parts"):
            ratio_interval(*bad)
