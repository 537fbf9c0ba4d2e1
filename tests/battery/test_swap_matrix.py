"""Each distinct part of each method in its slot of other methods, contracts on."""

import pytest

from fedsparse.core.errors import ConfigError
from fedsparse.core.hookspecs import SLOTS
from fedsparse.core.registry import Registry
from fedsparse.core.resolve import find_part

REGISTRY = Registry()
NAMES = REGISTRY.names()


def distinct_parts():
    """(slot, plugin): the first plugin that brings each different part."""
    for slot in SLOTS:
        seen = []
        for name in NAMES:
            part = find_part(name, slot, REGISTRY)[1]
            if part not in seen:
                seen.append(part)
                yield slot, name


PARTS = list(distinct_parts())
ROUNDS = 4  # with a period of 1: two and more readjustments, and the freezing at half of the run


def check_swap(make_engine, base, slot, other):
    parts = {s: find_part(other if s == slot else base, s, REGISTRY)[1] for s in SLOTS}
    changes = {"federation__rounds": ROUNDS, "sparsity__target": 0.7}
    if base == "privacy":  # what its promise refuses is tested with it; the noise goes with every part
        changes["method__extras__GaussianMechanism__accounting"] = "off"
    if "period" in type(parts["readjust"]).model_fields:
        changes["method__readjust__period"] = 1
        if "period" in type(parts["local_step"]).model_fields:
            changes["method__local_step__period"] = 1
    for s in ("local_step", "readjust"):
        if f"method__{s}__period" in changes:
            parts[s] = parts[s].model_copy(update={"period": 1})
    shared = [(p, s, field) for p in parts.values() for s, fields in p.agrees.items() for field in fields]
    unlike = any(getattr(p, f) != getattr(parts[s], f) for p, s, f in shared if hasattr(parts[s], f))
    needs = [need for part in parts.values() for need in part.needs.items()]
    stuck = not getattr(parts["local_step"], "moves_zeros", True) and any(p.grows for p in parts.values())
    if stuck or unlike or any(type(parts[needed]).__name__ != partner for needed, partner in needs):
        with pytest.raises(ConfigError, match=r"works only with|can never move|set both alike"):
            make_engine(base, [f"{slot}={other}"], **changes)
        return
    engine = make_engine(base, [f"{slot}={other}"], **changes)
    reports = list(engine.rounds(engine.start()))
    assert len(reports) == ROUNDS
    assert engine.contracts is not None


@pytest.mark.parametrize(("slot", "other"), PARTS)
@pytest.mark.parametrize("base", ["fedavg", "feddst", "pffdst"])
def test_each_part_in_the_main_methods(make_engine, base, slot, other):
    check_swap(make_engine, base, slot, other)


@pytest.mark.slow
@pytest.mark.parametrize(("slot", "other"), PARTS)
@pytest.mark.parametrize("base", [name for name in NAMES if name not in ("fedavg", "feddst", "pffdst")])
def test_each_part_in_every_other_method(make_engine, base, slot, other):
    check_swap(make_engine, base, slot, other)
