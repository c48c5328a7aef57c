#!/bin/sh
# Proof, sweeps and whole models on a machine with a GPU, in less than 8 minutes, from a carried folder.
#
#   benchmarks/cuda_all.sh pack FOLDER [--arch sm_90 ...] [--models tiny 1.1b DIR ...]
#       here, where TVM, torch and nvcc or NVRTC are; no GPU is needed
#   benchmarks/cuda_all.sh run FOLDER OUT.json [--parts prove gemv gemm decode tests]
#       there; from the carried folder it is FOLDER/source/benchmarks/cuda_all.sh
#
# FOLDER is all that must be carried; a tar of it will do. In it are
#   source/    this checkout's files
#   kernels/   cubins of linears, with cases that the device must get right, bit for bit
#   models/    programs that decode: a launch list, cubins, weights or what they are drawn from
# and what may be put there before it is carried, to compare with:
#   llama.cpp/llama-bench   a build of llama.cpp with CUDA, with the libraries it needs beside it
#   gguf/NAME/*.gguf        files of the model models/NAME
#   packages/               Python packages for there: pip install --target FOLDER/packages numpy
#
# The machine with the GPU needs the NVIDIA driver's library, Python 3.10 or later and NumPy (its own, or packages/); no
# CUDA toolkit, no compiler, no network. Torch and cuBLAS take part where they are. The part "tests" runs the GPU tests of
# the test suite, which takes pytest, torch, TVM and a CUDA compiler; where they are missing that is recorded. PYTHON names
# the interpreter. Exit code 0: everything passed; 1: a part failed, and OUT.json says why; 2: there is no GPU here.
set -eu

usage() {
  sed -n '4,7p' "$0" | sed 's/^# *//' >&2
  exit 2
}

[ $# -ge 2 ] || usage
verb=$1
root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
python=${PYTHON:-python3}
mkdir -p -- "$2"
folder=$(CDPATH= cd -- "$2" && pwd)
shift 2
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH

case $verb in
pack)
  cd "$root"
  "$python" -m benchmarks.cuda_pack "$folder" "$@"
  mkdir -p "$folder/source"
  git ls-files -z | tar --null -T - -cf - | tar -xf - -C "$folder/source"
  ;;
run)
  [ $# -ge 1 ] || usage
  case $1 in /*) out=$1 ;; *) out=$(pwd)/$1 ;; esac
  shift
  if ! "$python" -c 'import numpy' 2>/dev/null; then
    PYTHONPATH=$PYTHONPATH:$folder/packages
  fi
  cd "$root"
  exec "$python" -m benchmarks.cuda_all "$folder" "$out" "$@"
  ;;
*) usage ;;
esac
