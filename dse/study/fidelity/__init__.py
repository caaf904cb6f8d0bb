"""The fidelity ladder: a point that promises the front too little is not evaluated to the end.

Rungs: 0 cost arithmetic (infeasible points), 1 a cheap proxy (KL divergence to dense), 2 and more a share of the
documents, the last one all of them. See docs/fidelity.md.
"""

from dse.study.fidelity.climb import Climber as Climber
from dse.study.fidelity.climb import climb as climb
from dse.study.fidelity.established import Established as Established
from dse.study.fidelity.final import FinalEvaluator as FinalEvaluator
from dse.study.fidelity.final import final_pending as final_pending
from dse.study.fidelity.final import reevaluate_front as reevaluate_front
from dse.study.fidelity.final import with_final_values as with_final_values
from dse.study.fidelity.judge import Judge as Judge
from dse.study.fidelity.judge import Stop as Stop
from dse.study.fidelity.second_look import look_again as look_again
from dse.study.fidelity.second_look import most_promising as most_promising
from dse.study.fidelity.session import LadderSession as LadderSession
from dse.study.fidelity.telling import TELL as TELL
from dse.study.fidelity.telling import told as told
