"""The interface between a worker process and its parent: variables, flags and exit statuses."""

from __future__ import annotations

# The EngineConfig as JSON. The API key has a variable of its own, because the configuration may be shown.
CONFIG_VARIABLE = "RSM_ENGINE"
API_KEY_VARIABLE = "RSM_OPENAI_API_KEY"
NODE_VARIABLE = "RSM_NODE"
# The id that the supervisor gives to this process: its worker's first incarnation, by which its death is reported.
BIRTH_VARIABLE = "RSM_BIRTH"
# The pid of the process that keeps the worker running.
SUPERVISOR_VARIABLE = "RSM_SUPERVISOR"
SUPERVISED_FLAG = "--supervised"
# A supervisor that stops when its stdin closes, unless it has read a byte from it before.
TENTATIVE_FLAG = "--tentative"

EXIT_OK = 0
EXIT_ENGINE_DIED = 70  # the supervisor restarts it
EXIT_ID_TAKEN = 75
EXIT_INVALID = 78  # the configuration can never work
