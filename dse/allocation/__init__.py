"""Which option of each unit to take under a budget: values and arithmetic, neither torch nor a model.

A `DamageTable` says what each way of treating each unit (an attention or an MLP block of one layer) saves and what it
costs in damage; `allocate` finds the best combination by an exact integer programme, `budget_ladder` a whole ladder.
"""

from dse.allocation.constraints import Constraints as Constraints
from dse.allocation.curves import CurveAllocation as CurveAllocation
from dse.allocation.curves import allocate_curves as allocate_curves
from dse.allocation.option import Option as Option
from dse.allocation.option import Unit as Unit
from dse.allocation.programme import Allocation as Allocation
from dse.allocation.programme import allocate as allocate
from dse.allocation.programme import budget_ladder as budget_ladder
from dse.allocation.table import DamageTable as DamageTable
from dse.allocation.table import TableOrigin as TableOrigin
