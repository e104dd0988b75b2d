"""The router process, and the API for your own routing policy: subclass `Policy` and name it in RSM_POLICY."""

from rsm.router.policies.base import Policy, least_loaded
from rsm.router.views import CallView, Choice, EngineView, SessionView

__all__ = ["CallView", "Choice", "EngineView", "Policy", "SessionView", "least_loaded"]
