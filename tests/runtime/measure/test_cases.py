"""Files of recorded cases: malformed ones are refused, and positions are never ambiguous."""

from __future__ import annotations

import copy

import pytest
from recorded import CASE

from trt_runtime.errors import DllmError
from trt_runtime.measure import replay


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": "abc"}, "prompt is abc"),
        ({"prompt": [1, 2]}, "prompt is [1, 2]"),
        ({"prompt": []}, "prompt is []"),
        ({"prompt": [[1.5]]}, "prompt is [[1.5]]"),
        ({"prompt": None}, "prompt is null"),
        ({"prompt": [[]]}, "the prompt is empty"),
        ({"gen_length": "8"}, "gen_length is 8"),
        ({"gen_length": -5}, "gen_length is -5"),
        ({"gen_length": 600}, "more than the model's"),
        ({"block_length": 0}, "block_length is 0"),
        ({"block_length": 1.5}, "block_length is 1.5"),
        ({"threshold": "x"}, "threshold is x"),
        ({"factor": [1]}, "factor is [1]"),
        ({"threshold": None}, "has no 'steps'"),
        ({"mode": "both"}, "unknown mode 'both'"),
        ({"mode": 3}, "mode is 3"),
        ({"mask_token_id": 7}, "mask_token_id is 7"),
        ({"trace": 5}, "trace is 5"),
        ({"trace": [["full", 0, 1]]}, "trace is"),
        ({"trace": [["full", 0, 1, [3], []]]}, "trace is"),
        ({"attention_mask": [[True, False, True]]}, "attention_mask is"),
        ({"attention_mask": [[True]]}, "attention_mask is"),
        ({"attention_mask": [[False] * 3]}, "attention_mask is"),
        ({"alg": "best"}, "unknown alg 'best'"),
        ({"alg": 3}, "alg is 3"),
        ({"alg": [3]}, "alg is [3]"),
        ({"top_p": 2}, "top_p is 2"),
        ({"top_k": 0}, "top_k is 0"),
        ({"alg": "entropy"}, "has no 'steps'"),
        ({"alg": "confidence_threshold", "threshold": None, "steps": 4}, "threshold is null"),
        ({"output": [5]}, "output is [5]"),
        ({"output": None}, "output is null"),
    ],
)
def test_malformed_cases_are_refused(golden_backend, change, said):
    with pytest.raises(DllmError) as error:
        replay.replay(golden_backend, CASE | change)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_wrong_positions_and_mask_tokens_are_never_ambiguous(golden_backend):
    """However wide the margin: what no confidence could have decided is a mismatch."""
    done = replay.replay(golden_backend, CASE)
    for position, token in ((9999, 5), (9, 5), (0, 5)):
        case = CASE | {"trace": copy.deepcopy(done.result["trace"])}
        case["trace"][0][3].append(position)
        case["trace"][0][4].append(token)
        assert not replay.compare(case, done, 10.0).ambiguous
    case = CASE | {"trace": copy.deepcopy(done.result["trace"])}
    case["trace"][0][4][0] = 1000
    assert not replay.compare(case, done, 10.0).ambiguous
