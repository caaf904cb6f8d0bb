"""The kernel for a CPU: whole decoder layers, products of few rows by large weights, attention over a cache."""

from dse.kernel.attend import attend, can_attend
from dse.kernel.chains import FEW_ROWS, ChainMatrix, KernelChains, ManyRows
from dse.kernel.forward import KernelForward, LayerRun, runs_in_kernel
from dse.kernel.layers import (
    AttentionParts,
    CacheSlot,
    KernelLayer,
    MlpParts,
    NormParts,
    run_layers,
    takes_prompt,
    takes_step,
)
from dse.kernel.library import KERNEL_VARIABLE, NO_KERNEL, has_kernel, kernel_name, kernel_problem

__all__ = [
    "FEW_ROWS",
    "KERNEL_VARIABLE",
    "NO_KERNEL",
    "AttentionParts",
    "CacheSlot",
    "ChainMatrix",
    "KernelChains",
    "KernelForward",
    "KernelLayer",
    "LayerRun",
    "ManyRows",
    "MlpParts",
    "NormParts",
    "attend",
    "can_attend",
    "has_kernel",
    "kernel_name",
    "kernel_problem",
    "run_layers",
    "runs_in_kernel",
    "takes_prompt",
    "takes_step",
]
