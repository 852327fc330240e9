"""What an artifact's directory may hold: listed files, links to them, notes; and graphs that refer to nothing
else."""

from __future__ import annotations

import json
import os
import shutil

import onnx
import pytest

from trt_runtime.artifact import graph_file
from trt_runtime.artifact import manifest as manifests
from trt_runtime.cli.main import main
from trt_runtime.errors import DllmError
from trt_runtime.model import load

PROMPT = "take red cups from kitchen to garage, then hand blue pens to Mia, and clean hall with mop"


@pytest.fixture
def artifact(demo_artifact, tmp_path):
    return shutil.copytree(demo_artifact, tmp_path / "artifact")


def refused(artifact, *said: str) -> None:
    with pytest.raises(DllmError) as error:
        manifests.load(artifact)
    message = str(error.value)
    assert all(part in message for part in said) and "\n" not in message, message


def changed(artifact, change, role: str = "refine") -> None:
    """Change a graph, and list it anew, as someone would who wants it to be believed."""
    path = artifact / f"{role}.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    relist(artifact, path.name)


def relist(artifact, name: str) -> None:
    path = artifact / "manifest.json"
    read = json.loads(path.read_text())
    read["files"][name] = {
        "size": (artifact / name).stat().st_size,
        "sha256": manifests.sha256_of(artifact / name),
    }
    path.write_text(json.dumps(read))


def placed(tensor: onnx.TensorProto, **entries: object) -> None:
    for key, value in entries.items():
        held = next(
            (entry for entry in tensor.external_data if entry.key == key), None
        ) or tensor.external_data.add(key=key)
        held.value = str(value)


def outside(model) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.external_data)


@pytest.mark.parametrize(
    "name",
    [
        "extra.data",
        "weights2.data",
        "tokenizer/more.json",
        "deep/er/file",
        ".hidden",
        "model.onnx",
        "manifest.json.bak",
    ],
)
def test_files_that_are_not_listed_are_refused(artifact, name, capsys):
    (artifact / name).parent.mkdir(parents=True, exist_ok=True)
    (artifact / name).write_bytes(b"x")
    refused(artifact, name, "the manifest does not list it", "remove it")
    assert main(["info", str(artifact), "--check"]) == 1 and name in capsys.readouterr().err


def test_notes_that_no_reader_looks_at_may_lie_there(artifact):
    for name in (
        "README.md",
        "LICENSE",
        "LICENSE.txt",
        ".gitattributes",
        ".git/config",
        ".cache/huggingface/download/x.metadata",
    ):
        (artifact / name).parent.mkdir(parents=True, exist_ok=True)
        (artifact / name).write_text("x")
    manifests.load(artifact, check_hashes=True)
    assert list(manifests.foreign_files(artifact)) == []


@pytest.mark.parametrize(
    "location",
    [
        "other.data",
        "../weights.data",
        "/etc/passwd",
        "./weights.data",
        "tokenizer/../weights.data",
        "",
        "*/_ORT_MEM_ADDR_/*",
        "manifest.json",
    ],
)
def test_graphs_that_take_weights_from_elsewhere_are_refused(artifact, location):
    changed(artifact, lambda model: placed(outside(model), location=location))
    refused(artifact, "refine.onnx: reads weights from", "which the manifest does not list")


def test_listed_files_beside_an_unlisted_one_are_still_checked(artifact):
    """The graph's weights point at a file that was put beside the listed ones."""
    shutil.copy(artifact / "weights.data", artifact / "mine.data")
    changed(
        artifact,
        lambda model: [
            placed(tensor, location="mine.data") for tensor in model.graph.initializer if tensor.external_data
        ],
        "prefix",
    )
    refused(artifact, "mine.data", "does not list it")
    (artifact / "mine.data").unlink()
    refused(artifact, "prefix.onnx: reads weights from 'mine.data'")


