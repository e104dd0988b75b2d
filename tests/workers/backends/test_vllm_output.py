"""The captured output of vLLM's processes while they start: passed on, and searched for the cause of a failure."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from rsm.workers.backends.base import EngineDied, EngineMisconfigured
from rsm.workers.backends.vllm.start.failure import failure, misconfigured, require_model
from rsm.workers.backends.vllm.start.output import Output, root_cause

LINES = """
(EngineCore pid=9) ERROR 11-29 10:48:02 [core.py:1136] Traceback (most recent call last):
(EngineCore pid=9) ERROR 11-29 10:48:02 [core.py:1136]     raise ValueError(
(EngineCore pid=9) ERROR 11-29 10:48:02 [core.py:1136] ValueError: the cause, and what to do
Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def test_the_cause_is_the_last_error_that_is_no_consequence() -> None:
    assert root_cause(LINES.splitlines()) == "ValueError: the cause, and what to do"
    assert root_cause(["torch.OutOfMemoryError: CUDA out of memory."]) == "OutOfMemoryError: CUDA out of memory."
    assert root_cause(["INFO all is well", "an Error: of nobody's"]) == ""
    assert root_cause([]) == ""


PROGRAM = """
import subprocess, sys
from rsm.workers.backends.vllm.start.output import Output
output = Output()
print("before", flush=True)
with output:
    print("within")
    child = subprocess.Popen([sys.executable, "-c", '''
import sys
print("of the child")
sys.stderr.write("KeyError: 'its cause'\\\\n")
'''])
    child.wait()
print("after", flush=True)
print("cause", output.cause(), flush=True)
"""


def test_everything_is_passed_on() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\n")[:2] == ["before", "within"]
    assert set(done.stdout.split("\n")) >= {"of the child", "after", "cause KeyError: 'its cause'"}
    assert done.stderr.strip() == "KeyError: 'its cause'"


def test_a_process_without_stdout() -> None:
    program = "import os; os.close(1); os.close(2)\n" + textwrap.dedent("""
        from rsm.workers.backends.vllm.start.output import Output
        output = Output()
        with output:
            pass
        assert output.cause() == ""
        os._exit(7)
    """)
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 7


@pytest.mark.parametrize(
    ("error", "permanent"),
    [
        (ValueError("Invalid repository ID or local directory specified"), True),
        (ValueError("Free memory on device (3/139 GiB) is less than desired"), False),
        (RuntimeError("CUDA error: out of memory"), False),
        (OSError("We couldn't connect to the hub to load this file"), False),
        (TypeError("unexpected keyword"), True),
    ],
)
def test_temporary_and_permanent_causes(error: Exception, permanent: bool) -> None:
    found = failure(error, Output())
    assert isinstance(found, EngineDied)
    assert isinstance(found, EngineMisconfigured) is permanent
    assert str(found).startswith(f"vLLM could not start: {type(error).__name__}: ")


def test_a_wrong_configuration_is_permanent() -> None:
    assert isinstance(misconfigured(ValueError("max_model_len may lead to CUDA errors")), EngineMisconfigured)
    assert not isinstance(misconfigured(OSError("connection timed out")), EngineMisconfigured)
    assert len(str(misconfigured(ValueError("x" * 9000)))) < 500


def test_a_path_to_a_model() -> None:
    require_model("Qwen/Qwen2.5-7B-Instruct")
    require_model("/")
    for path in ("/no/such", "./no/such", "~/no-such-folder"):
        with pytest.raises(EngineMisconfigured, match="There is no model at"):
            require_model(path)
