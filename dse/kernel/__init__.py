"""The kernel for decode steps on a CPU: products of few rows by large weights, and attention over a cache."""

from dse.kernel.attend import attend, can_attend
from dse.kernel.chains import FEW_ROWS, ChainMatrix, KernelChains
from dse.kernel.library import KERNEL_VARIABLE, NO_KERNEL, has_kernel, kernel_name, kernel_problem

__all__ = [
    "FEW_ROWS",
    "KERNEL_VARIABLE",
    "NO_KERNEL",
    "ChainMatrix",
    "KernelChains",
    "attend",
    "can_attend",
    "has_kernel",
    "kernel_name",
    "kernel_problem",
]
