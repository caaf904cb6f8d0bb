"""Design-space exploration of low-rank decomposition for Hugging Face language models.

```python
import dse

loaded = dse.load_model("demo:smollm2-135m-instruct")
point = dse.DesignPoint.uniform(loaded.topology, "svd", rank=64, layers=[24, 25], roles=["up", "down"])
bank = dse.FactorBank.build(loaded, [point])
print(dse.point_cost(loaded.topology, point).reduction)
with dse.decompose(loaded, point, bank):
    ...  # here loaded.model is the decomposed model; afterwards its weights are bit-identical to before
```

Names are loaded on first use, so `import dse` itself is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dse.cost import point_cost as point_cost
    from dse.decomposition import FactorBank as FactorBank
    from dse.decomposition import calibration_windows as calibration_windows
    from dse.decomposition import decompose as decompose
    from dse.design_point import DesignPoint as DesignPoint
    from dse.design_point import TensorChoice as TensorChoice
    from dse.models import LoadedModel as LoadedModel
    from dse.models import load_model as load_model
    from dse.models import load_topology as load_topology
    from dse.search.spaces.base import SearchSpace as SearchSpace
    from dse.standalone import export_trials as export_trials
    from dse.study import Study as Study
    from dse.study import open_study as open_study
    from dse.study import run_study as run_study

__version__ = "0.1.0"

_DEFINING_MODULE = {
    "DesignPoint": "dse.design_point",
    "FactorBank": "dse.decomposition",
    "LoadedModel": "dse.models",
    "SearchSpace": "dse.search.spaces.base",
    "Study": "dse.study",
    "TensorChoice": "dse.design_point",
    "calibration_windows": "dse.decomposition",
    "decompose": "dse.decomposition",
    "export_trials": "dse.standalone",
    "load_model": "dse.models",
    "load_topology": "dse.models",
    "open_study": "dse.study",
    "point_cost": "dse.cost",
    "run_study": "dse.study",
}

__all__ = [
    "DesignPoint",
    "FactorBank",
    "LoadedModel",
    "SearchSpace",
    "Study",
    "TensorChoice",
    "__version__",
    "calibration_windows",
    "decompose",
    "export_trials",
    "load_model",
    "load_topology",
    "open_study",
    "point_cost",
    "run_study",
]


def __getattr__(name: str) -> object:
    if name not in _DEFINING_MODULE:
        raise AttributeError(f"module 'dse' has no attribute '{name}'; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(_DEFINING_MODULE[name]), name)


def __dir__() -> list[str]:
    return __all__
