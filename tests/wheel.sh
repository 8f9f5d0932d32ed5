#!/usr/bin/env bash
# Builds the wheel, installs it in a new environment, leaves the repository, and uses it.
set -euo pipefail
repo=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$repo/$VENV/bin/python" -m build --wheel --outdir "$work/dist" . > "$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
rm -rf "$repo/build" "$repo"/*.egg-info
"$repo/$VENV/bin/python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet -c "$repo/constraints.txt" torch
"$work/venv/bin/python" -m pip install --quiet -c "$repo/constraints.txt" "$work"/dist/*.whl
cd "$work"
"$work/venv/bin/python" - "$repo" <<'PY'
import sys
import lightning_guard, lightning_guard.callbacks, lightning_guard.data
assert not lightning_guard.__file__.startswith(sys.argv[1]), lightning_guard.__file__
print("imported", lightning_guard.__version__, "from the wheel")
try:
    import callbacks
except ImportError:
    print("callbacks/ is no top-level package")
else:
    raise SystemExit("the wheel pollutes the top level with callbacks/")
PY
"$work/venv/bin/lightning-guard" list
"$work/venv/bin/lightning-guard" fit --config demo/adult --recipe fair-and-small \
  --trainer.max_epochs 1 --trainer.limit_train_batches 4 --trainer.limit_val_batches 1 \
  --trainer.enable_progress_bar false
echo "the wheel works from another folder"
