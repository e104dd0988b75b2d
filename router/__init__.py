"""The router process, and what a routing policy of your own is made of: subclass `Policy`, name it in RSM_POLICY."""

from rsm.router.policies.base import Policy, least_loaded
from rsm.router.views import CallView, Choice, EngineView, SessionView

__all__ = ["CallView", "Choice", "EngineView", "Policy", "SessionView", "least_loaded"]
