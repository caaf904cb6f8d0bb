"""Settings of a sensitivity profile: methods, tensors and ranks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass

from dse.cost import has_core
from dse.decomposition import METHODS, RankRequests
from dse.design_point import METHOD_NAMES, PIVOTED, WIDTH
from dse.errors import ConfigError
from dse.model_parts import DecomposableTensor, Matrix, Mlp
from dse.sensitivity.layer_blocks import Block, blocks_of_topology
from dse.sensitivity.sensitivity_curves import profiled_limit
from dse.topology import Topology

__all__ = ["DEFAULT_PROFILE_TOKENS", "PROFILE_WINDOW", "ProfileSettings"]

DEFAULT_PROFILE_TOKENS = 512
PROFILE_WINDOW = 128
"""Tokens per window. Shorter windows mean more of them, hence a better estimate of the standard error."""


@dataclass(frozen=True)
class ProfileSettings:
    """Which tensors, methods and ranks to measure.

    A kept fraction is factor parameters / dense parameters.

    Attributes:
        methods: Decomposition methods; all are measured, and an allocation may mix them.
        names: Names of tensors; None for all inside the layers.
        multiple: Ranks are multiples of this.
        tensor_kept_fraction: Kept fraction at which single tensors are measured.
        block_kept_fractions: Kept fractions at which whole blocks are measured.
        table_kept_fractions: Kept fractions of the table's options, measured or interpolated.
        with_stacks: Whether stacks of tensors with the same input are measured too; this takes about twice as long.
        with_removals: Whether the removal of blocks is measured.
        with_widths: Whether widths of MLPs are measured, at the block's kept fractions.
        forms: Forms of the factors of single tensors, as in `TensorChoice.form`. Measured is the first; the others
            compute the same at equal ranks.
    """

    methods: tuple[str, ...] = ("fisher_svd",)
    names: tuple[str, ...] | None = None
    multiple: int = 8
    tensor_kept_fraction: float = 0.5
    block_kept_fractions: tuple[float, ...] = (0.75, 0.5, 0.25)
    table_kept_fractions: tuple[float, ...] = (
        0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05,
    )  # fmt: skip
    with_stacks: bool = False
    with_removals: bool = True
    with_widths: bool = False
    forms: tuple[str, ...] = ("",)

    def __post_init__(self) -> None:
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ConfigError(f"a profile needs at least one method, each named once, but got {list(self.methods)}")
        for method in self.methods:
            if method not in METHOD_NAMES:
                raise ConfigError(f"a method must be one of {', '.join(METHOD_NAMES)}, but got '{method}'")
            if base := METHODS[method].refit_of:
                raise ConfigError(
                    f"a profile needs methods whose factors do not depend on the rest of the point, but got '{method}';"
                    f" measure '{base}', and use `dse allocate --refit` for points with '{method}'"
                )
            if PIVOTED in self.forms and has_core(method):
                raise ConfigError(
                    f"pivoted factors need methods with two factors, but got '{method}', which keeps a core; use"
                    " 'tucker_merged', or leave pivoted factors out"
                )
        fractions = (self.tensor_kept_fraction, *self.block_kept_fractions, *self.table_kept_fractions)
        if not all(0 < fraction < 1 for fraction in fractions):
            raise ConfigError(f"`0 < kept fraction < 1` must hold, but got {min(fractions)} to {max(fractions)}")

    @property
    def fingerprint(self) -> str:
        """Hash of all attributes, sixteen hexadecimal digits."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self)).encode()).hexdigest()[:16]

    @property
    def is_calibrated(self) -> bool:
        """Whether a method, or a width, needs calibration text."""
        return self.with_widths or any(METHODS[method].is_calibrated for method in self.methods)

    def width_at(self, mlp: Mlp, kept_fraction: float) -> int:
        """Channels that an MLP keeps at a kept fraction: a multiple as of ranks; all of them if it has fewer."""
        kept = math.floor(kept_fraction * mlp.channels + 1e-9) // self.multiple * self.multiple
        return min(max(kept, self.multiple), mlp.channels)

    def mlp_of(self, block: Block, topology: Topology) -> Mlp | None:
        """The MLP whose widths are measured with a block; None if there is none, or some of its tensors stay dense."""
        mlp = topology.mlps_by_name.get(block.name) if self.with_widths else None
        return mlp if mlp is not None and {t.name for t in mlp.tensors} <= {t.name for t in block.tensors} else None

    def forms_of(self, matrix: Matrix) -> tuple[str, ...]:
        """The forms of one matrix; a stack has two factors."""
        return self.forms if isinstance(matrix, DecomposableTensor) else ("",)

    def rank_requests(self, topology: Topology) -> RankRequests:
        """Requests to the factor bank: every matrix up to its largest rank, and the channels of every MLP."""
        blocks = blocks_of_topology(topology, self.names, with_stacks=self.with_stacks)
        matrices = {matrix.name: matrix for block in blocks for partition in block.partitions for matrix in partition}
        requests = {
            method: {name: profiled_limit(matrix, method, self.forms_of(matrix)) for name, matrix in matrices.items()}
            for method in self.methods
        }
        mlps = [mlp for block in blocks if (mlp := self.mlp_of(block, topology)) is not None]
        return {**requests, WIDTH: {mlp.name: mlp.channels for mlp in mlps}} if mlps else requests
