"""Fisher estimates against closed forms, literal float64 loops and finite differences."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.func import functional_call, jacrev

from dt.data.windows import Batch
from dt.errors import UserError
from dt.merging import fisher as module
from dt.merging.fisher import estimate, load_fisher, save_fisher, squared_gradients, trace_normalised
from dt.merging.merge import Fisher, merge
from dt.model.architecture import Architecture
from dt.model.decision_transformer import DecisionTransformer
from dt.model.policy import Policy, save_policy
from dt.tasks import get_task
from dt.training.objective import windows_of
from tests.toy import noise

SMALL = Architecture(width=16, layers=2, context=5)
DEAD = slice(0, 4)  # units of the first block's MLP


def policy(*tasks: str, seed: int = 0, architecture: Architecture = SMALL) -> Policy:
    """Random in every parameter; four MLP units of the first block never fire."""
    draw = torch.Generator().manual_seed(seed)
    model = DecisionTransformer(architecture, map(get_task, tasks))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
        model.trunk.h[0].mlp.c_fc.bias[DEAD] = -1e3
    return model.policy()


HOPPER = policy("hopper")


def of_hopper(variant: Any = "empirical", policy: Policy = HOPPER, **changes: Any) -> Fisher:
    settings = {"variant": variant, "batches": 2, "batch_size": 4, "seed": 5} | changes
    return estimate(policy, {"hopper": noise("hopper")}, **settings)


@pytest.fixture(scope="module")
def empirical() -> Fisher:
    return of_hopper()


def close(found: Fisher, expected: Fisher, rtol: float) -> None:
    """Each tensor to within a share of its largest entry."""
    assert found.keys() == expected.keys() == HOPPER.trunk.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), tensor, rtol=rtol, atol=rtol * float(tensor.max()))


def literal(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], together: int, drawn: bool = False
) -> tuple[dict[str, torch.Tensor], int]:
    """Σ over groups of windows of the squared gradient of a loss, by autograd in float64; real time steps in all.

    The loss compares the real actions with what is predicted, (n, A) both; drawn: with what the policy draws instead.
    """
    model = DecisionTransformer.from_policy(HOPPER).double().eval()
    windows, rng = windows_of(get_task("hopper"), noise("hopper"), HOPPER), np.random.Generator(np.random.PCG64(5))
    total = {name: torch.zeros_like(p) for name, p in model.trunk.named_parameters()}
    steps = 0
    for _ in range(2):
        batch = in_float64(windows.sample(4, rng))
        targets = batch.actions
        if drawn:
            targets = model("hopper", batch).detach() + torch.from_numpy(rng.choice([-1, 1], size=(4, 5, 3)))
        for first in range(0, 4, together):
            group = slice(first, first + together)
            real = batch.mask[group]
            model.zero_grad()
            loss(model("hopper", Batch(*(each[group] for each in batch)))[real], targets[group][real]).backward()
            for name, p in model.trunk.named_parameters():
                total[name] += p.grad**2
            steps += int(real.sum())
    return total, steps


def in_float64(batch: Batch) -> Batch:
    return Batch(*(part.double() if part.is_floating_point() else part for part in batch))


def test_a_linear_policy_has_the_fisher_of_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """y = xW of unit variance: Σ x_i² for W_ij; at the data's actions Σ x_i² r_j². Few or all samples at once."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 3, generator=draw), torch.randn(50, 2, generator=draw)
    weight = torch.randn(3, 2, generator=draw)
    above_or_below = torch.randint(0, 2, (50, 2), generator=draw) * 2 - 1

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((x @ parameters["W"] - y) ** 2).sum() / 2

    squares = x.double().T ** 2
    for at_once in (module.AT_ONCE, 6 * 7):
        monkeypatch.setattr(module, "AT_ONCE", at_once)
        exact = squared_gradients(loss, {"W": weight}, [x, x @ weight + above_or_below])["W"]
        expected = squares.sum(dim=1, keepdim=True).expand(3, 2)
        torch.testing.assert_close(exact, expected, rtol=1e-5, atol=0)
        observed = squared_gradients(loss, {"W": weight}, [x, y])["W"]
        residuals = (x.double() @ weight.double() - y) ** 2
        torch.testing.assert_close(observed, squares @ residuals, rtol=1e-5, atol=0)


