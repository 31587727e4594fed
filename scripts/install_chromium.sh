#!/bin/sh
# Installs Chromium for the test of the status page on Debian and Ubuntu, as root or with sudo:
# 110 MB, some ten seconds. Where that can't be done it says why and ends well: the test is skipped.
command -v chromium >/dev/null && exit 0

if ! command -v apt-get >/dev/null; then
  echo "Chromium is missing, and this is no Debian or Ubuntu: its test is skipped"
  exit 0
elif [ "$(id -u)" = 0 ]; then
  sudo=
# Asks for a password only where there is somebody to type it.
elif command -v sudo >/dev/null && { [ -t 0 ] || sudo -n true 2>/dev/null; }; then
  sudo=sudo
else
  echo "Chromium is missing, and installing needs root: its test is skipped"
  exit 0
fi

echo "Chromium is missing, installing it"
$sudo apt-get update -qq &&
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
    chromium >/dev/null ||
  echo "it could not be installed: its test is skipped"
