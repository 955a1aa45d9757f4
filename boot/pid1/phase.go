package pid1

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// stepPhase extends PCR 11 of the TPM with a word that says how far the boot is, as systemd-pcrphase-initrd.service does:
// secrets may be bound to a phase. That is for a UKI whose stub has measured it there; otherwise nothing is done.
//
// A failure ends the boot: without "leave-initrd", the system could open what only the initramfs may.
type stepPhase struct{ word string }

func (s stepPhase) String() string { return "measure " + s.word + " if the stub measures" }

// devices are the TPM with and without the kernel's resource manager.
var devices = []string{"/dev/tpmrm0", "/dev/tpm0"}

func (s stepPhase) do(r *run) error {
	measures, err := stubMeasures()
	if err != nil {
		r.host.Report(Warn, fmt.Sprintf("PCR 11 is not extended with %s: %v", s.word, err))
	}
	if !measures {
		return nil
	}
	for _, name := range devices {
		// Not by os.OpenFile, which makes it non-blocking: then an answer that is not there yet reads as the end of the file.
		fd, err := unix.Open(name, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return &os.PathError{Op: "open", Path: name, Err: err}
		}
		tpm := os.NewFile(uintptr(fd), name)
		defer tpm.Close()
		if err := pcrEvent(tpm, s.word); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		return nil
	}
	r.host.Report(Warn, fmt.Sprintf("PCR 11 is not extended with %s: the kernel has no driver for the TPM: put it into the initramfs "+
		"(composefs-boot initrd build --module NAME)", s.word))
	return nil
}

// stubMeasures tells whether the stub has measured the UKI: then it sets a variable.
func stubMeasures() (found bool, err error) {
	err = withVariables(func(dir string) error {
		_, err := os.Stat(dir + "/StubPcrKernelImage-" + loaderVendor)
		found = err == nil
		return nil
	})
	if errors.Is(err, errNotUEFI) {
		err = nil
	}
	return found, err
}

// Constants of the TPM 2.0 Library, part 2: structures.
const (
	tagSessions  = 0x8002
	ccPCREvent   = 0x13c
	handleRSPW   = 0x40000009 // the authorization by a password
	pcrKernel    = 11
	headerLength = 10
)

// pcrEvent has the TPM hash a text and extend PCR 11 with it, in every bank: TPM2_PCR_Event (part 3, 22.3).
func pcrEvent(tpm interface {
	Write([]byte) (int, error)
	Read([]byte) (int, error)
}, text string) error {
	be := binary.BigEndian
	b := be.AppendUint16(nil, tagSessions)
	b = be.AppendUint32(b, 0) // the size, below
	b = be.AppendUint32(b, ccPCREvent)
	b = be.AppendUint32(b, pcrKernel)
	b = be.AppendUint32(b, 9) // bytes of the authorization
	b = be.AppendUint32(b, handleRSPW)
	b = append(b, 0, 0, 0, 0, 0) // no nonce, no attributes, an empty password
	b = be.AppendUint16(b, uint16(len(text)))
	b = append(b, text...)
	be.PutUint32(b[2:], uint32(len(b)))
	if _, err := tpm.Write(b); err != nil {
		return err
	}
	answer := make([]byte, 4096)
	n, err := tpm.Read(answer)
	if err != nil {
		return err
	}
	if n < headerLength {
		return fmt.Errorf("the TPM answers with %d bytes", n)
	}
	if code := be.Uint32(answer[6:]); code != 0 {
		return fmt.Errorf("the TPM does not extend PCR %d: code 0x%x", pcrKernel, code)
	}
	return nil
}
