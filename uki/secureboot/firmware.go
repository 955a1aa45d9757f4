package secureboot

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/composefs-boot/composefs-boot/uki"
)

// Efivars is where Linux shows the variables of the firmware: files NAME-GUID, with 4 bytes of attributes in front.
const Efivars = "/sys/firmware/efi/efivars"

const attributesSize = 4

// Firmware is what the firmware of a machine says about Secure Boot. A database that it does not have is empty.
type Firmware struct {
	SecureBoot bool // signatures are enforced
	SetupMode  bool // there is no PK: variables are taken unsigned
	PK         Database
	KEK        Database
	DB         Database
	DBX        Database

	// SBATLevel is the revocation list of shim, which it shows as SbatLevelRT; "" without shim.
	SBATLevel string
}

// ReadFirmware reads the variables from a directory like Efivars. It is an error if there is no variable SecureBoot, as every
// firmware with UEFI has it.
func ReadFirmware(dir string) (*Firmware, error) {
	f := &Firmware{}
	for name, to := range map[string]*bool{"SecureBoot": &f.SecureBoot, "SetupMode": &f.SetupMode} {
		b, err := readVariable(dir, Variable{name, globalGUID})
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%w: this machine was not started by UEFI, or efivarfs is not mounted: mount -t efivarfs efivarfs %s", err, Efivars)
		}
		if err != nil {
			return nil, err
		}
		*to = len(b) == 1 && b[0] == 1
	}
	for v, to := range map[Variable]*Database{PK: &f.PK, KEK: &f.KEK, DB: &f.DB, DBX: &f.DBX} {
		b, err := readVariable(dir, v)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if *to, err = ParseDatabase(b); err != nil {
			return nil, fmt.Errorf("variable %s: %w", v.Name, err)
		}
	}
	level, err := readVariable(dir, Variable{"SbatLevelRT", shimGUID})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	f.SBATLevel = string(bytes.TrimRight(level, "\x00"))
	return f, nil
}

// Trust returns what the firmware starts, if Secure Boot is on.
func (f *Firmware) Trust() (uki.Trust, error) { return Trust(f.DB, f.DBX) }

func readVariable(dir string, v Variable) ([]byte, error) {
	path := filepath.Join(dir, v.Name+"-"+v.GUID.String())
	b, err := readFile(path)
	if err != nil {
		return nil, err
	}
	if len(b) < attributesSize {
		return nil, fmt.Errorf("%s: %d bytes, the attributes alone have %d", path, len(b), attributesSize)
	}
	return b[attributesSize:], nil
}

// readFile reads a file that is not larger than any database.
func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, MaxDatabase+1))
	if err != nil {
		return nil, err
	}
	if len(b) > MaxDatabase {
		return nil, fmt.Errorf("%s: more than %d bytes: no certificate or database", path, MaxDatabase)
	}
	return b, nil
}
