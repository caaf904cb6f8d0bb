"""The factor bank: decompose each tensor once, slice any smaller rank."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import filelock
import torch

from dse.cost import check_point, has_core
from dse.decomposition.bank_build import Lacking, fill_stores
from dse.decomposition.calibration_text import CalibrationWindows, longest_window, named_calibration
from dse.decomposition.expert_surgery import dense_experts
from dse.decomposition.factor_store import SCHEMA_VERSION, FactorStore
from dse.decomposition.factors import LowRankFactors, TuckerFactors
from dse.decomposition.layer_grams import GramSettings
from dse.decomposition.methods import METHODS
from dse.decomposition.mlp_width import ChannelFactors
from dse.decomposition.refit_cache import REFIT_VERSION, PointRefitter, RefittedFactors, is_refitted, is_refitting
from dse.decomposition.tucker import tucker_of_experts
from dse.defaults import CALIBRATION_TOKENS
from dse.design_point import WIDTH, DesignPoint, TensorChoice
from dse.errors import CalibrationError, PointError, StorageFullError
from dse.files import cache_dir, disk_errors
from dse.models import LoadedModel
from dse.progress import ProgressCallback, ignore_progress
from dse.topology import Topology

__all__ = ["FactorBank", "RankRequests", "requests_of_points"]

logger = logging.getLogger("dse")

RankRequests = Mapping[str, Mapping[str, int]]
"""Method name to tensor or stack name to the largest rank that will be requested."""


class FactorBank:
    """Factors of a model's tensors, built once per (model, method, calibration text) and kept in the user's cache.

    Truncated SVDs are nested: the best rank-r factors are the leading r columns of the best rank-R factors. So each
    tensor is decomposed once, at the largest rank that a space can request, and every smaller rank is a slice. Tucker
    decompositions of fused expert tensors are not nested: each is computed on first request, and kept.
    """

    def __init__(
        self,
        topology: Topology,
        stores: Mapping[str, FactorStore],
        refitter: PointRefitter | None = None,
        loaded: LoadedModel | None = None,
    ) -> None:
        self._topology = topology
        self._loaded = loaded
        self._stores = stores
        self._refitter = refitter

    @classmethod
    def build(
        cls,
        loaded: LoadedModel,
        requests: RankRequests | Iterable[DesignPoint],
        calibration: CalibrationWindows | str | None = None,
        *,
        folder: Path | None = None,
        settings: GramSettings | None = None,
        progress: ProgressCallback = ignore_progress,
    ) -> FactorBank:
        """Open the bank and decompose what is missing, damaged or stored at too small a rank.

        The layers are visited in order, in one pass for all methods that need the same Gram matrices: a layer's weights
        are read, its Gram matrices accumulated, its tensors decomposed and written. A build that was killed continues
        where it stopped.

        Args:
            loaded: The dense model, resident or with its weights on disk.
            requests: Largest rank per method and tensor, or the points that will be applied.
            calibration: Required by calibrated methods: windows from `calibration_windows`, or the name of a builtin
                text (general, grammar, facts, python_docs), or the path of a text file.
            folder: Where banks are stored; by default in the user's cache.
            settings: Devices that share the calibration windows, and memory for hidden states and Gram matrices.
            progress: Called as ("calibrate", tokens, tokens), ("gradients", tokens, tokens) and ("decompose", tensors,
                tensors).

        Raises:
            CalibrationError: A calibrated method is requested without calibration text.
            PointError: The model is not dense.
            StorageFullError: The disk has no room for the bank.
        """
        if isinstance(calibration, str):
            calibration = named_calibration(
                loaded.tokenizer, calibration, tokens=CALIBRATION_TOKENS, longest_window=longest_window(loaded.model)
            )
        wanted = requests if isinstance(requests, Mapping) else requests_of_points(requests)
        root = folder or cache_dir() / "factor_banks"
        ranks = _by_stored_method(wanted)
        stores = {method: _store(root, loaded, method, calibration) for method in ranks}
        with ExitStack() as locks:
            lacking = []
            for method, store in sorted(stores.items(), key=lambda entry: entry[1].folder):
                with disk_errors(store.folder):
                    store.folder.mkdir(parents=True, exist_ok=True)
                locks.enter_context(filelock.FileLock(store.folder / ".lock"))
                store.open(ranks[method])
                matrices = {n: rank for n, rank in ranks[method].items() if n not in loaded.topology.experts_by_name}
                missing = {name: rank for name, rank in matrices.items() if store.rank(name) < rank}
                if missing:
                    _check_room(store.folder, loaded.topology, method, missing)
                    lacking.append(Lacking(store, method, missing))
            fill_stores(lacking, loaded, calibration, settings or GramSettings(), progress)
        of_method = {method: stores[METHODS[method].refit_of or method] for method in wanted}
        return cls(loaded.topology, of_method, PointRefitter(loaded, calibration, progress), loaded)

    @staticmethod
    def stored_bytes(topology: Topology, method: str, ranks: Mapping[str, int]) -> int:
        """Bytes on disk of the factors of these matrices or MLPs, float32, at these ranks."""
        if method == WIDTH:
            mlps = [topology.mlp(name) for name in ranks]
            return sum(4 * mlp.channels * (mlp.channels + mlp.output.out_features + 4) for mlp in mlps)
        sizes = [4 * rank * sum(topology.matrix(name).shape) for name, rank in ranks.items()]
        return sum(sizes) + (sum(4 * rank**2 for rank in ranks.values()) if has_core(method) else 0)

    def of_point(self, point: DesignPoint) -> FactorBank | RefittedFactors:
        """The source of this point's factors: the bank itself, or a refit if one of its methods refits.

        A refit runs on the resident model, which must be dense. The most recent refits are kept on disk.

        Raises:
            PointError: The bank was not built for this point, or the point decomposes experts, which a refit does not
                support.
            NonFiniteError: The decomposed model's activations are not finite.
        """
        if self._refitter is None or not is_refitted(point):
            return self
        method = next(choice.method for _, choice in point if is_refitting(choice))
        if experts := [name for name, _ in point if name in self._topology.experts_by_name]:
            raise PointError(
                f"a point with fused expert tensors must decompose its matrices without a refit, but '{experts[0]}'"
                f" goes with '{method}'; use '{METHODS[method].refit_of}'"
            )
        if method not in self._stores:
            raise PointError(f"this factor bank must hold '{method}' for point {point.id}; build the bank for it")
        return self._refitter.refit(point, self.factors, self.channels, self._stores[method].folder / REFIT_VERSION)

    def factors(self, name: str, choice: TensorChoice) -> LowRankFactors:
        """Factors of one tensor, sliced from the bank; float32 on the CPU.

        For a method that refits, these are the factors that it starts from.

        Raises:
            PointError: The bank was not built for this tensor, method or rank.
        """
        store = self._stores.get(choice.method)
        built = 0 if store is None else store.rank(name)
        if store is None or built < choice.rank:
            raise PointError(
                f"`rank <= {built}` must hold for '{name}' by '{choice.method}' in this factor bank, but got"
                f" rank={choice.rank}; build the bank for it"
            )
        return store.get(name, choice.rank)

    def channels(self, name: str) -> ChannelFactors:
        """The ordered channels of one MLP, from which every width of it is computed; on the CPU.

        Raises:
            PointError: The bank was not built for this MLP.
        """
        store = self._stores.get(WIDTH)
        if store is None or not store.rank(name):
            raise PointError(f"this factor bank must hold the channels of '{name}'; build the bank for its width")
        return store.get_channels(name)

    def expert_factors(self, name: str, choice: TensorChoice) -> TuckerFactors:
        """Factors of a fused expert tensor at exactly these ranks, read from disk or computed now; float32 on the CPU.

        Raises:
            PointError: The bank was not built for this method, the choice does not fit, or the factors must be computed
                while the experts are not dense.
            NonFiniteError: The weight holds NaN or infinity.
            StorageFullError: The disk has no room.
        """
        check_point(self._topology, DesignPoint.of({name: choice}))
        store = self._stores.get(choice.method)
        if store is None or self._loaded is None:
            raise PointError(f"this factor bank must hold '{choice.method}' for '{name}'; build the bank for it")
        tensor = self._topology.experts_by_name[name]
        ranks = tensor.ranks(choice.rank, choice.expert_rank)
        with filelock.FileLock(store.folder / ".lock"):
            store.open(())
            if (known := store.get_experts(name, ranks)) is not None:
                return known
            factors = tucker_of_experts(dense_experts(self._loaded.model, tensor), ranks).to("cpu", torch.float32)
            store.put_experts(name, factors)
        return factors

    def identity(self, point: DesignPoint) -> str:
        """Model, method and calibration text of each method of the point; "" for a point without factors."""
        methods = sorted({choice.method for _, choice in point if not choice.is_removal})
        names = [self._stores[method].folder.name for method in methods]
        return " ".join([*names, REFIT_VERSION] if is_refitted(point) else names)

    @property
    def folders(self) -> Mapping[str, Path]:
        """Method to the folder of its factors."""
        return {method: store.folder for method, store in self._stores.items()}


def requests_of_points(points: Iterable[DesignPoint]) -> dict[str, dict[str, int]]:
    """The largest rank per method and tensor over these points."""
    ranks: dict[str, dict[str, int]] = {}
    for point in points:
        for name, choice in point:
            if choice.is_removal:
                continue
            of_method = ranks.setdefault(choice.method, {})
            of_method[name] = max(choice.rank, of_method.get(name, 0))
    return ranks


def _by_stored_method(requests: RankRequests) -> dict[str, dict[str, int]]:
    """The largest ranks by the method under which factors are stored: a refit starts from those of another method."""
    ranks: dict[str, dict[str, int]] = {}
    for method, of_method in requests.items():
        held = ranks.setdefault(METHODS[method].refit_of or method, {})
        held |= {name: max(rank, held.get(name, 0)) for name, rank in of_method.items()}
    return ranks


def _store(root: Path, loaded: LoadedModel, method: str, calibration: CalibrationWindows | None) -> FactorStore:
    identity = {"model": loaded.fingerprint, "method": method, "calibration": ""}
    if METHODS[method].is_calibrated:
        if calibration is None:
            raise CalibrationError(
                f"method '{method}' needs calibration text, but none was given; set `calibration.sources`"
            )
        identity["calibration"] = calibration.fingerprint
    key = hashlib.sha256("|".join((str(SCHEMA_VERSION), *identity.values())).encode()).hexdigest()[:16]
    return FactorStore(root / f"{method}-{key}", identity)


def _check_room(folder: Path, topology: Topology, method: str, ranks: Mapping[str, int]) -> None:
    needed = FactorBank.stored_bytes(topology, method, ranks)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageFullError(
            f"the factor bank needs {needed / 1e6:.0f} MB in {folder}, but the disk has {free / 1e6:.0f} MB free; free"
            " some, or set DSE_CACHE to a folder on another disk"
        )
