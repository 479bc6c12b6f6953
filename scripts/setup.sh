#!/bin/sh
# Create the virtual environment $VENV with everything that the demo, the tests and the linters need.
set -eu
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
TORCH=${TORCH:-torch==2.13.0}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "hf_blockprune needs Python 3.10 or later; set PYTHON=/path/to/python3" >&2
    exit 1
}
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"

# torch goes first: resolved as a dependency, pip would take the CUDA build (several GB) on Linux without a GPU too.
if ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
    if [ "$(uname)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; then
        # A local version such as 2.13.0+cpu sorts above 2.13.0, so the CPU build wins where its index answers.
        "$VENV/bin/python" -m pip install -q --retries 1 --no-deps "$TORCH" \
            --extra-index-url https://download.pytorch.org/whl/cpu
    else
        "$VENV/bin/python" -m pip install -q --no-deps "$TORCH"
    fi
fi
"$VENV/bin/python" -m pip install -q -e '.[dev]'
