"""`rsm.yaml`: the description of a fleet, for `rsm up`.

settings: {namespace: prod, policy: cost}      # like the RSM_* variables, which take precedence
routers: 1
engines:
  - {engine_id: e0, model: Qwen/Qwen2.5-7B-Instruct, gpu_id: 0}
  - {engine_id: far, backend: openai, base_url: "http://10.0.0.7:8000/v1"}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import YamlConfigSettingsSource

from rsm.broker.errors import InvalidRequest
from rsm.broker.settings import Settings
from rsm.workers.config import EngineConfig

NAME = "rsm.yaml"


class FleetFile(BaseModel):
    """The content of such a file. Anything else in it is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    engines: list[EngineConfig] = Field(default_factory=list)
    routers: int = Field(default=1, ge=1)
    settings: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_are_valid(self) -> FleetFile:
        ids = [engine.engine_id for engine in self.engines]
        if twice := {i for i in ids if ids.count(i) > 1}:
            raise ValueError(f"engine_id {', '.join(sorted(twice))} is used twice; give each engine an id of its own")
        if unknown := self.settings.keys() - Settings.model_fields.keys():
            raise ValueError(f"settings has no {', '.join(sorted(unknown))}; docs/operations.md lists all settings")
        return self

    def applied(self) -> Settings:
        """The settings of the environment; for those that it does not set, the file's."""
        return Settings.with_defaults(self.settings)


def read_fleet(path: Path) -> FleetFile:
    """Reads a file.

    Raises:
        InvalidRequest: there is no such file, or it does not describe a fleet; the message says where and why.
    """
    if not path.is_file():
        raise InvalidRequest(f"There is no file {path}. Create it, or name another one.")
    try:
        found = YamlConfigSettingsSource(Settings, yaml_file=path)()
        return FleetFile.model_validate(found)
    except ImportError:
        raise InvalidRequest(f"Reading {path} needs PyYAML: pip install 'rsm-engine[cli]'.") from None
    except ValidationError as e:
        wrong = (f"{'.'.join(map(str, x['loc']))}: {x['msg']}".lstrip(": ") for x in e.errors(include_url=False))
        raise InvalidRequest(f"{path} does not describe a fleet: {'; '.join(wrong)}.") from None
    except Exception as e:  # PyYAML's own classes, without importing it; also bytes that are not text
        line = getattr(getattr(e, "problem_mark", None), "line", None)
        where = "" if line is None else f", line {line + 1}"
        raise InvalidRequest(f"{path} cannot be read as YAML ({type(e).__name__}{where}).") from None
