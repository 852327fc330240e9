#!/usr/bin/env bash
# Check, join and unpack the pieces of pack_tensorrt86.sh: unpack_tensorrt86.sh PIECES_DIR TARGET_DIR
#
# Every piece must match SHA256SUMS, and TARGET_DIR must be new or empty; it appears only once it is complete.
# Needs tar, sha256sum, and xz or a python3 with lzma. No network.
set -euo pipefail

die() {
  echo "error: $*" >&2
  exit 1
}

decompress() {
  if command -v xz >/dev/null; then
    xz -dc -T0
  else
    python3 -c 'import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.stdin.buffer), sys.stdout.buffer, 1 << 20)'
  fi
}

# Fill `names` with the listed pieces in order, after checking that all are present and intact.
check_pieces() {
  local i sum name got expected missing=() sums=()
  while read -r sum name; do
    expected=$(printf 'tensorrt86.tar.xz.%02d' ${#names[@]})
    [ "$name" = "$expected" ] || die "$pieces/SHA256SUMS: lists '$name', expected $expected; the list was changed: copy it again"
    names+=("$name") sums+=("$sum")
    [ -f "$pieces/$name" ] || missing+=("$name")
  done <"$pieces/SHA256SUMS"
  [ ${#names[@]} -gt 0 ] || die "$pieces/SHA256SUMS: is empty, expected a list of the pieces: copy it again"
  [ ${#missing[@]} -eq 0 ] ||
    die "$pieces: has $((${#names[@]} - ${#missing[@]})) of the ${#names[@]} pieces in SHA256SUMS; copy what is missing: ${missing[*]}"
  for i in "${!names[@]}"; do
    got=$(sha256sum <"$pieces/${names[i]}" | cut -d' ' -f1)
    [ "$got" = "${sums[i]}" ] ||
      die "$pieces/${names[i]}: SHA-256 is $got, SHA256SUMS says ${sums[i]}; the piece was changed or truncated: copy it again"
  done
}

[ $# -eq 2 ] || die "got $# arguments, expected two, where the pieces are and where to unpack: $0 PIECES_DIR TARGET_DIR"
pieces=$1
[ -f "$pieces/SHA256SUMS" ] || die "$pieces/SHA256SUMS: not found; it must be next to the pieces: copy it there"
[ ! -e "$2" ] || { [ -d "$2" ] && [ -z "$(ls -A "$2")" ]; } || die "$2: exists and is not an empty directory: choose another or remove it"
names=()
check_pieces

mkdir -p "$2"
target=$(cd "$2" && pwd)
partial=$(mktemp -d "$target.XXXXXX")
trap 'rm -rf "$partial"' EXIT
(cd "$pieces" && cat "${names[@]}") | decompress | tar -C "$partial" -xf - ||
  die "$target: the joined pieces are not a complete archive, or the disk is full (see the lines above): copy SHA256SUMS again, or free 1.6 GB"
[ -x "$partial/run" ] || die "$target: the archive has no program 'run', so pack_tensorrt86.sh did not write it: copy the pieces again"
chmod 755 "$partial"
mv -T "$partial" "$target"
printf "%q python3 -c 'import tensorrt; print(tensorrt.__version__)'\n" "$target/run"
