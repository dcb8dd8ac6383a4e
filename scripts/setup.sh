# Creates .venv with requirements.txt, unless it exists. Can be run or sourced. An installed torch is
# kept if requirements.txt allows its version.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
if ! cmp -s requirements.txt .venv/installed-requirements.txt; then
    echo "installing requirements.txt into .venv"
    { [ -x .venv/bin/pip ] || "${PYTHON:-python3}" -m venv .venv; } &&
        .venv/bin/pip install --quiet -r requirements.txt &&
        cp requirements.txt .venv/installed-requirements.txt || {
        echo "error: requirements.txt could not be installed; run this again" >&2
        return 2 2> /dev/null || exit 2
    }
fi
export PATH="$PWD/.venv/bin:$PATH"
