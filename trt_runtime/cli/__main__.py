"""`python -m trt_runtime.cli`: the command `dllm-trt`."""

import sys

from trt_runtime.cli.main import main

sys.exit(main())
