#!/bin/bash
# Playwright and a Chromium for the browser tests: the distribution's (Debian or Ubuntu, as root or with sudo), else
# Playwright's own. Where neither can be had it says loudly what is left out, and the tests skip themselves.
#   tests/browser/install.sh [PYTHON]
set -u
python=${1:-.venv/bin/python}
installed() { type -P chromium || type -P chromium-browser || type -P google-chrome; }
as_root=()
[ "$(id -u)" = 0 ] || as_root=(sudo --non-interactive)
"$python" -m pip install -q "playwright==1.65.2" && {
  installed >/dev/null && exit 0
  "${as_root[@]}" apt-get update -qq &&
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium
  installed >/dev/null && exit 0
  "$python" -m playwright install --with-deps --only-shell chromium && exit 0
}
cat >&2 <<'TEXT'
***********************************************************************************
* No browser could be installed: THE TESTS OF THE HTML PAGES ARE BEING SKIPPED.     *
* They need the Python package playwright, and chromium (apt, or playwright install). *
***********************************************************************************
TEXT
