package initrd

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// microcodeDir is where the kernel looks for microcode: Documentation/arch/x86/microcode.rst.
const microcodeDir = "kernel/x86/microcode/"

// microcode reads the microcode of both makers below a directory of firmware: all files of a maker, one after the other, as
// the kernel wants them. A maker whose directory is not there is left out; it is an error if both are.
func microcode(dir string) ([]File, error) {
	b := builder{}
	for _, maker := range []struct{ dir, name string }{{"amd-ucode", "AuthenticAMD.bin"}, {"intel-ucode", "GenuineIntel.bin"}} {
		entries, err := os.ReadDir(filepath.Join(dir, maker.dir))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		var all []byte
		for _, e := range entries { // sorted by name
			stem, _ := cutCompression(e.Name())
			// README files and signatures lie beside AMD's, and files for other uses beside Intel's.
			amd := strings.HasPrefix(stem, "microcode_amd") && strings.HasSuffix(stem, ".bin")
			intel := len(stem) == len("06-55-04") && strings.Count(stem, "-") == 2
			if maker.dir == "amd-ucode" && !amd || maker.dir == "intel-ucode" && !intel {
				continue
			}
			data, err := readFile(filepath.Join(dir, maker.dir, e.Name()))
			if err != nil {
				return nil, err
			}
			all = append(all, data...)
		}
		if len(all) > 0 {
			b.file(microcodeDir+maker.name, 0o644, all)
		}
	}
	if len(b) == 0 {
		return nil, fmt.Errorf("%s: no microcode in intel-ucode or amd-ucode (Debian: intel-microcode, amd64-microcode)", dir)
	}
	return b.sorted(), nil
}
