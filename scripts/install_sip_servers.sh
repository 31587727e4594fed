#!/bin/sh
# Installs Kamailio and SIPp for the tests on Debian and Ubuntu, as root or with sudo. Where that
# can't be done it says why and ends well: the tests that need them are skipped then.
PATH="$PATH:/usr/sbin:/sbin"
command -v kamailio >/dev/null && command -v sipp >/dev/null && exit 0

if ! command -v apt-get >/dev/null; then
  echo "Kamailio and SIPp are missing, and this is no Debian or Ubuntu: their tests are skipped"
  exit 0
elif [ "$(id -u)" = 0 ]; then
  sudo=
# Asks for a password only where there is somebody to type it.
elif command -v sudo >/dev/null && { [ -t 0 ] || sudo -n true 2>/dev/null; }; then
  sudo=sudo
else
  echo "Kamailio and SIPp are missing, and installing needs root: their tests are skipped"
  exit 0
fi

echo "Kamailio and SIPp are missing, installing them (kamailio.service stays masked)"
# Debian starts what it installs. The tests run Kamailio themselves, with ports of their own.
unit=/etc/systemd/system/kamailio.service
if ! command -v kamailio >/dev/null && [ ! -e "$unit" ]; then
  $sudo mkdir -p "${unit%/*}" && $sudo ln -s /dev/null "$unit"
fi
$sudo apt-get update -qq &&
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
    kamailio sip-tester >/dev/null ||
  echo "they could not be installed: their tests are skipped"
