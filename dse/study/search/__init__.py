"""What proposes points beside the sampler, who proposes next, and what each earned; docs/search.md teaches it."""

from dse.study.search.candidate import Candidate as Candidate
from dse.study.search.forecast import LatencyForecast as LatencyForecast
from dse.study.search.origins import OriginShare as OriginShare
from dse.study.search.origins import origin_shares as origin_shares
from dse.study.search.session import SearchSession as SearchSession
