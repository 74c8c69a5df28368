"""Products in bfloat16 by way of float32: what they are, and that a processor without bfloat16 makes no others."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dt.bfloat16
import dt.rollout.actor
from dt.bfloat16 import ByWayOfFloat32, products_in
from dt.model.architecture import Architecture
from dt.rollout.evaluate import evaluate
from dt.tasks import get_task
from dt.training.harmodt import train_harmodt
from dt.training.harmony import Harmony
from dt.training.loop import TrainingState
from dt.training.objective import train
from dt.training.optimisation import Optimisation
from dt.training.together import Crowd
from tests.toy import noise

CPU, HOPPER = torch.device("cpu"), get_task("hopper").model_copy(update={"horizon": 8})
Product = Callable[..., Tensor]


class Products(TorchDispatchMode):
    """Counts matrix products by what they multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Counter[torch.dtype]()

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        """Called for each of PyTorch's operations."""
        if any(
            part in operation.name()
            for part in ("mm", "mv", "matmul", "linear", "dot", "einsum", "attention", "mkldnn")
        ):
            self.seen[arguments[-1].dtype] += 1
        return operation(*arguments, **(named or {}))


@pytest.fixture
def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that is without."""
    for module in (dt.bfloat16, dt.rollout.actor):
        monkeypatch.setattr(module, "multiplies_bfloat16", lambda: False)


def state(heads: int, seed: int = 0) -> TrainingState[Any]:
    """A run of ten steps in bfloat16, none of them taken."""
    architecture = Architecture(width=32, layers=2, heads=heads, context=4)
    optimisation = Optimisation(steps=10, batch_size=8, warmup_steps=2, dropout=0.0, precision="bfloat16")
    return train({HOPPER.name: noise(HOPPER.name)}, architecture, optimisation, seed)


def masked(heads: int) -> TrainingState[Any]:
    """HarmoDT of two robots, with a swap of masks after two steps."""
    architecture = Architecture(width=32, layers=2, heads=heads, context=4)
    optimisation = Optimisation(steps=6, batch_size=8, warmup_steps=2, dropout=0.0, precision="bfloat16")
    data = {name: noise(name) for name in ("hopper", "walker2d")}
    return train_harmodt(data, architecture, optimisation, Harmony(interval=2), 0)


@pytest.mark.parametrize(
    ("product", "shapes"),
    [
        (torch.mm, [(30, 200), (200, 40)]),
        (torch.addmm, [(40,), (30, 200), (200, 40)]),
        (torch.bmm, [(5, 30, 200), (5, 200, 40)]),
        (torch.baddbmm, [(5, 30, 40), (5, 30, 200), (5, 200, 40)]),
        (torch.mv, [(30, 200), (200,)]),
    ],
)
def test_a_product_is_the_exact_one_rounded(product: Product, shapes: list[tuple[int, ...]]) -> None:
    """Of small integers, whose sums float32 holds exactly in whatever order."""
    torch.manual_seed(0)
    operands = [torch.randint(1, 9, shape).bfloat16() for shape in shapes]
    with ByWayOfFloat32():  # type: ignore[no-untyped-call]
        found = product(*operands)
    exact = product(*(each.double() for each in operands)).bfloat16()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact)


def test_other_numbers_are_left_alone() -> None:
    a, b = torch.randn(30, 200), torch.randn(200, 40)
    with ByWayOfFloat32():  # type: ignore[no-untyped-call]
        single, double = a @ b, a.double() @ b.double()
    assert torch.equal(single, a @ b)
    assert torch.equal(double, a.double() @ b.double())


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.usefixtures("without_bfloat16")
def test_no_product_of_training_goes_another_way(heads: int) -> None:
    """Forward and backward, of one policy and of several at once."""
    with Products() as products:
        state(heads).advance(2)
        Crowd([state(heads, seed) for seed in (0, 1)]).advance(2)
        masked(heads).advance(3)
    assert set(products.seen) == {torch.float32}


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.usefixtures("without_bfloat16")
def test_no_product_of_acting_goes_another_way(heads: int) -> None:
    policy = state(heads).result()
    with Products() as products:
        evaluate(policy, HOPPER, episodes=3, seed=0, precision="bfloat16")
    assert set(products.seen) == {torch.float32}


@pytest.mark.parametrize("heads", [1, 4])
def test_it_learns_what_pytorch_s_own_products_learn(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are slow on a processor without bfloat16, but right."""
    learned = []
    for multiplies in (False, True):
        monkeypatch.setattr(dt.bfloat16, "multiplies_bfloat16", lambda multiplies=multiplies: multiplies)
        run = state(heads)
        run.advance(10)
        learned.append(run.metrics)
    ours, theirs = learned
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=2e-2)


def test_only_a_cpu_that_lacks_it_is_helped(monkeypatch: pytest.MonkeyPatch) -> None:
    def helped(multiplies: bool, precision: Any, device: str) -> bool:
        monkeypatch.setattr(dt.bfloat16, "multiplies_bfloat16", lambda: multiplies)
        return isinstance(products_in(precision, torch.device(device)), ByWayOfFloat32)

    assert helped(False, "bfloat16", "cpu")
    assert not helped(True, "bfloat16", "cpu")
    assert not helped(False, "float32", "cpu")
    assert not helped(False, "bfloat16", "cuda")
