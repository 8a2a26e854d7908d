"""Which unit a parameter belongs to: the places where modules have it, tied ones together."""

from typing import NamedTuple

from torch import nn


class Slot(NamedTuple):
    """A place where a module has a parameter; a tied one has several."""

    path: str
    module: nn.Module
    name: str
    parameter: nn.Parameter


def slots_by_unit(model: nn.Module, units: list[nn.Module]) -> list[list[list[Slot]]]:
    """For the root and for each unit its parameters, each with all of its places.

    A module belongs to the innermost unit around it, and a parameter to the unit that has all of
    its places, else to the root.
    """
    numbers = {module: number for number, module in enumerate(units, start=1)}
    owners: dict[str, int] = {}
    places: dict[nn.Parameter, dict[tuple[nn.Module, str], tuple[Slot, int]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        owner = numbers.get(module, owners.get(path.rpartition(".")[0], 0) if path else 0)
        owners[path] = owner
        for name, parameter in module.named_parameters(recurse=False):
            slot = Slot(f"{path}.{name}".lstrip("."), module, name, parameter)
            places.setdefault(parameter, {}).setdefault((module, name), (slot, owner))
    found: list[list[list[Slot]]] = [[] for _ in range(len(units) + 1)]
    for where in places.values():
        owned_by = {owner for _, owner in where.values()}
        found[owned_by.pop() if len(owned_by) == 1 else 0].append([s for s, _ in where.values()])
    return found
