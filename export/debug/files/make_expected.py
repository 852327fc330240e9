"""What was recorded, in the form that `polygraphy run --load-outputs` reads: expected-ROLE.json, and
expected-ROLE-pytorch.json where PyTorch's outputs were recorded too.

    python make_expected.py
"""

from collections import OrderedDict
from pathlib import Path

import numpy as np
from polygraphy.comparator import IterationResult, RunResults

HERE = Path(__file__).resolve().parent


def main():
    for folder, name, ending in (("expected", "recorded", ""), ("expected-pytorch", "PyTorch", "-pytorch")):
        for role in ("prefix", "refine"):
            files = sorted((HERE / folder).glob(f"{role}-*.npz"))
            if not files:
                continue
            iterations = []
            for file in files:
                with np.load(file) as arrays:
                    iterations.append(
                        IterationResult(
                            OrderedDict((key, arrays[key]) for key in arrays.files), runner_name=name
                        )
                    )
            results = RunResults()
            results[name] = iterations
            results.save(str(HERE / f"expected-{role}{ending}.json"))
            print(f"expected-{role}{ending}.json: {len(iterations)} calls")


if __name__ == "__main__":
    main()
