# Sourced by demo.sh and test.sh: makes .venv with requirements.txt unless it is there already.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! cmp -s requirements.txt .venv/installed-requirements.txt; then
    echo "installing requirements.txt into .venv"
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    .venv/bin/pip install --quiet -r requirements.txt
    cp requirements.txt .venv/installed-requirements.txt
fi
export PATH="$PWD/.venv/bin:$PATH"
