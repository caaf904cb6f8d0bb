"""Multi-fidelity evaluation: trials that promise too little hypervolume are stopped early.

Rungs: 0 is cost arithmetic (infeasible points), 1 a cheap proxy (KL divergence from the baseline), the next ones
growing shares of the documents, and the last one all documents.
"""

from dse.search.multi_fidelity.early_stopping import PROXY_RUNG as PROXY_RUNG
from dse.search.multi_fidelity.early_stopping import EarlyStopping as EarlyStopping
from dse.search.multi_fidelity.early_stopping import Stop as Stop
from dse.search.multi_fidelity.session import MultiFidelitySession as MultiFidelitySession
