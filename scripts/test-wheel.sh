#!/bin/sh
# Build a wheel, install it in an empty virtual environment, and run the kernels' tests there, away from the checkout.
set -eu
PYTHON=${PYTHON:-python3}
ROOT=$(cd "$(dirname "$0")/.." && pwd)
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT

"$PYTHON" -m venv "$FOLDER/venv"
"$FOLDER/venv/bin/python" -m pip wheel -q --no-deps -w "$FOLDER/dist" "$ROOT"
ls "$FOLDER/dist"
"$FOLDER/venv/bin/python" -m pip install -q --no-deps "${TORCH:-torch==2.13.0}"
"$FOLDER/venv/bin/python" -m pip install -q "$FOLDER"/dist/*.whl pytest hypothesis
cp -r "$ROOT/tests" "$ROOT/setup.py" "$ROOT/pyproject.toml" "$FOLDER"
cd "$FOLDER"
venv/bin/python -m pytest -q tests/cpu tests/hub/test_ops.py tests/hub/test_linear.py
venv/bin/blockprune env
