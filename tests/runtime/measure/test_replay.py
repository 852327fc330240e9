"""Decoding against the recorded cases: tokens, order and number of forwards, alone and in batches."""

from __future__ import annotations

import copy
from collections import defaultdict

import numpy as np
import pytest
from recorded import CASE

from trt_runtime.backends.ort import OrtBackend
from trt_runtime.decoding.cache_plan import NoCache
from trt_runtime.decoding.generator import Generator
from trt_runtime.decoding.plans import PLANS
from trt_runtime.decoding.policies.confidence import Factor, Threshold
from trt_runtime.decoding.policies.schedules import Fixed
from trt_runtime.decoding.rules import Rules
from trt_runtime.decoding.sequence import Sequence
from trt_runtime.measure import replay, tolerances
from trt_runtime.measure.cases import random_cases


def _first_mismatches(backend, cases, margin=0.0):
    found = [(case, replay.compare(case, replay.replay(backend, case), margin)) for case in cases]
    return [mismatch for _, mismatch in found if mismatch is not None]


def test_all_goldens_exactly_on_onnx_runtime(golden_backend, golden_cases):
    assert len(golden_cases) == 79
    assert _first_mismatches(golden_backend, golden_cases) == []


def test_all_goldens_exactly_on_the_reference(golden_artifact, golden_checkpoint, golden_cases):
    reference = pytest.importorskip("export.parity.reference")
    backend = reference.TorchBackend(golden_artifact, checkpoint=str(golden_checkpoint), threads=1)
    assert _first_mismatches(backend, golden_cases) == []


def test_goldens_in_fp16(golden_fp16, golden_family, golden_cases):
    """Cases that claim to hold in fp16: exact, or AMBIGUOUS within the margin of that dtype, and few of
    those.

    The recording code rounds in other places than ONNX Runtime does, so a decision within the rounding may
    differ.
    """
    cases = [case for case in golden_cases if replay.must_match(case, "fp16")]
    found = _first_mismatches(OrtBackend(golden_fp16, threads=1), cases, tolerances.CONFIDENCE["fp16"])
    assert len(cases) == {"llada": 57, "dream": 47}[golden_family]
    assert [str(item) for item in found if not item.ambiguous] == []
    assert len(found) <= 7  # LLaDA 4, Dream 7


def test_goldens_recorded_as_one_batch_come_out_as_one_batch(golden_backend, golden_cases):
    groups = defaultdict(list)
    for case in golden_cases:
        for tag in case["tags"]:
            if tag.startswith("batch_group"):
                groups[tag, case["mode"]].append(case)
    assert len(groups) == len({mode for _, mode in groups}) >= 2 and all(
        len(cases) == 4 for cases in groups.values()
    )
    for cases in groups.values():
        replayed = replay.replay_together(golden_backend, cases)
        assert [replay.compare(case, done) for case, done in zip(cases, replayed, strict=True)] == [None] * 4


@pytest.mark.parametrize("seed", range(2))
def test_every_row_of_a_ragged_batch_equals_its_run_alone(golden_backend, golden_cases, seed):
    """Rows of unequal prompts, lengths, blocks, caches and policies, in random company and order."""
    cases = [golden_cases[i] for i in np.random.default_rng(seed).permutation(len(golden_cases))]
    for i in range(0, len(cases), 9):
        together = replay.replay_together(golden_backend, cases[i : i + 9])
        for case, done in zip(cases[i : i + 9], together, strict=True):
            assert replay.compare(case, done) is None


def test_a_case_of_several_rows_merges_them(golden_backend, golden_cases):
    rows = [case for case in golden_cases if "-dual-thr0.9-batchgrpA" in case["id"]]
    case = rows[0] | {"prompt": [row["prompt"][0] for row in rows], "id": "merged"}
    done = replay.replay(golden_backend, case).result
    assert done["output"] == [row["output"][0] for row in rows]
    assert done["nfe"] == max(row["nfe_nonempty"] for row in rows)
    assert all(len(position) == 2 for step in done["trace"] for position in step[3])


