#!/usr/bin/env bash
# Prints a Python that requirements-newest.txt is for: the one that it was tested with, else the next or the one before;
# on PATH, else among pyenv's.
set -euo pipefail

lock=$(dirname "${BASH_SOURCE[0]}")/../requirements-newest.txt
tested=$(sed -n '1s/.*Python 3\.\([0-9]*\).*/\1/p' "$lock")
# The tested one first, then what is newer, then what is older.
for minor in "$tested" $((tested + 1)) $((tested - 1)); do
  for python in "python3.$minor" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3."$minor".*/bin/python; do
    if "$python" -c "" 2>/dev/null; then
      command -v "$python"
      exit
    fi
  done
done
echo "no Python 3.$tested here, nor the one after or before it: make test-newest NEWEST=PATH" >&2
exit 2
