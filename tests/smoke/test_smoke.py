"""The shortest way through everything: an export and a decode of each family, and the routes of the server.
Part of `make test-fast`."""

from __future__ import annotations

import httpx
import pytest
from demo import PLAN, PROMPT, demo_task
from serving import serving

from trt_runtime.artifact import contract
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.decoding.plans import names_for
from trt_runtime.measure import cases, replay


def test_every_family_is_exported_and_decodes(tiny_artifact):
    """A batch of ragged cases in every cache mode gives each row what it gets alone; both graphs are the
    contract's."""
    backend = OrtBackend(tiny_artifact, threads=1)
    manifest = backend.manifest
    for role in contract.ROLES:
        names = [name for name, _, _ in manifest.graphs[role].inputs]
        assert names == [spec.name for spec in contract.inputs(role, manifest.dims)]
    recorded = replay.record(backend, cases.random_cases(manifest, 6))["cases"]
    assert {case["mode"] for case in recorded} == set(names_for("full"))
    together = replay.replay_together(backend, recorded)
    assert [replay.compare(case, done) for case, done in zip(recorded, together, strict=True)] == [None] * 6
    backend.close()


def test_the_demo_model_answers(model):
    (result,) = model.generate([PROMPT])
    assert demo_task.is_right(result.text, PLAN), result.text
    assert (
        result.prefix_passes
        and result.refine_steps
        and result.nfe == result.prefix_passes + result.refine_steps
    )


@pytest.fixture(scope="module")
def url(model):
    with serving(model, slots=2) as (address, _):
        yield address


def test_the_routes_answer(url):
    chat = {"model": "demo", "messages": [{"role": "user", "content": PROMPT}]}
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "demo"
    assert httpx.get(f"{url}/health").status_code == 200
    answer = httpx.post(f"{url}/v1/chat/completions", json=chat, timeout=60).json()
    assert demo_task.is_right(answer["choices"][0]["message"]["content"], PLAN)
    plain = httpx.post(f"{url}/v1/completions", json={"model": "demo", "prompt": PROMPT}, timeout=60).json()
    assert plain["choices"][0]["text"] and plain["usage"]["completion_tokens"] > 0
    streamed = httpx.post(f"{url}/v1/chat/completions", json=chat | {"stream": True}, timeout=60).text
    assert streamed.startswith("data: ") and streamed.rstrip().endswith("data: [DONE]")
    assert 'dllm_forwards_total{kind="prefix_pass"}' in httpx.get(f"{url}/metrics").text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"policy": "nothing"}, None),
        ({"no_such_field": 1}, "no_such_field"),
        ({"model": "other"}, "model"),
    ],
)
def test_what_is_refused_is_an_error_of_openais_form(url, body, param):
    chat = {"model": "demo", "messages": [{"role": "user", "content": PROMPT}]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=chat | body, timeout=60)
    error = answer.json()["error"]
    assert (
        400 <= answer.status_code < 500
        and error["message"]
        and set(error) == {"message", "type", "param", "code"}
    )
    assert error["param"] == param or param is None
