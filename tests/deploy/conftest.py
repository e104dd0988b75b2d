"""One wheel and one environment of each kind, shared by all tests of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy.installs import ALL, BASE, build_wheel, copy_checkout, install, install_pinned, make_venv, shared


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `pip wheel` builds from the checkout."""

    def make(folder: Path) -> None:
        copy_checkout(folder / "source")
        build_wheel(folder / "source", folder)

    (made,) = shared(tmp_path_factory, "wheel", make).glob("*.whl")
    return made


@pytest.fixture(scope="session")
def base_python(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """The Python of an environment without extras, as a producer installs it."""
    folder = shared(tmp_path_factory, "base", lambda f: install_pinned(make_venv(f / "venv"), wheel, BASE))
    return folder / "venv" / "bin" / "python"


@pytest.fixture(scope="session")
def cli_python(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """The Python of an environment with only the extra [cli], as pip resolves it."""

    def make(folder: Path) -> None:
        install(make_venv(folder / "venv"), f"{wheel}[cli]", "-c", str(BASE), "-c", str(ALL))

    return shared(tmp_path_factory, "cli", make) / "venv" / "bin" / "python"


@pytest.fixture(scope="session")
def all_python(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """The Python of an environment with the extra [all], as requirements/ pins it."""
    folder = shared(tmp_path_factory, "all", lambda f: install_pinned(make_venv(f / "venv"), wheel, BASE, ALL))
    return folder / "venv" / "bin" / "python"


@pytest.fixture(scope="session")
def editable_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with `pip install --editable` of a checkout."""

    def make(folder: Path) -> None:
        copy_checkout(folder / "source")
        python = make_venv(folder / "venv")
        install(python, "--no-deps", "-r", str(BASE), "--editable", str(folder / "source"))

    return shared(tmp_path_factory, "editable", make) / "venv" / "bin" / "python"