def test_where_the_v1_code_leaves_masks_we_do_not(golden_backend, golden_cases):
    """One step per block: that code commits the first position and leaves the rest (tagged 'quirk'). Here the
    deviation wins: the block is finished by a second forward, and its trace is followed as far as it goes."""
    left = [case for case in golden_cases if any(1000 in row for row in case["output"])]
    assert len(left) == {"llada": 0, "dream": 2}[golden_backend.manifest.model.family]
    for case in left:
        assert "quirk: spb=1 leaves masks" in case["tags"]
        done = replay.replay(golden_backend, case).result
        assert not any(1000 in row for row in done["output"])
        assert [len(step[3]) for step in done["trace"]] == [1, 7, 1, 7]
        assert done["trace"][0] == case["trace"][0]
        assert "step 0" in str(
            replay.compare(case | {"trace": [["full", 0, 22, [6], [1]]]}, replay.replay(golden_backend, case))
        )


def test_mismatches_are_found_and_located(golden_backend, golden_cases):
    case = copy.deepcopy(next(c for c in golden_cases if c["mode"] == "dual"))
    done = replay.replay(golden_backend, case)
    step = next(i for i, s in enumerate(case["trace"]) if i > 2 and s[3])
    number = len([s for s in case["trace"][:step] if s[3]])
    wrong_token = copy.deepcopy(case)
    wrong_token["trace"][step][4][0] += 1
    assert f"step {number}: position {case['trace'][step][3][0]}: expected token" in str(
        replay.compare(wrong_token, done)
    )
    wrong_position = copy.deepcopy(case)
    wrong_position["trace"][step][3][0] += 1
    assert f"step {number}: position" in str(replay.compare(wrong_position, done))
    fewer = copy.deepcopy(case)
    del fewer["trace"][-1]
    fewer["trace"] = [s for s in fewer["trace"] if s[3]]
    assert "forwards" in str(replay.compare(fewer, done)) or "step" in str(replay.compare(fewer, done))
    assert "nfe" in str(
        replay.compare({k: v for k, v in case.items() if k != "trace"} | {"nfe_nonempty": 99}, done)
    )
    output = copy.deepcopy(case)
    del output["trace"]
    output["output"][0][3] += 1
    assert "generated token 3" in str(replay.compare(output, done))


def _near_tie(backend, case):
    """The case with one more position expected in its second forward, and the margin that explains it."""
    done = replay.replay(backend, case)
    candidates, stats, _ = done.rows[0].trace[1].seen
    chosen = set(done.rows[0].trace[1].positions)
    confidence, position = max(
        (float(c), int(p)) for p, c in zip(candidates, stats.confidence, strict=True) if int(p) not in chosen
    )
    changed = case | {"trace": copy.deepcopy(done.result["trace"])}
    step = changed["trace"][1]
    token = int(stats.token[list(candidates).index(position)])
    merged = sorted([*zip(step[3], step[4], strict=True), (position, token)])
    step[3], step[4] = [p for p, _ in merged], [t for _, t in merged]
    # the margin is defined at a confidence of 0.5
    return changed, done, (0.9 - confidence) / (4 * confidence * (1 - confidence))


def test_a_near_tie_is_ambiguous_and_a_far_one_is_not(golden_backend, golden_cases):
    """The expected decision lies within the margin of the confidences that were seen, or it does not."""
    case, done, scale = _near_tie(
        golden_backend, next(c for c in golden_cases if c["id"].endswith("-dual-thr0.9-P9-G64-B32"))
    )
    assert replay.compare(case, done, scale * 1.01 + 1e-6).ambiguous
    assert not replay.compare(case, done, scale * 0.9).ambiguous


def test_a_near_tie_between_synchronisations_is_ambiguous_too(golden_artifact, golden_backend, golden_cases):
    """The host sees no confidences of those steps. Seen on an H100: a case AMBIGUOUS with one step per
    synchronisation was a MISMATCH with four."""
    case, _, scale = _near_tie(
        golden_backend, next(c for c in golden_cases if c["id"].endswith("-dual-thr0.9-P9-G64-B32"))
    )
    backend = OrtBackend(golden_artifact, threads=1)
    backend.steps_per_sync = 4
    done, near = replay.replay_and_compare(backend, case, scale * 1.01 + 1e-6)
    assert done.rows[0].trace[1].seen is None and near.ambiguous
    assert not replay.replay_and_compare(backend, case, scale * 0.9)[1].ambiguous
    assert not replay.replay_and_compare(backend, case)[1].ambiguous
    assert backend.steps_per_sync == 4


