from __future__ import annotations

from dse.design_point import DesignPoint, TensorChoice
from dse.report.dashboard.rank_difference import difference_plot, rank_difference

SHAPE = {"layers": 2, "roles": ["query", "up"], "blocks": {}, "stacks": {}, "sizes": {"query": [8, 8], "up": [16, 8]}}


def test_the_difference_is_second_minus_first_in_kept_parameters() -> None:
    first = DesignPoint.of({"layers.0.query": TensorChoice("svd", 2), "layers.1.up": TensorChoice("svd", 1)})
    second = DesignPoint.of({"layers.0.query": TensorChoice("svd", 1), "layers.0.up": TensorChoice("svd", 2)})
    found = rank_difference(first, second, SHAPE)
    assert found.layers == ("0", "1")
    assert found.roles == ("query", "up")
    # 16 x rank of 64 parameters for the query, 24 x rank of 128 for up.
    assert found.kept == ((0.25 - 0.5, 0.0), (48 / 128 - 1, 1 - 24 / 128))
    assert found.words[1] == ("dense to rank 2 (svd)", "rank 1 (svd) to dense")
    assert (found.compressed, found.relaxed, found.changed) == (2, 1, 3)
    figure = difference_plot(found, "light")
    assert figure["data"][0]["z"] == [[-25.0, 0.0], [-62.5, 81.25]]


def test_a_change_of_method_alone_counts_as_different() -> None:
    first = DesignPoint.of({"layers.0.query": TensorChoice("svd", 2)})
    second = DesignPoint.of({"layers.0.query": TensorChoice("whitened_svd", 2)})
    found = rank_difference(first, second, SHAPE)
    assert (found.compressed, found.relaxed, found.changed) == (0, 0, 1)


def test_equal_points() -> None:
    point = DesignPoint.of({"layers.0.query": TensorChoice("svd", 2)})
    assert rank_difference(point, point, SHAPE).sentence == "The two points have the same ranks."
