"""Refits against the same least-squares problem solved with lstsq on recorded activations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dse.decomposition import CalibrationWindows, FactorBank, LowRankFactors, apply_point, decompose, factorise
from dse.decomposition.factors import as_matrix
from dse.decomposition.refit import refit_factors
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import NonFiniteError, PointError
from dse.models import LoadedModel

REFIT = "fisher_svd_refit"


def token_ids(count: int = 6, length: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(64, (count, length), generator=torch.Generator().manual_seed(seed))


def windows() -> CalibrationWindows:
    return CalibrationWindows(token_ids(), "1" * 16, "made")


def plain_factors(loaded: LoadedModel, names: tuple[str, ...], rank: int) -> dict[str, LowRankFactors]:
    paths = {name: loaded.topology.matrix(name).modules for name in names}
    weights = {name: torch.cat([as_matrix(loaded.model.get_submodule(p)) for p in paths[name]]) for name in names}
    return {name: factorise(weight.float(), "svd", rank) for name, weight in weights.items()}


def refitted(loaded: LoadedModel, factors: dict[str, LowRankFactors], **options: object) -> dict[str, LowRankFactors]:
    arguments = {"refitted": frozenset(factors), "removed": (), "widths": {}, "token_ids": token_ids()} | options
    return refit_factors(loaded.model, loaded.topology, factors, **arguments)  # type: ignore[arg-type]


class Fixed:
    def __init__(self, factors: dict[str, LowRankFactors]) -> None:
        self.by_name = factors

    def factors(self, name: str, choice: TensorChoice) -> LowRankFactors:
        return self.by_name[name]


def recorded(loaded: LoadedModel, path: str, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and outputs of one module, with tokens as rows."""
    seen: list[torch.Tensor] = []

    def see(_module: object, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen.extend((arguments[0], output))

    handle = loaded.model.get_submodule(path).register_forward_hook(see)
    with torch.no_grad():
        loaded.model(tokens)
    handle.remove()
    return tuple(value.reshape(-1, value.shape[-1]).double() for value in seen)  # type: ignore[return-value]


def expected_left(
    loaded: LoadedModel, name: str, factors: LowRankFactors, point: DesignPoint, source: Fixed
) -> torch.Tensor:
    """A quarter of the received error regressed on the components, with the ridge as extra rows of lstsq."""
    path = loaded.topology[name].module
    dense_inputs, dense_outputs = recorded(loaded, path, token_ids())
    with decompose(loaded, point, source):
        inputs, own = recorded(loaded, path, token_ids())
    assert not torch.allclose(dense_inputs, inputs)
    components = inputs @ factors.right.double().T
    ridge = (0.05 * components.square().sum(0)).sqrt()
    rows = torch.cat((components, torch.diag(ridge)))
    aims = torch.cat((dense_outputs - own, torch.zeros(len(ridge), own.shape[1], dtype=torch.float64)))
    return factors.left.double() + 0.25 * torch.linalg.lstsq(rows, aims).solution.T


@pytest.mark.parametrize("fixture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["layers.0.attention_output", "layers.1.key", "layers.1.up", "layers.1.down"])
def test_the_left_factor_solves_the_least_squares_between_the_two_models(
    fixture: str, name: str, request: pytest.FixtureRequest
) -> None:
    """All tensors before this one use the factors that the refit gave them."""
    loaded: LoadedModel = request.getfixturevalue(fixture)
    name = name if name in loaded.topology.by_name else "layers.1.up"
    all_names = tuple(tensor.name for tensor in loaded.topology.tensors)
    factors = plain_factors(loaded, all_names, 4)
    found = refitted(loaded, factors)
    before = {other: found[other] for other in all_names if other != name}
    point = DesignPoint.of({other: TensorChoice("svd", 4) for other in before})
    expected = expected_left(loaded, name, factors[name], point, Fixed(before))
    torch.testing.assert_close(found[name].left.double(), expected, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(found[name].left, factors[name].left)
    assert torch.equal(found[name].right, factors[name].right)


@pytest.mark.parametrize("fixture", ["llama", "gpt2"])
def test_without_received_errors_a_refit_changes_nothing(fixture: str, request: pytest.FixtureRequest) -> None:
    loaded: LoadedModel = request.getfixturevalue(fixture)
    names = tuple(tensor.name for tensor in loaded.topology.tensors if tensor.layer == 1)
    factors = {name: plain_factors(loaded, (name,), min(loaded.topology[name].shape))[name] for name in names}
    for name, after in refitted(loaded, factors).items():
        torch.testing.assert_close(after.product(), factors[name].product(), atol=1e-4, rtol=1e-3)


def test_the_model_is_never_changed_and_the_refit_is_deterministic(llama: LoadedModel) -> None:
    before = {name: value.clone() for name, value in llama.model.state_dict().items()}
    factors = plain_factors(llama, ("layers.0.gate", "layers.1.key"), 3)
    first, second = refitted(llama, factors), refitted(llama, factors)
    assert all(torch.equal(before[name], value) for name, value in llama.model.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in llama.model.modules())
    assert all(torch.equal(first[name].left, second[name].left) for name in factors)


def test_tensors_not_refitted_are_unchanged_but_affect_later_ones(llama: LoadedModel) -> None:
    factors = plain_factors(llama, ("layers.0.up", "layers.1.up"), 2)
    alone = refitted(llama, {"layers.1.up": factors["layers.1.up"]})
    both = refitted(llama, factors, refitted=frozenset({"layers.1.up"}))
    assert both["layers.0.up"] is factors["layers.0.up"]
    assert not torch.allclose(both["layers.1.up"].left, alone["layers.1.up"].left)


def test_a_stack_is_refitted_like_its_members_with_one_right_factor(llama: LoadedModel) -> None:
    stack = llama.topology.matrix("layers.1.query_key_value")
    before = plain_factors(llama, ("layers.0.down",), 2)
    whole = plain_factors(llama, (stack.name,), 6)[stack.name]
    found = refitted(llama, {**before, stack.name: whole})[stack.name]
    members = {
        member.name: LowRankFactors(whole.left[rows], whole.right)
        for member, rows in zip(stack.members, stack.rows, strict=True)  # type: ignore[union-attr]
    }
    one_by_one = refitted(llama, {**before, **members})
    expected = torch.cat([one_by_one[name].left for name in members])
    torch.testing.assert_close(found.left, expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(found.left, whole.left)


def test_a_removed_block_affects_later_refits(llama: LoadedModel) -> None:
    """The inputs after a removed block, recorded from the model with the block removed."""
    name = "layers.2.gate"
    factors = plain_factors(llama, (name,), 3)
    removed = ("layers.0.mlp", "layers.1.attention")
    found = refitted(llama, factors, removed=removed)
    point = DesignPoint.of({block: TensorChoice.removal() for block in removed})
    expected = expected_left(llama, name, factors[name], point, Fixed({}))
    torch.testing.assert_close(found[name].left.double(), expected, atol=1e-4, rtol=1e-3)


def test_non_finite_activations_are_refused(llama: LoadedModel) -> None:
    factors = plain_factors(llama, ("layers.0.up", "layers.1.up"), 2)
    factors["layers.0.up"] = LowRankFactors(factors["layers.0.up"].left * float("inf"), factors["layers.0.up"].right)
    with pytest.raises(NonFiniteError, match="must be finite"):
        refitted(llama, factors, refitted=frozenset({"layers.1.up"}))
    assert all(not module._forward_hooks for module in llama.model.modules())


def divergence(loaded: LoadedModel, dense: torch.Tensor, tokens: torch.Tensor) -> float:
    """Mean KL divergence from the dense predictions."""
    logs = loaded.model(tokens).logits.log_softmax(-1)
    return float((dense.log_softmax(-1).exp() * (dense.log_softmax(-1) - logs)).sum(-1).mean())


def test_the_bank_refits_points_and_caches_them(llama: LoadedModel, tmp_path: Path) -> None:
    point = DesignPoint.uniform(llama.topology, REFIT, 8)
    plain = DesignPoint.uniform(llama.topology, "fisher_svd", 8)
    calls: list[str] = []
    bank = FactorBank.build(
        llama, [point, plain], windows(), folder=tmp_path, progress=lambda phase, done, total: calls.append(phase)
    )
    assert bank.folders[REFIT] == bank.folders["fisher_svd"]  # both start from the same factors
    assert bank.identity(point) != bank.identity(plain)
    assert bank.of_point(plain) is bank
    with torch.no_grad():
        dense = llama.model(token_ids()).logits
        with decompose(llama, point, bank):
            better = divergence(llama, dense, token_ids())
            logits = llama.model(token_ids()).logits
        with decompose(llama, plain, bank):
            assert better < divergence(llama, dense, token_ids())
        assert calls.count("refit") == len(point)
        again = FactorBank.build(
            llama, [point], windows(), folder=tmp_path, progress=lambda phase, done, total: calls.append(phase)
        )
        with decompose(llama, point, again):
            assert torch.equal(llama.model(token_ids()).logits, logits)
        assert calls.count("refit") == len(point)  # read from disk
        assert torch.equal(llama.model(token_ids()).logits, dense)


def test_a_damaged_refit_is_computed_again(
    llama: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    point = DesignPoint.uniform(llama.topology, REFIT, 3, layers=[1])
    bank = FactorBank.build(llama, [point], windows(), folder=tmp_path)
    expected = bank.of_point(point).factors("layers.1.up", point.by_name["layers.1.up"]).left
    (file,) = tmp_path.glob(f"**/{point.id}-*.safetensors")
    file.write_bytes(file.read_bytes()[:-8] + b"\0" * 8)
    found = bank.of_point(point).factors("layers.1.up", point.by_name["layers.1.up"]).left
    assert torch.equal(found, expected)
    assert "damaged" in caplog.text


def test_only_the_most_recent_refits_are_kept(
    llama: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dse.decomposition.refit_cache._MAX_BYTES", 1)
    points = [DesignPoint.uniform(llama.topology, REFIT, rank, layers=[0]) for rank in (2, 3, 4)]
    bank = FactorBank.build(llama, points, windows(), folder=tmp_path)
    for point in points:
        bank.of_point(point)
    assert [path.name[:12] for path in tmp_path.glob("**/refit-*/*.safetensors")] == [points[-1].id]


def test_a_bank_without_the_method_refuses_the_point(llama: LoadedModel, tmp_path: Path) -> None:
    plain = DesignPoint.uniform(llama.topology, "fisher_svd", 3)
    bank = FactorBank.build(llama, [plain], windows(), folder=tmp_path)
    with pytest.raises(PointError, match="must hold 'fisher_svd_refit'"):
        apply_point(llama.model, llama.topology, DesignPoint.uniform(llama.topology, REFIT, 3), bank)
