"""What all predictor networks have in common: the parameter groups of an optimiser, and threads."""

import torch
from torch import Tensor

from air.predictor.compact.network import CompactPredictor


class SlowTrunk(CompactPredictor):
    """The compact network with a trunk that learns at a tenth of the rate."""

    def learning_rate_factor(self, name: str) -> float:
        return 0.1 if name.startswith("trunk.") else 1.0


def grouped(network: CompactPredictor) -> dict[str, tuple[float, float]]:
    """(rate, decay) by parameter name; every parameter must be in one group exactly."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    groups = network.parameter_groups(learning_rate=0.5, weight_decay=0.25)
    found = [(names[each], (group["lr"], group["weight_decay"])) for group in groups for each in group["params"]]
    assert sorted(name for name, _ in found) == sorted(names.values())
    return dict(found)


def test_only_weights_of_layers_decay():
    groups = grouped(CompactPredictor(patch_size=4, channels=8, depth=1))
    assert groups["stem.weight"] == (0.5, 0.25)
    assert groups["trunk.0.widen.weight"] == (0.5, 0.25)
    for name in ("stem.bias", "trunk.0.norm.weight", "norm.bias", "embedding"):
        assert groups[name] == (0.5, 0.0)


def test_a_part_can_learn_slower_and_frozen_parameters_are_left_out():
    groups = grouped(SlowTrunk(patch_size=4, channels=8, depth=1))
    assert groups["trunk.0.widen.weight"] == (0.05, 0.25)
    assert groups["trunk.0.widen.bias"] == (0.05, 0.0)
    assert groups["heads.0.weight"] == (0.5, 0.25)
    network = CompactPredictor(patch_size=4, channels=8, depth=1)
    network.stem.requires_grad_(False)
    given = [
        each for group in network.parameter_groups(learning_rate=1.0, weight_decay=0.0) for each in group["params"]
    ]
    assert not any(each is network.stem.weight for each in given)


def test_the_quantiser_learns_faster():
    groups = grouped(CompactPredictor(patch_size=4, channels=8, depth=1, quantizer_bits=[8] * 8))
    for name in ("quantizer.step_logit", "quantizer.low", "quantizer.adapt.bias"):
        assert groups[name] == (5.0, 0.0)
    assert groups["quantizer.adapt.weight"] == (5.0, 0.25)
    assert groups["stem.weight"] == (0.5, 0.25)


class Watched(CompactPredictor):
    """The compact network, which notes the threads it is given and those of torch."""

    threads: tuple[int, int]

    def forward(self, image: Tensor, canvas: Tensor, active: Tensor, stage: int, threads: int = 1) -> Tensor:
        self.threads = threads, torch.get_num_threads()
        return super().forward(image, canvas, active, stage, threads)


def test_predicting_takes_the_threads_it_is_given_and_leaves_torchs_number() -> None:
    network = Watched(patch_size=4, channels=8, depth=1).eval()
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    network.predict(image, torch.zeros_like(image), torch.ones(4, dtype=torch.bool), 0, threads=3)
    assert network.threads == (3, 3)
    assert torch.get_num_threads() == before
