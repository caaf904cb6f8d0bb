"""Low-rank decomposition: methods, calibration, the factor bank, low-rank modules, and reversible surgery."""

from dse.decomposition.calibration_text import BUILTIN_TEXTS as BUILTIN_TEXTS
from dse.decomposition.calibration_text import CalibrationWindows as CalibrationWindows
from dse.decomposition.calibration_text import calibration_windows as calibration_windows
from dse.decomposition.calibration_text import held_out_windows as held_out_windows
from dse.decomposition.calibration_text import longest_window as longest_window
from dse.decomposition.calibration_text import named_calibration as named_calibration
from dse.decomposition.factor_bank import FactorBank as FactorBank
from dse.decomposition.factor_bank import RankRequests as RankRequests
from dse.decomposition.factor_bank import requests_of_points as requests_of_points
from dse.decomposition.fisher_svd import fisher_svd as fisher_svd
from dse.decomposition.gradient_gram import GradientGrams as GradientGrams
from dse.decomposition.gram import iterate_grams as iterate_grams
from dse.decomposition.low_rank import LowRankFactors as LowRankFactors
from dse.decomposition.low_rank import LowRankLinear as LowRankLinear
from dse.decomposition.methods import METHODS as METHODS
from dse.decomposition.methods import Method as Method
from dse.decomposition.methods import factorise as factorise
from dse.decomposition.stacked import SharedProduct as SharedProduct
from dse.decomposition.stacked import StackedLinear as StackedLinear
from dse.decomposition.surgery import AppliedPoint as AppliedPoint
from dse.decomposition.surgery import apply_point as apply_point
from dse.decomposition.surgery import decompose as decompose
from dse.decomposition.truncated_svd import truncated_svd as truncated_svd
from dse.decomposition.tucker import tucker as tucker
from dse.decomposition.tucker import tucker_merged as tucker_merged
from dse.decomposition.whitened_svd import whitened_svd as whitened_svd
