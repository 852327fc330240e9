#!/usr/bin/env bash
# Pack TensorRT 8.6 with a Python 3.11 to run it, for a GPU machine without network: tools/pack_tensorrt86.sh OUT_DIR
#
# OUT_DIR receives tensorrt86.tar.xz.00, .01, ... (at most 56 MiB each), SHA256SUMS and unpack_tensorrt86.sh. Inside:
#   run      `run python3 script.py` sets the environment and runs the command
#   python/  this machine's Python 3.11 and its standard library
#   lib/     the shared libraries that Python and the packages load, except those of glibc and GCC
#   site/    tensorrt_bindings 8.6.1 (and its alias tensorrt), tensorrt_libs 8.6.0, numpy, onnx, cuda-python
#
# The wheel tensorrt 8.6.0 for Python 3.10 is the newest on the package index that contains TensorRT's libraries. Its
# plugin library links to cuBLAS and cuDNN, which are larger than TensorRT: stubs replace them, whose functions print an
# error and fail. Build engines with the tactic sources CUBLAS, CUBLAS_LT and CUDNN off.
#
# A few functions of the 8.6.1 bindings are at other places in the 8.6.0 libraries: a call crashes or reaches another
# function. `import tensorrt` removes them. It cannot remove one of two overloads: do not pass a profile index to
# ICudaEngine.get_tensor_{bytes_per_component,components_per_element,format,format_desc,vectorized_dim}.
#
# The target needs x86-64 Linux, libstdc++, a driver for CUDA 12, and the glibc version in the last line of the output.
# Packing takes 4 GB of disk under OUT_DIR. TensorRT's licence travels in site/: the pieces are for your own machines.
set -euo pipefail

TENSORRT=tensorrt==8.6.0
# numpy 2 is excluded: with it the bindings silently read wrong numbers from arrays
PACKAGES=(tensorrt-bindings==8.6.1 numpy==1.26.4 onnx==1.23.2 cuda-python==12.9.10)
PIECE_BYTES=58720256
STUBS=(libcublas.so.12 libcublasLt.so.12 libcudnn.so.8)
SYSTEM='/(ld-linux-x86-64|libc|libm|libmvec|libdl|libpthread|librt|libutil|libresolv|libgcc_s|libstdc\+\+)\.so'

die() {
  echo "error: $*" >&2
  exit 1
}

require_tools() {
  local tool
  for tool in cc ldd nm python3.11 sha256sum split tar xz; do
    command -v "$tool" >/dev/null || die "$tool: not found; packing needs it: install it"
  done
  python3.11 -m pip --version >/dev/null 2>&1 || die "python3.11: has no pip; packing needs it: install pip for python3.11"
}

copy_python() {
  local binary stdlib to=$tree/python
  binary=$(python3.11 -c 'import os, sys; print(os.path.realpath(sys._base_executable))')
  stdlib=$(python3.11 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
  mkdir -p "$to/bin" "$to/lib/python3.11"
  cp "$binary" "$to/bin/python3.11"
  ln -s python3.11 "$to/bin/python3"
  ln -s python3.11 "$to/bin/python"
  tar -C "$stdlib" --exclude=./{site-packages,dist-packages,test,idlelib,tkinter,turtledemo,ensurepip,lib2to3} \
    --exclude='./config-3.11*' --exclude='lib-dynload/'{_tkinter,_crypt,nis}.'*' --exclude=__pycache__ -chf - . |
    tar -C "$to/lib/python3.11" -xf -
}

install_packages() {
  python3.11 -m pip install -qq --no-compile --only-binary=:all: --target "$tree/site" "${PACKAGES[@]}" ||
    die "${PACKAGES[*]}: pip could not install them for Python 3.11; all must come as wheels: check pip's index"
  rm -rf "$tree/site/bin"
  mkdir "$tree/site/tensorrt"
  cat >"$tree/site/tensorrt/__init__.py" <<'PY'
"""tensorrt_bindings under TensorRT's own name, without the functions that differ between the 8.6.1 bindings and the 8.6.0 libraries."""

import tensorrt_bindings
from tensorrt_bindings import *
from tensorrt_bindings import __version__

for _name in ("flags", "set_flag", "get_flag", "clear_flag"):
    delattr(tensorrt_bindings.OnnxParser, _name)
for _name in ("load_library", "deregister_library", "deregister_creator", "parent_search_enabled", "error_recorder"):
    delattr(tensorrt_bindings.IPluginRegistry, _name)
PY
}

extract_tensorrt() {
  python3.11 -m pip download -qq --no-deps --only-binary=:all: --python-version 3.10 \
    --platform manylinux_2_17_x86_64 --dest "$work/wheel" "$TENSORRT" ||
    die "$TENSORRT: pip could not fetch its wheel for Python 3.10 (819 MB): check pip's index"
  python3.11 -m zipfile -e "$work"/wheel/tensorrt-*.whl "$work/wheel"
  mkdir "$tree/site/tensorrt_libs"
  mv "$work"/wheel/tensorrt/lib*.so* "$tree/site/tensorrt_libs"
  rm -rf "$work/wheel"
}

# Write stub libraries that export, under their version names, the functions that TensorRT's libraries import from STUBS.
build_stubs() {
  local library function libs=$tree/site/tensorrt_libs source=$work/stub.c
  for library in "${STUBS[@]}"; do
    cat >"$source" <<C
#include <stdio.h>
static int fail(const char *name) {
  fprintf(stderr, "$library: %s was called but is a stub: switch off the tactic sources CUBLAS, CUBLAS_LT and CUDNN\\n", name);
  return 1;
}
C
    for function in $(nm -D --undefined-only "$libs"/libnv*.so* | sed -n "s/.* U \(.*\)@$library\$/\1/p" | sort -u); do
      case $function in
        *String) echo "const char *$function(void) { return \"$library is a stub\"; }" ;;
        *) echo "int $function(void) { return fail(\"$function\"); }" ;;
      esac
    done >>"$source"
    grep -q '(void)' "$source" || die "$library: no library of $TENSORRT imports a function from it; a stub needs the list: check nm -D"
    echo "$library { global: *; };" >"$work/stub.map"
    cc -shared -fPIC -Wl,-soname,"$library" -Wl,--version-script="$work/stub.map" -o "$libs/$library" "$source"
  done
}

