package main

import "testing"

func TestMountPoint(t *testing.T) {
	const mounts = `22 1 0:20 / / rw - overlay composefs:00 ro
25 22 254:1 / /efi ro,nosuid shared:1 - vfat /dev/vda1 ro
26 22 254:1 / /boot rw,nosuid shared:2 - vfat /dev/vda1 rw
27 22 254:1 /EFI /srv rw shared:2 - vfat /dev/vda1 rw
28 22 254:2 / /with\040space rw shared:2 - ext4 /dev/vda2 rw
short
`
	for minor, want := range []string{"", "/boot", "", ""} {
		if got := mountPoint(mounts, 254, uint32(minor)); got != want {
			t.Errorf("254:%d: %q, want %q", minor, got, want)
		}
	}
}
