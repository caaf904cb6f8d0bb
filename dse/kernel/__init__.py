"""The kernel for decode steps on a CPU: products of few rows by large weights, and attention over a cache."""

from dse.kernel.attend import attend, can_attend
from dse.kernel.chains import FEW_ROWS, ChainMatrix, KernelChains
from dse.kernel.layers import AttentionParts, CacheSlot, KernelLayer, MlpParts, NormParts, run_layers, takes_step
from dse.kernel.library import KERNEL_VARIABLE, NO_KERNEL, has_kernel, kernel_name, kernel_problem

__all__ = [
    "FEW_ROWS",
    "KERNEL_VARIABLE",
    "NO_KERNEL",
    "AttentionParts",
    "CacheSlot",
    "ChainMatrix",
    "KernelChains",
    "KernelLayer",
    "MlpParts",
    "NormParts",
    "attend",
    "can_attend",
    "has_kernel",
    "kernel_name",
    "kernel_problem",
    "run_layers",
    "takes_step",
]