bundle_libraries() {
  local linked name path
  mkdir "$tree/lib"
  linked=$(find "$tree" -type f \( -name '*.so*' -o -name python3.11 \) -print0 | xargs -0 ldd)
  awk '/not found/ {print $1}' <<<"$linked" | sort -u | while read -r name; do
    [ -n "$(find "$tree" -name "$name")" ] || die "$name: a packed file needs it, but it is neither packed nor installed: install it"
  done
  awk '$2 == "=>" && $3 ~ "^/" {print $3}' <<<"$linked" | sort -u | grep -vF "$tree" | grep -vE "$SYSTEM" | while read -r path; do
    cp -L "$path" "$tree/lib"
  done
}

write_run() {
  cat >"$tree/run" <<'RUN'
#!/bin/sh
# run COMMAND ...: the command, in an environment with the packed Python 3.11 and TensorRT 8.6
here=$(dirname "$(readlink -f "$0")")
[ $# -gt 0 ] || { echo "error: run: got no command, expected one: $here/run python3 script.py" >&2; exit 2; }
export PATH="$here/python/bin:$PATH"
export PYTHONHOME="$here/python" PYTHONNOUSERSITE=1
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$here/site"
export LD_LIBRARY_PATH="$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
exec "$@"
RUN
  chmod +x "$tree/run"
}

write_pieces() {
  mkdir "$work/pieces"
  tar -C "$tree" --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -cf - . | nice xz -T2 -3 |
    split -b "$PIECE_BYTES" -d -a 2 - "$work/pieces/tensorrt86.tar.xz."
  (cd "$work/pieces" && sha256sum tensorrt86.tar.xz.*) >"$work/SHA256SUMS"
  mv "$work"/pieces/* "$out"
  cp "$(dirname "${BASH_SOURCE[0]}")/unpack_tensorrt86.sh" "$out"
  mv "$work/SHA256SUMS" "$out"
}

[ $# -eq 1 ] || die "got $# arguments, expected one, the directory for the pieces: $0 OUT_DIR"
mkdir -p "$1"
out=$(cd "$1" && pwd)
[ -z "$(ls -A "$out")" ] || die "$out: is not empty; the pieces need an empty directory: choose another or empty it"
require_tools
work=$(mktemp -d "$out/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
tree=$work/tree
mkdir "$tree"

copy_python
install_packages
extract_tensorrt
build_stubs
bundle_libraries
write_run
"$tree/run" python3 -c 'import cuda.bindings.driver, numpy, onnx, tensorrt' ||
  die "$tree: the packed Python cannot import its packages; nothing was written: see the lines above"
find "$tree" -name __pycache__ -type d -prune -exec rm -rf {} +
glibc=$(find "$tree" -type f -size -100M -exec grep -ahoE 'GLIBC_2\.[0-9]+' {} + | sort -Vu | tail -1)
write_pieces
echo "$out: $(wc -l <"$out/SHA256SUMS") pieces, $(du -ch "$out"/tensorrt86.tar.xz.* | tail -1 | cut -f1); the target needs ${glibc/_/ }"
