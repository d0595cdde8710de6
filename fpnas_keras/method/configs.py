"""The arguments of a search as JSON, for `.keras` files."""

import dataclasses
from typing import Any

from fpnas_keras.architecture import Head, Stem
from fpnas_keras.cost import Cost, FileSizeCost, LatencyCost, MacsCost, ParamsCost
from fpnas_keras.errors import UserError
from fpnas_keras.method.estimator import AdaptiveSamples, CostController
from fpnas_keras.spaces import SearchBlock, Space

_COSTS = {cost.__name__: cost for cost in (MacsCost, ParamsCost, FileSizeCost)}


def to_config(arguments: dict[str, Any]) -> dict[str, Any]:
    """Makes the arguments of `ArchitectureSearch` fit for JSON.

    Args:
        arguments: The arguments by name. Numbers and texts stay what they are.

    Raises:
        UserError: When the cost is of a class of the user's own.
    """
    config = dict(arguments)
    config["space"] = dataclasses.asdict(arguments["space"])
    config["cost"] = _cost_config(arguments["cost"])
    for name in ("samples", "cost_coefficient"):
        if dataclasses.is_dataclass(config[name]):
            config[name] = dataclasses.asdict(config[name])
    return config


def from_config(config: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `to_config`."""
    arguments = dict(config)
    arguments["space"] = _space(config["space"])
    arguments["cost"] = _cost(config["cost"])
    for name, cls in (("samples", AdaptiveSamples), ("cost_coefficient", CostController)):
        if isinstance(arguments[name], dict):
            arguments[name] = cls(**arguments[name])
    return arguments


def _space(config):
    blocks = []
    for block in config["blocks"]:
        values = {
            key: tuple(each) if isinstance(each, list) else each for key, each in block.items()
        }
        blocks.append(SearchBlock(**values))
    parts = {"stem": Stem(**config["stem"]), "head": Head(**config["head"]), "blocks": blocks}
    return Space(**{**config, **parts})


def _cost_config(cost: Cost) -> dict[str, Any]:
    name = type(cost).__name__
    if type(cost) is LatencyCost:
        return {"name": name, "target": cost.target, **cost.table}
    if type(cost) not in _COSTS.values():
        raise UserError(
            f"a search can be saved as .keras with the costs {', '.join(_COSTS)} and LatencyCost. "
            f"Received: cost of class {name}; `save_weights` saves what it has learned"
        )
    return {"name": name, "target": cost.target}


def _cost(config):
    values = {key: value for key, value in config.items() if key != "name"}
    if config["name"] == LatencyCost.__name__:
        return LatencyCost.from_table(**values)
    return _COSTS[config["name"]](**values)
