package pid1

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

var errNotUEFI = errors.New("this machine was not started by UEFI")

// withVariables calls a function with the directory of the firmware's variables, which is mounted if need be.
func withVariables(f func(dir string) error) error {
	const dir = "/sys/firmware/efi/efivars"
	if _, err := os.Stat(dir); err != nil {
		return errNotUEFI
	}
	err := unix.Mount("efivarfs", dir, "efivarfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_RDONLY, "")
	if err != nil && err != unix.EBUSY {
		return fmt.Errorf("%s: mount efivarfs: %w", dir, err)
	}
	// systemd mounts it anew, as it wants it.
	defer unix.Unmount(dir, unix.MNT_DETACH)
	return f(dir)
}

// loaderVendor is the vendor of the variables of boot loader and stub: Boot Loader Interface.
const loaderVendor = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