def test_batch_is_the_originals_formula() -> None:
    expected, steps = literal(torch.nn.functional.mse_loss, together=4)
    close(of_hopper("batch"), {name: total / steps for name, total in expected.items()}, rtol=1e-4)


@pytest.mark.parametrize("variant", ["empirical", "exact"])
def test_per_window_variants_are_a_loop_over_windows(variant: str, empirical: Fisher) -> None:
    expected, _ = literal(lambda a, b: ((a - b) ** 2).sum() / 2, together=1, drawn=variant == "exact")
    found = empirical if variant == "empirical" else of_hopper(variant)
    close(found, {name: total / 8 for name, total in expected.items()}, rtol=1e-4)


class EveryStart:
    """In place of random numbers: the windows from all steps on, once each."""

    def integers(self, steps: int, size: int) -> np.ndarray:
        assert steps == size
        return np.arange(steps)


def test_exact_is_without_bias_the_sum_over_single_outputs() -> None:
    """Σ over real time steps and action dimensions of (∇ μ)², by one backward pass for each, in the mean of windows."""
    tiny = policy("hopper", architecture=Architecture(width=8, layers=1, context=3))
    model = DecisionTransformer.from_policy(tiny).eval().requires_grad_(False)
    batch = windows_of(get_task("hopper"), noise("hopper"), tiny).sample(25, EveryStart())
    parameters = {f"trunk.{name}": p for name, p in model.trunk.named_parameters()}
    jacobian = jacrev(lambda p: functional_call(model, p, ("hopper", batch))[batch.mask])(parameters)
    expected = {name.removeprefix("trunk."): (each**2).sum(dim=(0, 1)) / 25 for name, each in jacobian.items()}
    found = of_hopper("exact", tiny, batches=1, batch_size=4096)
    for part in ("attn", "mlp", "ln_f"):
        sums = [sum(float(each.sum()) for name, each in fisher.items() if part in name) for fisher in (found, expected)]
        assert sums[0] == pytest.approx(sums[1], rel=0.1)


def test_one_entry_by_finite_differences(empirical: Fisher) -> None:
    name = "h.1.mlp.c_proj.weight"
    entry = tuple(int(i) for i in np.unravel_index(int(empirical[name].argmax()), empirical[name].shape))
    windows, rng = windows_of(get_task("hopper"), noise("hopper"), HOPPER), np.random.Generator(np.random.PCG64(5))
    batches = [in_float64(windows.sample(4, rng)) for _ in range(2)]

    def losses(change: float) -> torch.Tensor:
        model = DecisionTransformer.from_policy(HOPPER).double().eval()
        with torch.no_grad():
            dict(model.trunk.named_parameters())[name][entry] += change
            errors = [((model("hopper", b) - b.actions) ** 2 * b.mask[..., None]).sum(dim=(1, 2)) / 2 for b in batches]
        return torch.cat(errors)

    slopes = (losses(1e-6) - losses(-1e-6)) / 2e-6
    assert float(empirical[name][entry]) == pytest.approx(float((slopes**2).mean()), rel=1e-4)


def test_what_cannot_matter_weighs_nothing(empirical: Fisher) -> None:
    """Softmax ignores a shift, so key biases have no gradient; a unit that never fires passes none on."""
    for i in range(SMALL.layers):
        queries, keys, values = empirical[f"h.{i}.attn.c_attn.bias"].split(SMALL.width)
        assert float(keys.max()) < 1e-9 * min(float(queries.max()), float(values.max()))
    for fisher in (empirical, of_hopper("batch")):
        assert all(bool((tensor >= 0).all()) for tensor in fisher.values())
        assert not fisher["h.0.mlp.c_fc.weight"][:, DEAD].any()
        assert not fisher["h.0.mlp.c_proj.weight"][DEAD].any()
        assert fisher["h.0.mlp.c_fc.weight"][:, 4:].any()
        assert all(bool(tensor.any()) for tensor in fisher.values())


