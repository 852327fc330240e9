#!/usr/bin/env bash
# Polygraphy on the graphs of one artifact. Written by `dllm-trt polygraphy`; settings.sh has the shapes and tolerances.
#
#   ./run.sh look    [ROLE]      the graph, its inputs and outputs                                        (CPU)
#   ./run.sh lint    [ROLE]      ONNX Runtime runs every part of the graph                                (CPU; not bf16)
#   ./run.sh capability [ROLE]   what TensorRT's parser says of it: read the text, the exit status says nothing   (no GPU)
#   ./run.sh onnxrt  [ROLE]      ONNX Runtime beside what was recorded, output by output                  (CPU; not bf16)
#   ./run.sh convert [ROLE]      build an engine, for COMPUTE="8.9 12.0" with TensorRT-RTX                (RTX: no GPU)
#   ./run.sh compare [ROLE]      TensorRT beside what was recorded, output by output                      (GPU)
#   ./run.sh sanitize [ROLE]     fold constants into a graph of its own, ROLE.sanitized.onnx              (CPU)
#   ./run.sh first   ROLE BAD    the first tensor of another graph, or of BAD=trt, that differs           (CPU, or GPU)
#   ./run.sh reduce  ROLE BAD    the layer that is at fault: by halves, then one by one                   (CPU, or GPU)
#
# ROLE is prefix or refine (default: both). BAD is an ONNX file whose weights lie beside it, or `trt`: this graph on TensorRT.
# TensorRT-RTX: POLYGRAPHY_USE_TENSORRT_RTX=1 ./run.sh compare refine
set -euo pipefail
cd "$(dirname "$0")"
source ./settings.sh
what=${1:-}
roles=${2:-prefix refine}
tolerance() { local -n values="${1^^}_ATOL"; echo --atol "${values[@]}" --rtol 0 --check-error-stat max; }
shapes() { local -n low="${1^^}_MIN" opt="${1^^}_OPT" high="${1^^}_MAX"
  echo --trt-min-shapes "${low[@]}" --trt-opt-shapes "${opt[@]}" --trt-max-shapes "${high[@]}"; }
network() { echo --strongly-typed --decomposable-attentions --trt-network-postprocess-script postprocess.py:check_inputs; }
settings() { echo --trt-config-postprocess-script postprocess.py:configure; }
expected() { [ -f "expected-$1.json" ] || python make_expected.py >/dev/null; }
polygraphy() { command "${POLYGRAPHY:-polygraphy}" "$@"; }

golden() { # inputs and every value inside, of the good graph on ONNX Runtime, for the first recorded call
  [ -f "golden-$1.json" ] && return
  python - "$1" <<'PY'
import sys
from collections import OrderedDict

from load_windows import load
from polygraphy.json import save_json

save_json([OrderedDict(next(iter(load(sys.argv[1]))))], f"inputs-{sys.argv[1]}.json")
PY
  polygraphy run "$1.onnx" --onnxrt --onnx-outputs mark all --load-inputs "inputs-$1.json" --save-outputs "golden-$1.json" >/dev/null 2>&1 ||
    polygraphy run "$1.onnx" --onnxrt --onnx-outputs mark all --load-inputs "inputs-$1.json" --save-outputs "golden-$1.json"
  polygraphy data merge "inputs-$1.json" "golden-$1.json" -o "all-$1.json" >/dev/null
}

runner() { if [ "$2" = trt ]; then echo --trt $(network) $(settings) $(fixed "$1"); else echo --onnxrt; fi; }
fixed() { local -n exact="${1^^}_FIRST"; echo --trt-min-shapes "${exact[@]}" --trt-opt-shapes "${exact[@]}" --trt-max-shapes "${exact[@]}"; }
file() { if [ "$2" = trt ]; then echo "$1.onnx"; else echo "$2"; fi; }

case "$what" in
look) for role in $roles; do polygraphy inspect model "$role.onnx" --show layers; done ;;
lint) for role in $roles; do polygraphy check lint "$role.onnx" --data-loader-script "load_windows.py:load_$role"; done ;;
capability) for role in $roles; do polygraphy inspect capability "$role.onnx"; done ;;
onnxrt) for role in $roles; do
    expected "$role"
    polygraphy run "$role.onnx" --onnxrt --data-loader-script "load_windows.py:load_$role" --load-outputs "expected-$role.json" $(tolerance "$role")
  done ;;
convert) for role in $roles; do
    polygraphy convert "$role.onnx" --convert-to trt -o "$role.engine" $(network) $(settings) $(shapes "$role") ${COMPUTE:+--compute-capabilities $COMPUTE}
  done ;;
compare) for role in $roles; do
    expected "$role"
    polygraphy run "$role.onnx" --trt $(network) $(settings) $(shapes "$role") --data-loader-script "load_windows.py:load_$role" \
      --load-outputs "expected-$role.json" $(tolerance "$role")
  done ;;
sanitize) for role in $roles; do # never under the name weights.data: it would be appended to
    polygraphy surgeon sanitize "$role.onnx" --fold-constants -o "$role.sanitized.onnx" --save-external-data "$role.sanitized.data"
  done ;;
first)
  golden "$2"
  polygraphy run "$(file "$2" "$3")" $(runner "$2" "$3") --onnx-outputs mark all --load-inputs "inputs-$2.json" --load-outputs "golden-$2.json" \
    --atol "${REDUCE_ATOL:-1e-3}" --rtol 0 --check-error-stat max ;;
reduce)
  golden "$2"
  declare -n exact="${2^^}_FIRST"
  check=(polygraphy run polygraphy_debug.onnx $(runner "$2" "$3") --load-inputs "all-$2.json" --load-outputs "golden-$2.json"
    --atol "${REDUCE_ATOL:-1e-3}" --rtol 0 --check-error-stat max)
  check[0]=${POLYGRAPHY:-polygraphy}
  # without --fail-regex any failing check would count, also one that cannot run
  for mode in bisect linear; do
    from="reduced-$2-bisect.onnx" sizes=() # whose inputs have their shapes already
    if [ "$mode" = bisect ]; then from=$(file "$2" "$3") sizes=(--model-input-shapes "${exact[@]}"); fi
    polygraphy debug reduce "$from" -o "reduced-$2-$mode.onnx" --mode "$mode" --load-inputs "all-$2.json" "${sizes[@]}" \
      --fail-regex 'Difference exceeds tolerance' --check "${check[@]}"
  done
  polygraphy inspect model "reduced-$2-linear.onnx" --show layers ;;
*) sed -n '2,16p' "$0"; exit 2 ;;
esac
