"""Fixtures: artifacts exported once a session, from the golden checkpoint, the demo checkpoint, and a tiny
one of each family."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
from places import BLOCK_CAUSAL_DEMO, DEMO, GOLDENS, export_quietly
from tiny import WHOLE_FAMILIES, write_checkpoint

from export import families
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.measure import recordings
from trt_runtime.measure.case_fields import Case
from trt_runtime.model import load

if sys.version_info < (3, 11):  # its newest ONNX Runtime knows no opset 24, which most tests export
    pytest.exit("the tests need Python 3.11 or newer; 'make demo' and exports run on 3.10", returncode=1)


# a shell starts background jobs with these ignored; processes that the tests interrupt would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def interruptible():
    """A command that ends ignores Ctrl-C from then on: in the process of the tests, only for one test."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def tiny(tmp_path):
    """Makes tiny LLaDA checkpoints."""

    def make(name="checkpoint", **options):
        return write_checkpoint(families.find("llada"), tmp_path / name, **options)

    return make


@pytest.fixture(scope="session", params=["llada", "dream"])
def golden_family(request) -> str:
    """The families that have recorded cases."""
    return request.param


@pytest.fixture(scope="session")
def golden_checkpoint(golden_family) -> Path:
    return GOLDENS / f"{golden_family}_tiny"


@pytest.fixture(scope="session")
def golden_artifact(golden_checkpoint, tmp_path_factory) -> Path:
    """The golden checkpoint in fp32, with logits."""
    return export_quietly(golden_checkpoint, tmp_path_factory.mktemp("golden") / "fp32", head="logits")


@pytest.fixture(scope="session")
def golden_fp16(golden_checkpoint, tmp_path_factory) -> Path:
    """The same in fp16, with statistics only."""
    return export_quietly(golden_checkpoint, tmp_path_factory.mktemp("golden") / "fp16", dtype="fp16")


@pytest.fixture(scope="session")
def golden_backend(golden_artifact) -> OrtBackend:
    return OrtBackend(golden_artifact, threads=1)


@pytest.fixture(scope="session")
def golden_cases(golden_family) -> list[Case]:
    return [case for case in recordings.read_cases(GOLDENS / "cases.json") if case["family"] == golden_family]


@pytest.fixture(scope="session")
def golden_units() -> dict:
    return json.loads((GOLDENS / "units.json").read_text())


@pytest.fixture(scope="session")
def demo_artifact(tmp_path_factory) -> Path:
    return export_quietly(DEMO, tmp_path_factory.mktemp("demo") / "artifact", head="logits")


@pytest.fixture(scope="session")
def block_causal_demo(tmp_path_factory) -> Path:
    return export_quietly(BLOCK_CAUSAL_DEMO, tmp_path_factory.mktemp("block-causal") / "artifact")


@pytest.fixture(scope="session", params=WHOLE_FAMILIES)
def tiny_checkpoint(request, tmp_path_factory) -> Path:
    """A tiny random checkpoint of each family, in the family's official layout."""
    return write_checkpoint(
        families.find(request.param), tmp_path_factory.mktemp(request.param) / "checkpoint"
    )


@pytest.fixture(scope="session")
def tiny_artifact(tiny_checkpoint, tmp_path_factory) -> Path:
    return export_quietly(tiny_checkpoint, tmp_path_factory.mktemp("tiny") / "fp32", head="logits")


@pytest.fixture(scope="session")
def model(demo_artifact):
    """The demo model, opened."""
    return load(demo_artifact, "ort", threads=1)


@pytest.fixture(scope="session")
def demo(model):
    """A server of it: its address and its worker."""
    from serving import serving

    with serving(model, slots=4) as (url, worker):
        yield url, worker


@pytest.fixture
def client(demo):
    import openai

    return openai.OpenAI(base_url=f"{demo[0]}/v1", api_key="none", max_retries=0)
