#!/bin/sh
# Installs programs that tests need on Debian and Ubuntu, as root or with sudo. Where that can't be done
# it says why and ends well: the tests that need them are skipped then.
#
#   install_for_tests.sh "Kamailio and SIPp" "kamailio sipp" "kamailio sip-tester"
#                        what they are called, their commands, their packages
PATH="$PATH:/usr/sbin:/sbin"
missing=
for program in $2; do
  command -v "$program" >/dev/null || missing="$missing $program"
done
[ -z "$missing" ] && exit 0

if ! command -v apt-get >/dev/null; then
  echo "missing, and this is no Debian or Ubuntu: $1; the tests of it are skipped"
  exit 0
elif [ "$(id -u)" = 0 ]; then
  sudo=
# Asks for a password only where there is somebody to type it.
elif command -v sudo >/dev/null && { [ -t 0 ] || sudo -n true 2>/dev/null; }; then
  sudo=sudo
else
  echo "missing, and installing needs root: $1; the tests of it are skipped"
  exit 0
fi

echo "missing, to be installed: $1"
# Debian starts what it installs. The tests run Kamailio themselves, with ports of their own.
for program in $missing; do
  unit="/etc/systemd/system/$program.service"
  case "$program" in
  kamailio | redis-server | nginx)
    [ -e "$unit" ] || { $sudo mkdir -p "${unit%/*}" && $sudo ln -s /dev/null "$unit"; }
    ;;
  esac
done
# shellcheck disable=SC2086 # several packages
$sudo apt-get update -qq &&
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $3 \
    >/dev/null ||
  echo "could not be installed: $1; the tests of it are skipped"
