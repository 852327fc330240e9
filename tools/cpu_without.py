"""Run a command on this processor as if it had fewer instruction sets, at full speed: the results are
those of an x86 machine without them.

    # only AVX2: no AVX-512, no VNNI, no AMX
    python tools/cpu_without.py vnni -- python -m pytest tests/runtime/backends/test_int8.py
    # AVX-512 as before 2019: no VNNI, no AMX
    python tools/cpu_without.py avx512-vnni -- dllm-trt doctor

Libraries such as ONNX Runtime choose their kernels by the CPUID instruction. Linux can make that instruction
fault (arch_prctl ARCH_SET_CPUID); a small preloaded library handles the fault and returns the real registers
without the bits of the instruction sets. It needs x86-64, a processor with CPUID faulting (Intel since 2012,
AMD since Zen 4) and gcc. Exit status 3: this machine cannot do it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

UNABLE = 3
NOTED = "DLLM_CPU_WITHOUT"  # set in the command's environment, so that measurements can record it
# set -> bits to clear of leaf 7: (subleaf 0: ebx, ecx, edx), (subleaf 1: eax, edx)
_AMX = ((0, 0, 1 << 22 | 1 << 24 | 1 << 25), (1 << 21, 1 << 8))
_VNNI = ((0, 1 << 11, 1 << 2 | 1 << 3), (1 << 4, 1 << 4 | 1 << 5 | 1 << 10 | 1 << 19))
_AVX512 = (
    (
        1 << 16 | 1 << 17 | 1 << 21 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 30 | 1 << 31,
        1 << 1 | 1 << 6 | 1 << 12 | 1 << 14,
        1 << 8 | 1 << 23,
    ),
    (1 << 5, 0),
)
SETS = {"vnni": (_AMX, _VNNI, _AVX512), "avx512-vnni": (_AMX, _VNNI)}
_SOURCE = r"""
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>
enum { ARCH_SET_CPUID = 0x1012 };
static void answer(int number, siginfo_t *info, void *context) {
  greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
  unsigned char *at = (unsigned char *)r[REG_RIP];
  unsigned a = r[REG_RAX], b, c = r[REG_RCX], d, leaf = a, subleaf = c;
  if (at[0] != 0x0f || at[1] != 0xa2) { signal(SIGSEGV, SIG_DFL); return; } /* the program's own fault */
  syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1);
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
  if (leaf == 7 && subleaf == 0) { b &= ~%(b0)du; c &= ~%(c0)du; d &= ~%(d0)du; }
  if (leaf == 7 && subleaf == 1) { a &= ~%(a1)du; d &= ~%(d1)du; }
  r[REG_RAX] = a; r[REG_RBX] = b; r[REG_RCX] = c; r[REG_RDX] = d; r[REG_RIP] += 2;
}
__attribute__((constructor)) static void begin(void) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = answer;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, NULL);
  if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0)) {
    perror("this processor or kernel has no CPUID faulting");
    _exit(%(unable)d);
  }
}
"""


def library(name: str, directory: Path) -> Path:
    """The library to preload, compiled into a directory. Raises OSError or CalledProcessError without a
    compiler."""
    bits = {key: 0 for key in ("b0", "c0", "d0", "a1", "d1")}
    for first, second in SETS[name]:
        for key, value in zip(bits, (*first, *second), strict=True):
            bits[key] |= value
    source, binary = directory / "without.c", directory / "without.so"
    source.write_text(_SOURCE % {**bits, "unable": UNABLE}, encoding="ascii")
    subprocess.run(
        ["gcc", "-O2", "-shared", "-fPIC", "-w", str(source), "-o", str(binary)],
        check=True,
        capture_output=True,
    )
    return binary


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", choices=SETS, help="the instruction sets to hide")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command, after --")
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command or shutil.which(command[0]) is None:
        parser.error(f"no such command: {command[:1]}: give a command that exists, after --")
    with tempfile.TemporaryDirectory() as temporary:
        try:
            binary = library(args.sets, Path(temporary))
        except (OSError, subprocess.CalledProcessError) as error:
            print(
                f"error: gcc is missing or failed ({error}): install it to hide instruction sets.",
                file=sys.stderr,
            )
            return UNABLE
        preload = " ".join(filter(None, [str(binary), os.environ.get("LD_PRELOAD")]))
        return subprocess.run(
            command, env={**os.environ, "LD_PRELOAD": preload, NOTED: args.sets}, check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
