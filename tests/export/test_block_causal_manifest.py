"""Manifests of block-causal artifacts: their facts, who can read them, and what says the block length."""

from __future__ import annotations

import json
import shutil
import sys
import types

import pytest
from official import BY_NAME
from places import GOLDENS, ROOT, export_quietly, refused

from export.parity.verify import verify
from trt_runtime.artifact import manifest as manifests


@pytest.fixture(scope="module", params=BY_NAME)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def artifact(family, tmp_path_factory):
    return BY_NAME[family].export(tmp_path_factory.mktemp(family) / "artifact")


def test_the_manifest_says_how_blocks_are_counted(family, artifact):
    facts = json.loads((artifact / "manifest.json").read_text())
    expected = {
        "sdar": ("absolute", 4, False, None),
        "fastdllm_v2": ("absolute", 32, True, 8),
        "a2d_qwen3": ("prompt_end", 32, False, None),
    }[family]
    keys = ("block_origin", "block_length", "next_from_store", "small_block")
    assert tuple(facts["decoding"][key] for key in keys) == expected
    assert (facts["decoding"]["attention"], facts["format_version"]) == ("block_causal", 2)
    assert [row[0] for row in facts["graphs"]["refine"]["inputs"][:5]] == [
        "input_ids",
        "position_ids",
        "write_index",
        "row_len",
        "logit_rows",
    ]


def _released_reader() -> types.ModuleType:
    """The reader of manifests that release 0.1 came with; the modules beside it moved since."""
    source = (ROOT / "tests" / "data" / "release-0.1" / "manifest.py").read_text()
    source = source.replace(
        "from trt_runtime import artifact_check, atomic, contract\n",
        "from trt_runtime.artifact import check as artifact_check, contract\n"
        "from trt_runtime.system import atomic\n",
    ).replace("from trt_runtime.artifact_check import", "from trt_runtime.artifact.check import")
    module = types.ModuleType("released_manifest")
    sys.modules[module.__name__] = module
    exec(compile(source, "manifest.py", "exec"), module.__dict__)
    return module


def test_readers_of_before_refuse_these_artifacts_alone(family, artifact, tmp_path):
    """An older reader would feed them kv_len, and get another attention without a word."""
    released = _released_reader()
    with pytest.raises(released.DllmError, match=r"format_version is 2, this") as error:
        released.load(artifact)
    assert "\n" not in str(error.value)
    full = export_quietly(GOLDENS / "a2d_qwen3_tiny", tmp_path / "full", attention="full")
    assert released.load(full).decoding.mask_token_id == 1000
    written = json.loads((full / "manifest.json").read_text())
    assert written["format_version"] == 1 and not {"attention", "block_length"} & set(written["decoding"])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"block_length": 0}, "decoding.block_length is 0, expected a whole number from 1"),
        ({"block_length": None}, "decoding.block_length is None, expected a whole number from 1"),
        ({"small_block": -1}, "decoding.small_block is -1"),
        ({"block_origin": "middle"}, "decoding.block_origin is 'middle', expected one of"),
        ({"attention": "sideways"}, "decoding.attention is 'sideways', expected one of"),
        ({"attention": "full"}, "decoding.block_length is given, but attention is 'full'"),
        ({"next_from_store": True}, "they go together"),
        ({"first_commit": True}, "first_commit with block-causal attention"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path, changed, said):
    made = BY_NAME["sdar"].export(tmp_path / "artifact")
    facts = json.loads((made / "manifest.json").read_text())
    facts["decoding"] |= changed
    (made / "manifest.json").write_text(json.dumps(facts))
    with pytest.raises(manifests.DllmError, match=r"manifest\.json") as error:
        manifests.load(made)
    assert said in str(error.value)


def test_the_block_length_is_asked_for_where_nothing_says_it(tmp_path, capsys):
    path = shutil.copytree(GOLDENS / "sdar_tiny", tmp_path / "checkpoint")
    config = json.loads((path / "config.json").read_text())
    del config["block_size"]
    (path / "config.json").write_text(json.dumps(config))
    refused(path, tmp_path / "out", "has no block_size", "--block-length (BLOCK_LENGTH=)")
    refused(path, tmp_path / "out", "--block-length is -2, expected a whole number from 1", block_length=-2)
    made = export_quietly(path, tmp_path / "out", block_length=16)
    assert manifests.load(made).decoding.block_length == 16
    assert manifests.load(made).source["block_length"] == 16
    assert [stage.passed for stage in verify(made)] == [True] * 6
    other = ["--checkpoint", str(GOLDENS / "sdar_tiny"), "--out", str(tmp_path / "other"), "--verify", "no"]
    from export import cli as exporter

    assert exporter.main([*other, "--block-length", "8"]) == 0
    assert "the block length is 8, as --block-length says; block_size is 4" in capsys.readouterr().err
    full = GOLDENS / "a2d_qwen3_tiny"
    refused(full, tmp_path / "full", "has full attention: remove it", attention="full", block_length=8)
    refused(path, tmp_path / "no", "SDAR has attention 'block_causal'", attention="full", block_length=4)