@pytest.mark.parametrize(
    "entries", [{"offset": 1 << 40}, {"length": 1 << 40}, {"offset": -1}, {"length": -5}]
)
def test_weights_beyond_their_file_are_refused(artifact, entries):
    changed(artifact, lambda model: placed(outside(model), **entries))
    refused(artifact, "refine.onnx: reads", "the files come from different exports", "export it again")


def test_a_cut_file_that_was_listed_anew_is_refused(artifact):
    data = (artifact / "weights.data").read_bytes()
    (artifact / "weights.data").write_bytes(data[: len(data) // 2])
    relist(artifact, "weights.data")
    refused(artifact, "the files come from different exports")


@pytest.mark.parametrize(
    "where", ["graph", "attribute", "subgraph", "sparse", "function", "default", "training"]
)
def test_weights_are_found_wherever_they_stand(artifact, where):
    """Also in a node's attribute, the graph of a control flow node, a sparse tensor, a function's nodes or
    the defaults of its attributes."""
    tensor = onnx.TensorProto(name="t", dims=[1], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    placed(tensor, location="elsewhere.data")

    def change(model) -> None:
        if where == "graph":
            model.graph.initializer.append(tensor)
        elif where == "attribute":
            model.graph.node.append(onnx.helper.make_node("Constant", [], ["t"], value=tensor))
        elif where == "subgraph":
            inner = onnx.GraphProto(name="g", initializer=[tensor])
            model.graph.node.append(
                onnx.helper.make_node("If", ["c"], ["t"], then_branch=inner, else_branch=inner)
            )
        elif where == "function":
            model.functions.add(name="F", domain="").node.append(
                onnx.helper.make_node("Constant", [], ["t"], value=tensor)
            )
        elif where == "default":
            model.functions.add(name="F", domain="").attribute_proto.append(
                onnx.helper.make_attribute("value", tensor)
            )
        elif where == "training":
            model.training_info.add().initialization.initializer.append(tensor)
        else:
            model.graph.sparse_initializer.add().values.CopyFrom(tensor)

    changed(artifact, change)
    refused(artifact, "reads weights from 'elsewhere.data'")


@pytest.mark.parametrize("domain", ["com.microsoft", "my.ops", "ai.onnx.ml", "com.microsoft.nchwc"])
def test_operators_of_other_domains_are_refused(artifact, domain):
    changed(
        artifact,
        lambda model: model.graph.node.append(
            onnx.helper.make_node("Op", ["input_ids"], ["x"], domain=domain)
        ),
    )
    refused(artifact, f"refine.onnx: contains the operator {domain}.Op", "do not use it")


@pytest.mark.parametrize(
    "data", [b"", b"\x00" * 100, b"\x3a\xff\xff\xff\xff\x7f", b"not a graph at all", b"\x3a\x02\x0a\x00"]
)
def test_what_is_no_graph_is_one_line(artifact, data):
    (artifact / "refine.onnx").write_bytes(data)
    relist(artifact, "refine.onnx")
    refused(artifact, "refine.onnx: not a valid ONNX graph")


def test_graphs_are_read_as_the_onnx_package_reads_them(artifact, golden_artifact, tiny_artifact):
    for path in (path for held in (artifact, golden_artifact, tiny_artifact) for path in held.glob("*.onnx")):
        model, found = onnx.load(path, load_external_data=False), graph_file.read(path)
        expected = set()
        for tensor in model.graph.initializer:
            if entries := {entry.key: entry.value for entry in tensor.external_data}:
                expected.add((entries["location"], int(entries["offset"]), int(entries["length"])))
        assert found.data == expected and len(expected) > 10
        assert found.operators == {(node.domain, node.op_type) for node in model.graph.node}


def linked(artifact, root):
    """An artifact as the Hub's cache holds it: files under blobs/, by their hashes, and links to them in a
    snapshot."""
    snapshot = root / "models--org--name" / "snapshots" / ("0" * 40)
    for number, file in enumerate(sorted(path for path in artifact.rglob("*") if path.is_file())):
        blob, link = (
            root / "models--org--name" / "blobs" / f"{number:064x}",
            snapshot / file.relative_to(artifact),
        )
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_an_artifact_in_the_hubs_cache_runs_and_is_checked(artifact, tmp_path):
    expected = load(artifact, threads=1).generate([PROMPT])[0].tokens
    snapshot = linked(artifact, tmp_path)
    manifests.load(snapshot, check_hashes=True)
    assert load(snapshot, threads=1).generate([PROMPT])[0].tokens == expected
    blob = (snapshot / "weights.data").resolve()
    data = bytearray(blob.read_bytes())
    data[5000] ^= 1
    blob.write_bytes(data)
    with pytest.raises(DllmError, match=r"weights\.data: SHA-256 is"):
        manifests.load(snapshot, check_hashes=True)
    blob.write_bytes(data[:-1])
    refused(snapshot, "weights.data", "bytes, the manifest says")
    blob.unlink()
    refused(snapshot, "weights.data", "is a broken link")


def test_a_directory_of_links_to_an_artifact_runs(artifact, tmp_path):
    there = tmp_path / "links"
    there.mkdir()
    for path in artifact.iterdir():  # the tokenizer's directory as one link
        (there / path.name).symlink_to(path)
    assert (
        load(there, threads=1).generate([PROMPT])[0].tokens
        == load(artifact, threads=1).generate([PROMPT])[0].tokens
    )


def test_files_are_looked_for_one_by_one_and_not_below_notes(artifact, tmp_path, monkeypatch):
    """A link may lead to a whole file system."""
    for i in range(50):
        (tmp_path / "vast" / f"d{i:02}").mkdir(parents=True)
        (tmp_path / "vast" / f"d{i:02}" / "f").touch()
    walked, walk = [], os.walk

    def counted(*given, **options):
        for step in walk(*given, **options):
            walked.append(step[0])
            yield step

    monkeypatch.setattr(os, "walk", counted)
    (artifact / ".cache").symlink_to(tmp_path / "vast")
    manifests.load(artifact)
    assert not [where for where in walked if ".cache" in where]
    (artifact / "other").symlink_to(tmp_path / "vast")
    walked.clear()
    refused(artifact, "other/d00/f: the manifest does not list it")
    assert len([where for where in walked if "other" in where]) == 2


def test_a_link_to_a_directory_above_ends(artifact):
    (artifact / "tokenizer" / "loop").symlink_to(artifact)
    manifests.load(artifact)  # its files are those that are listed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["decoding"].update(tuned={"policy": []}), "decoding.tuned: policy is []"),
        (lambda m: m["decoding"].update(tuned={"gamma": {"a": 1}}), "decoding.tuned: gamma is"),
        (
            lambda m: m.update(
                quantization={"scheme": "w8a8", "target": "ort-cpu", "quality": {"kl_mean": 0.1}}
            ),
            "quality: same_token is None",
        ),
        (
            lambda m: m.update(
                quantization={"scheme": "w8a8", "target": "ort-cpu", "quality": {"kl_mean": "x"}}
            ),
            "quality: kl_mean is 'x'",
        ),
        (lambda m: m["decoding"].update(tuned={"gamma": 12345.5}), None),
    ],
)
def test_hostile_notes_in_a_manifest_are_one_line(artifact, change, said):
    path = artifact / "manifest.json"
    read = json.loads(path.read_text())
    change(read)
    path.write_text(json.dumps(read).replace("12345.5", "1e400"))
    refused(artifact, said or "the number 1e400 is not finite")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-1e999"])
def test_numbers_that_json_has_not_are_refused(artifact, number):
    path = artifact / "manifest.json"
    path.write_text(path.read_text().replace('"verified": null', f'"verified": {{"worst": {number}}}'))
    refused(artifact, "is not finite")
