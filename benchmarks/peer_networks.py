"""One-shot search code of others, as a process that runs sampled networks on demand.

python peer_networks.py PEER SIZE BATCH_SIZE CLASSES

It runs in an environment of its own, without this project. `peers.py` makes the environment and
speaks with the process: a line of JSON in, a line of JSON out. A network is

    {"kernel_sizes": [20 numbers], "expansions": [20 numbers], "depths": [5 numbers]}

of the space of once-for-all at width 1.0, five stages of four blocks. A line with a network makes
it the active one, and the answer is the number of its parameters. The line "train" makes one step
of it (forward, backward, SGD), and "forward" one forward pass in training.
"""

import json
import sys
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch


class _Stub(types.ModuleType):
    """Stands in for torchvision, with which once-for-all loads images. Here nobody loads any."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock()


def once_for_all(num_classes: int) -> tuple[torch.nn.Module, Callable[[dict], int]]:
    """The supernet of once-for-all (Cai et al., arXiv:1908.09791, package `ofa`)."""
    for name in ("", ".transforms", ".transforms.functional", ".datasets"):
        sys.modules[f"torchvision{name}"] = _Stub(f"torchvision{name}")
    from ofa.imagenet_classification.elastic_nn.networks import OFAMobileNetV3

    supernet = OFAMobileNetV3(
        n_classes=num_classes,
        dropout_rate=0,
        ks_list=[3, 5, 7],
        expand_ratio_list=[3, 4, 6],
        depth_list=[2, 3, 4],
    )

    def activate(network):
        supernet.set_active_subnet(
            ks=network["kernel_sizes"], e=network["expansions"], d=network["depths"]
        )
        return _count(supernet.get_active_subnet(preserve_weight=False))

    return supernet, activate


def nni(num_classes: int) -> tuple[torch.nn.Module, Callable[[dict], int]]:
    """The supernet of NNI's `RandomOneShot` on its MobileNetV3 space, reduced to the same space."""
    from nni.nas.hub.pytorch import MobileNetV3Space
    from nni.nas.oneshot.pytorch.strategy import RandomOneShot
    from nni.nas.oneshot.pytorch.supermodule.base import BaseSuperNetModule

    def make_space():
        return MobileNetV3Space(
            num_labels=num_classes,
            base_widths=(16, 16, 24, 40, 80, 112, 160, 960, 1280),
            width_multipliers=1.0,
            expand_ratios=(3.0, 4.0, 6.0),
            squeeze_excite=("none", "none", "force", "none", "force", "force"),
            depth_range=(2, 4),
            dropout_rate=0.0,
            bn_eps=1e-5,
        )

    supernet = RandomOneShot().mutate_model(make_space())
    parts = [each for each in supernet.modules() if isinstance(each, BaseSuperNetModule)]

    def activate(network):
        choice = {"stem_ks": 3, "s0_i0_ks": 3}
        for stage, depth in enumerate(network["depths"], 1):
            choice[f"s{stage}_depth"] = depth
            for block in range(4):
                index = 4 * (stage - 1) + block
                choice[f"s{stage}_i{block}_ks"] = network["kernel_sizes"][index]
                choice[f"s{stage}_i{block}_exp"] = float(network["expansions"][index])
        for part in parts:
            part.resample(memo=choice)
        return _count(make_space().freeze(choice))

    return supernet, activate


PEERS = {"once_for_all": once_for_all, "nni": nni}


def _count(model):
    return sum(each.numel() for each in model.parameters())


def main(peer: str, *sizes: str) -> None:
    """Answers lines until there are no more."""
    size, batch_size, num_classes = map(int, sizes)
    torch.set_num_threads(1)
    supernet, activate = PEERS[peer](num_classes)
    supernet.train()
    optimizer = torch.optim.SGD(supernet.parameters(), 0.01, momentum=0.9, nesterov=True)
    images = torch.rand(batch_size, 3, size, size)
    labels = torch.arange(batch_size) % num_classes

    def train() -> float:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(supernet(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    def forward() -> float:
        with torch.no_grad():
            return supernet(images).sum().item()

    commands: dict[str, Callable[[], Any]] = {"train": train, "forward": forward}
    for line in sys.stdin:
        request = json.loads(line)
        answer = commands[request]() if isinstance(request, str) else activate(request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