def test_arbitrary_tokens_and_positions_at_low_confidence_are_no_near_ties(golden_fp16):
    """Where every confidence is small, a margin as wide as they are would accept anything."""
    from trt_runtime.decoding.policies.base import RowStats

    class Flat(OrtBackend):
        def run(self, cache, slots, window, names):
            made = super().run(cache, slots, window, names)
            rng = np.random.default_rng(int(window.input_ids.sum()))
            confidence = (0.01 + 0.01 * rng.random(made["confidence"].shape)).astype(np.float32)
            return made | {"confidence": confidence, "runner_up": confidence * 0.8}

    backend = Flat(golden_fp16, threads=1)
    case = CASE | {"threshold": None, "steps": 8, "gen_length": 8, "block_length": 8, "id": "flat"}
    recorded = replay.record(backend, [case])["cases"][0]
    assert replay.follow(backend, recorded, tolerances.CONFIDENCE["fp16"]).ambiguous == 0
    for change in ("token", "position"):
        wrong = copy.deepcopy(recorded)
        step = wrong["trace"][1]
        if change == "token":
            step[4][0] = (step[4][0] + 1) % 1000
        else:
            later = wrong["trace"][-1]  # the least confident of all
            step[3][0], step[4][0] = later[3][0], later[4][0]
        found = replay.follow(backend, wrong, tolerances.CONFIDENCE["fp16"])
        assert found.mismatch is not None and "step 1" in str(found.mismatch), change
    assert RowStats(*(np.ones(1),) * 4).margin == 0


def test_a_case_is_followed_through_a_near_tie_and_stopped_at_a_mismatch(golden_backend, golden_cases):
    """What the case wrote is written, so that the decisions after a near tie are compared too."""
    case = next(c for c in golden_cases if c["id"].endswith("-dual-thr0.9-P9-G64-B32"))
    recorded = replay.record(golden_backend, [case])["cases"][0]
    assert replay.follow(golden_backend, recorded, 0.0) == replay.Agreement(len(recorded["trace"]), 0, None)
    held_back = copy.deepcopy(recorded)
    number = next(i for i, step in enumerate(held_back["trace"]) if len(step[3]) > 2)
    candidates = replay.replay(golden_backend, case).rows[0].trace[number].seen
    confidence = dict(zip(candidates[0].tolist(), candidates[1].confidence.tolist(), strict=True))
    last = min(held_back["trace"][number][3], key=lambda position: confidence[position])
    index = held_back["trace"][number][3].index(last)
    del held_back["trace"][number][3][index], held_back["trace"][number][4][index]
    wide = (confidence[last] - 0.9) / (4 * confidence[last] * (1 - confidence[last])) + 1e-3
    found = replay.follow(golden_backend, held_back, wide)
    assert found.ambiguous == 1 and found.decisions > number + 1  # it went on, with the canvas as recorded
    assert replay.follow(golden_backend, held_back, 0.0).decisions == number + 1


def test_recorded_cases_replay(golden_backend, golden_artifact):
    recorded = replay.record(golden_backend, random_cases(golden_backend.manifest, 24))
    assert {case["mode"] for case in recorded["cases"]} == {"none", "prefix", "dual"}
    assert _first_mismatches(OrtBackend(golden_artifact, threads=1), recorded["cases"]) == []


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_gaps_in_the_prompt_are_filled_and_nothing_else_is_touched(golden_backend, cache):
    rng = np.random.default_rng(7)
    for gen in (0, 10):
        prompt = rng.integers(0, 1000, 30)
        gaps = [3, 4, 5, 17, 28]
        prompt[gaps] = 1000
        rules = Rules(gen, 8, PLANS.find(cache)(), Threshold(0.9), 1000, (1001,))
        row = Sequence(prompt, rules)
        Generator(golden_backend, [row]).run()
        assert not row.is_masked.any()
        kept = [i for i in range(30) if i not in gaps]
        assert (row.canvas[kept] == prompt[kept]).all()


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("policy", [Fixed(3), Threshold(0.9), Factor(0.5)])
def test_a_last_block_may_be_shorter(golden_backend, cache, policy):
    row = Sequence(np.arange(5), Rules(21, 8, PLANS.find(cache)(), policy, 1000, (1001,)))
    Generator(golden_backend, [row]).run()
    assert len(row.output) == 21 and not row.is_masked.any()
    blocks = {step.start for step in row.trace if step.kind == "refine_block"}
    assert cache != "dual" or blocks <= {5, 13, 21}


