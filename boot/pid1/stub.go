package pid1

import (
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// handed are the files that systemd-stub puts into the initramfs, and where systemd in the system looks for them, as its
// tmpfiles.d/20-systemd-stub.conf says. They come from sections of the UKI; the boot secret is not for everybody.
var handed = []struct {
	from, to string
	mode     os.FileMode
}{
	{".extra/profile", "systemd/stub/profile", 0o444},
	{".extra/os-release", "systemd/stub/os-release", 0o444},
	{".extra/boot-secret", "systemd/stub/boot-secret", 0o400},
	{".extra/tpm2-pcr-signature.json", "systemd/tpm2-pcr-signature.json", 0o444},
	{".extra/tpm2-pcr-public-key.pem", "systemd/tpm2-pcr-public-key.pem", 0o444},
}

// maxHanded limits such a file, in bytes: they are in memory twice.
const maxHanded = 1 << 20

// stepHandOver passes on what the stub has left in the initramfs.
type stepHandOver struct{}

func (s stepHandOver) String() string { return "hand over what the stub left" }

func (s stepHandOver) do(r *run) error {
	// A system without its policies cannot open its secrets, but it can tell so better than this program.
	if err := handOver("/", "/run"); err != nil {
		r.host.Report(Warn, err.Error())
	}
	return nil
}

// handOver copies the files from the root of the initramfs to the directory that is /run.
func handOver(root, run string) error {
	for _, f := range handed {
		in, err := os.OpenFile(filepath.Join(root, f.from), os.O_RDONLY|unix.O_NOFOLLOW, 0)
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			return err
		}
		b, err := io.ReadAll(io.LimitReader(in, maxHanded+1))
		in.Close()
		if err == nil && len(b) > maxHanded {
			err = fmt.Errorf("/%s: more than %d bytes", f.from, maxHanded)
		}
		if err != nil {
			return err
		}
		to := filepath.Join(run, f.to)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(to, b, f.mode); err != nil {
			return err
		}
	}
	return nil
}
