"""Routing policies, by name or dotted path. RSM_POLICY selects one."""

from __future__ import annotations

from importlib import import_module
from inspect import isabstract

from rsm.broker.errors import InvalidRequest
from rsm.broker.settings import Settings
from rsm.router.policies.autellix import Autellix
from rsm.router.policies.base import Policy
from rsm.router.policies.cost import Cost
from rsm.router.policies.least_loaded import LeastLoaded
from rsm.router.policies.round_robin import RoundRobin
from rsm.router.policies.session_hash import SessionHash

__all__ = ["POLICIES", "Policy", "create_policy"]

POLICIES: dict[str, type[Policy]] = {
    "autellix": Autellix,
    "cost": Cost,
    "least_loaded": LeastLoaded,
    "round_robin": RoundRobin,
    "session_hash": SessionHash,
}


def create_policy(settings: Settings) -> Policy:
    """The policy that `settings.policy` names: a built-in one, or your own as `package.module:Class`.

    Raises:
        InvalidRequest: there is no such policy; the message lists the names.
    """
    name = settings.policy
    if name in POLICIES:
        return POLICIES[name](settings)
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as e:  # the last two: not a module path
        raise InvalidRequest(
            f"There is no routing policy {name!r} ({e}). Use one of {', '.join(POLICIES)}, or package.module:Class "
            "(RSM_POLICY)."
        ) from e
    if not (isinstance(found, type) and issubclass(found, Policy)) or isabstract(found):
        raise InvalidRequest(f"{name!r} is not a subclass of rsm.router.Policy with a method `choose`.")
    return found(settings)