def test_where_nobody_has_information_a_merge_is_the_mean(empirical: Fisher) -> None:
    other = policy("hopper", seed=1)
    fishers = [trace_normalised(empirical), trace_normalised(of_hopper(policy=other))]
    merged, mean = merge([HOPPER, other], "trunk", fisher=fishers), merge([HOPPER, other], "trunk")
    assert all(bool(tensor.isfinite().all()) for tensor in merged.trunk.values())
    for name, dead in [("h.0.mlp.c_fc.weight", (slice(None), DEAD)), ("h.0.mlp.c_proj.weight", (DEAD,))]:
        assert torch.equal(merged.trunk[name][dead], mean.trunk[name][dead])
        assert not torch.equal(merged.trunk[name], mean.trunk[name])


def test_trace_normalised_sums_to_one_over_the_blocks(empirical: Fisher) -> None:
    normalised = trace_normalised(empirical)
    trace = sum(float(tensor.double().sum()) for name, tensor in empirical.items() if name.startswith("h."))
    assert sum(float(t.double().sum()) for n, t in normalised.items() if n.startswith("h.")) == pytest.approx(1)
    for name, tensor in empirical.items():
        torch.testing.assert_close(normalised[name], (tensor.double() / trace).float())
    nothing = {name: torch.zeros_like(tensor) for name, tensor in empirical.items()}
    assert trace_normalised(nothing) is nothing


def test_of_several_tasks_it_is_their_mean() -> None:
    both, data = policy("hopper", "walker2d"), {task: noise(task) for task in ("hopper", "walker2d")}
    settings: dict[str, Any] = {"variant": "empirical", "batches": 1, "batch_size": 4, "seed": 0}
    together = estimate(both, data, **settings)
    hopper, walker = (estimate(both, {task: each}, **settings) for task, each in data.items())
    for name, tensor in together.items():
        torch.testing.assert_close(tensor, (hopper[name] + walker[name]) / 2)
    assert not torch.equal(hopper["ln_f.bias"], walker["ln_f.bias"])


def test_the_seed_decides_and_the_policy_stays(empirical: Fisher) -> None:
    before = {name: array.copy() for name, array in HOPPER.arrays().items()}
    again, other = of_hopper(), of_hopper(seed=6)
    assert all(torch.equal(tensor, again[name]) for name, tensor in empirical.items())
    assert not torch.equal(other["ln_f.bias"], empirical["ln_f.bias"])
    assert all(np.array_equal(array, before[name]) for name, array in HOPPER.arrays().items())


def test_a_saved_fisher_is_read_back_and_a_damaged_one_refused(empirical: Fisher, tmp_path: Path) -> None:
    path = tmp_path / "fisher.safetensors"
    save_fisher(empirical, path, {"seed": "5"})
    read = load_fisher(path)
    assert read.keys() == empirical.keys()
    assert all(torch.equal(tensor, read[name]) for name, tensor in empirical.items())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="truncated or corrupt"):
        load_fisher(path)
    save_policy(HOPPER, path)
    with pytest.raises(UserError, match="not a mergedt Fisher"):
        load_fisher(path)
    with pytest.raises(UserError, match="no Fisher at"):
        load_fisher(tmp_path / "elsewhere")


def test_mistakes_are_named() -> None:
    apart = Policy(SMALL, {}, HOPPER.heads, {"hopper": HOPPER.trunk})
    settings: dict[str, Any] = {"variant": "batch", "batches": 1, "batch_size": 4, "seed": 0}
    for call, sentence in [
        (lambda: of_hopper("exakt"), r"unknown Fisher variant 'exakt': did you mean 'exact'"),
        (lambda: estimate(HOPPER, {}, **settings), r"name at least one task's"),
        (lambda: of_hopper(batches=0), r"0 batches of"),
        (lambda: estimate(HOPPER, {"walker2d": noise("walker2d")}, **settings), r"no head for walker2d"),
        (lambda: estimate(HOPPER, {"hopper": noise("walker2d")}, **settings), r"hopper"),
        (lambda: of_hopper(policy=apart), r"trunk parameters or masks of their own"),
    ]:
        with pytest.raises(UserError, match=sentence):
            call()
