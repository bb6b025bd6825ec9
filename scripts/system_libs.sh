#!/usr/bin/env bash
# Make sure the two system libraries that Python packages cannot bring are there (Linux):
#   - OSMesa or EGL, with which MuJoCo renders without a screen;
#   - libGL and glib, which opencv-python loads when it is imported.
# Installs them with apt where that is possible (root and apt-get), else prints the one line to run. Never fails:
# everything that does not render works without OSMesa or EGL.
#
# Usage: scripts/system_libs.sh [python]
set -u
python=${1:-python3}

[ "$(uname -s)" = Linux ] || exit 0

loads() { "$python" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$1" 2>/dev/null; }
missing() {
  loads libOSMesa.so.8 || loads libOSMesa.so.6 || loads libEGL.so.1 || echo "OSMesa or EGL (MuJoCo rendering)"
  loads libGL.so.1 || echo "libGL.so.1 (opencv)"
  loads libgthread-2.0.so.0 || echo "libgthread-2.0.so.0 (opencv)"
}

before=$(missing)
if [ -z "$before" ]; then
  echo "==> system libraries: all there"
  exit 0
fi
echo "==> system libraries missing:"
printf '%s\n' "$before" | sed 's/^/      /'

packages="libosmesa6 libgl1 libglib2.0-0"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "==> apt-get install $packages"
  apt-get update -qq >/dev/null 2>&1
  # Mesa 25 dropped OSMesa: there EGL with the software driver takes its place.
  [ -n "$(apt-cache search --names-only '^libosmesa6$' 2>/dev/null)" ] ||
    packages="libegl1 libegl-mesa0 libgl1-mesa-dri libgl1 libglib2.0-0"
  # shellcheck disable=SC2086  # a list of words
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null 2>&1
  after=$(missing)
  [ -z "$after" ] && { echo "==> system libraries: installed"; exit 0; }
  echo "==> apt-get could not bring: $(printf '%s' "$after" | tr '\n' ';')"
fi
echo "==> to get them on Debian or Ubuntu, run:  sudo apt-get install -y $packages"
echo "==> continuing: all that does not render the simulator works without OSMesa or EGL"
exit 0
