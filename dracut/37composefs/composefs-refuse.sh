#!/bin/sh
# Ends the boot when the root cannot be verified. The reason is on the console already: composefs-setup-root wrote it to the
# kernel log. There is a shell only if the kernel command line, which a signature may vouch for, says rd.shell.
for arg in $(cat /proc/cmdline); do
    case $arg in
        rd.shell | rd.shell=1 | rd.shell=yes) exec systemctl --no-block isolate emergency.target ;;
        panic=[1-9]*) delay=${arg#panic=} ;;
    esac
done
echo "composefs: the root could not be verified. This system does not boot."
if [ -n "$delay" ]; then
    echo "composefs: restarting in $delay seconds, as panic= says"
    sleep "$delay"
    systemctl --force --force reboot
fi
echo "composefs: halted. Restart and choose another boot entry."
systemctl --force --force halt
