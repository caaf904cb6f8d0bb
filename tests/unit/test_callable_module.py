from __future__ import annotations

import dse
from dse.cost import cost as function
from dse.topology import DecomposableTensor, Topology


def test_cost_is_a_module_and_a_call() -> None:
    import dse.cost as module

    tensor = DecomposableTensor("layers.0.up", "up", 0, "up", 4, 4)
    topology = Topology("X", "x", 1, (tensor,), parameters_dense=16, is_decoder=False)
    assert module is dse.cost
    assert dse.cost(topology, dse.DesignPoint.dense()) == function(topology, dse.DesignPoint.dense())
    assert module.break_even_rank(4, 4) == 2


def test_export_is_a_package_and_a_call() -> None:
    import dse.export as package

    assert package is dse.export
    assert callable(dse.export)
    assert package.export.__module__ == "dse.export.study_export"
