"""The fidelity ladder: a point that promises the front too little is not evaluated to the end.

Rungs: 0 cost arithmetic (infeasible points), 1 a cheap proxy (KL divergence to dense), 2 and more a share of the
documents, the last one all of them. See docs/fidelity.md.
"""

from dse.search.multi_fidelity.early_stopping import EarlyStopping as EarlyStopping
from dse.search.multi_fidelity.early_stopping import Stop as Stop
from dse.search.multi_fidelity.established import Established as Established
from dse.search.multi_fidelity.fidelity_session import MultiFidelitySession as MultiFidelitySession
from dse.search.multi_fidelity.resume_stopped import most_promising as most_promising
from dse.search.multi_fidelity.resume_stopped import resume_stopped_trials as resume_stopped_trials
from dse.search.multi_fidelity.stopped_trials import TELL as TELL
from dse.search.multi_fidelity.stopped_trials import told as told
