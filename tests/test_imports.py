"""What a process loads when it opens one of the light doors."""

import json
import pkgutil
import subprocess
import sys

import pytest

import flows

FLOW_MODULES = sorted(f"flows.{module.name}" for module in pkgutil.iter_modules(flows.__path__))


def modules_after(statement: str) -> list[str]:
    """Names in sys.modules of a fresh process after a statement, in the order of loading."""
    code = f"import sys, json\n{statement}\njson.dump(list(sys.modules), sys.stdout)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    names: list[str] = json.loads(done.stdout)
    return names


def test_flows_load_neither_torch_nor_ray_data() -> None:
    loaded = modules_after("import " + ", ".join(FLOW_MODULES))
    assert set(FLOW_MODULES) <= set(loaded)
    assert "prefect" in loaded
    assert {"torch", "ray", "ray.data"}.isdisjoint(loaded)


@pytest.mark.parametrize("module", ["flows.cli", "jobs.cli", "jobs.contract", "jobs.config_file", "unetpp.config"])
def test_the_command_line_and_the_contract_load_no_heavy_library(module: str) -> None:
    loaded = modules_after(f"import {module}")
    assert {"torch", "ray", "prefect", "numpy", "pyarrow", "botocore"}.isdisjoint(loaded)


@pytest.mark.parametrize("module", ["flows.train", "flows.archive", "flows.nightly", "flows.backfill"])
def test_a_flow_command_sets_prefects_environment_before_prefect_is_loaded(module: str) -> None:
    loaded = modules_after(f"import {module}")
    assert loaded.index("flows.embedded") < loaded.index("prefect")