def test_blocks_are_finished_from_left_to_right(golden_backend, golden_cases):
    """No position right of a block is written before the block's last mask is gone."""
    for case in golden_cases[:40]:
        row = replay.replay(golden_backend, case).rows[0]
        written = [
            (position - row.prompt_length) // case["block_length"]
            for step in row.trace
            for position in step.positions
        ]
        assert written == sorted(written)


class _Scripted:
    """A policy that commits what the test says: for the end-of-sequence rule."""

    name = "scripted"

    def __init__(self, order):
        self.order = iter(order)

    def select(self, stats, is_masked, state):
        chosen = np.zeros_like(is_masked)
        chosen[next(self.order)] = True
        return chosen


def test_a_row_ends_at_eos_only_when_everything_before_it_stands():
    from trt_runtime.decoding.policies.base import RowStats

    rules = Rules(6, 6, NoCache(), _Scripted([2, 0, 0]), 1000, (1001,), stop_at_eos=True)
    row = Sequence(np.array([1, 2]), rules)
    tokens = np.array([7, 8, 1001, 9, 9, 9])
    for number in range(3):
        assert not row.is_finished
        forward = row.next_forward()
        made = tokens[forward.candidates - 2]
        zeros = np.zeros(len(made))
        row.commit(forward, RowStats(made, zeros, zeros, zeros))
        assert row.is_finished == (number == 2)
    assert row.output.tolist() == [7, 8, 1001, 1001, 1001, 1001]
    assert row.num_useful == 2


def test_padding_at_the_left_of_a_row_is_not_part_of_it(golden_backend, golden_cases):
    """The row with its padding decodes as the row without it; its trace counts the padding."""
    case = (
        next(c for c in golden_cases if c["mode"] == "dual" and c["threshold"] == 0.9)
        if golden_cases
        else None
    )
    padded = case | {
        "prompt": [[1001] * 3 + case["prompt"][0]],
        "attention_mask": [[False] * 3 + [True] * len(case["prompt"][0])],
    }
    alone, beside = (replay.replay(golden_backend, c).result for c in (case, padded))
    assert beside["output"] == alone["output"] and beside["full_output"][0][:3] == [1001] * 3
    assert [[p + 3 for p in step[3]] for step in alone["trace"]] == [step[3] for step in beside["trace"]]
    assert (
        beside["trace"][0][2] == alone["trace"][0][2] + 3
        and beside["trace"][1][1] == alone["trace"][1][1] + 3
    )


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_gaps_never_cost_an_empty_forward_and_recordings_replay(golden_backend, cache):
    """Gaps in a prompt take part of a schedule's quota; the block then outlasts it, and every forward writes
    something."""
    case = CASE | {
        "mode": cache,
        "prompt": [[1, 1000, 1000, 4, 1000]],
        "threshold": None,
        "steps": 8,
        "gen_length": 8,
    }
    recorded = replay.record(golden_backend, [case])["cases"][0]
    assert all(step[3] for step in recorded["trace"])
    assert not any(1000 in row for row in recorded["full_output"])
    assert replay.compare(recorded, replay.replay(golden_backend, recorded)) is None
    wrong = recorded | {"full_output": [[0] * 13]}
    assert "full_output" in str(replay.compare(wrong, replay.replay(golden_backend, recorded)))
    assert "nfe" in str(replay.compare(recorded | {"nfe": 99}, replay.replay(golden_backend, recorded)))
