"""What a worker process and those who start it agree on: variables, flags and exit statuses."""

from __future__ import annotations

# The EngineConfig, as JSON; its key apart, because the configuration may be shown.
CONFIG_VARIABLE = "RSM_ENGINE"
API_KEY_VARIABLE = "RSM_OPENAI_API_KEY"
NODE_VARIABLE = "RSM_NODE"
# What the supervisor calls this very process: the first incarnation of its worker, by which its death is reported.
BIRTH_VARIABLE = "RSM_BIRTH"
# The pid of the process that keeps the worker running.
SUPERVISOR_VARIABLE = "RSM_SUPERVISOR"
SUPERVISED_FLAG = "--supervised"
# A supervisor that ends when its stdin does, unless it has read a byte there before.
TENTATIVE_FLAG = "--tentative"

EXIT_OK = 0
EXIT_ENGINE_DIED = 70  # start it again
EXIT_ID_TAKEN = 75
EXIT_INVALID = 78  # its configuration can never run
