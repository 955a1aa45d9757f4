#!/bin/bash
# dracut module: boot from a composefs image. Installed as /usr/lib/dracut/modules.d/37composefs.

check() {
    require_binaries composefs-setup-root || return 1
    # Only when asked for: without the kernel argument the module does nothing, but it takes the emergency shell away.
    return 255
}

depends() {
    echo systemd
}

installkernel() {
    # ext4 is built in or found as the root's file system; these are what the root mount itself needs. Some kernels have
    # SHA-512 as a module, without which files with such fs-verity digests cannot be opened.
    hostonly='' instmods erofs overlay loop sha512_generic sha512
}

install() {
    inst_binary composefs-setup-root /usr/bin/composefs-setup-root
    inst_simple "$moddir/composefs-setup-root.service" "$systemdsystemunitdir/composefs-setup-root.service"
    inst_simple "$moddir/composefs-refused.service" "$systemdsystemunitdir/composefs-refused.service"
    inst_script "$moddir/composefs-refuse.sh" /usr/lib/composefs/refuse
    if [[ -e ${dracutsysrootdir-}/usr/lib/composefs/setup-root-conf.toml ]]; then
        inst_simple /usr/lib/composefs/setup-root-conf.toml
    fi
    $SYSTEMCTL -q --root "$initdir" add-requires initrd-root-fs.target composefs-setup-root.service
    # Whoever stands before a machine that refuses to boot gets no shell, unless the kernel command line says rd.shell:
    # what is there comes after this.
    mkdir -p "$initdir/etc/cmdline.d"
    echo "rd.shell=0 rd.emergency=halt" > "$initdir/etc/cmdline.d/00-composefs.conf"
}
