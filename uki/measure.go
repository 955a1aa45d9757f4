package uki

import (
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"
	"strings"
	"sync"
	"unicode/utf16"
)

// Bank is a set of PCRs of a TPM, named by the hash function that extends them.
type Bank string

// Banks are those that a TPM may have.
var Banks = []Bank{"sha1", "sha256", "sha384", "sha512"}

func (b Bank) hash() hash.Hash {
	switch b {
	case "sha1":
		return sha1.New()
	case "sha256":
		return sha256.New()
	case "sha384":
		return sha512.New384()
	case "sha512":
		return sha512.New()
	}
	return nil
}

// sum returns the hash of some data.
func (b Bank) sum(data []byte) []byte {
	h := b.hash()
	h.Write(data)
	return h.Sum(nil)
}

// extend returns a PCR after a digest has been added: the hash of the old value and the digest.
func (b Bank) extend(pcr, digest []byte) []byte {
	return b.sum(append(slices.Clone(pcr), digest...))
}

// Phases are the points of a boot that secrets are bound to: systemd extends PCR 11 with each word when it gets there.
var Phases = []string{
	"enter-initrd",
	"enter-initrd:leave-initrd",
	"enter-initrd:leave-initrd:sysinit",
	"enter-initrd:leave-initrd:sysinit:ready",
}

// PCRs that the stub extends: with the sections, and with what changes from boot to boot.
const (
	PCRKernel = 11
	PCRConfig = 12
)

// Prediction is the value that a PCR will have.
type Prediction struct {
	Profile int    `json:"profile"`
	ID      string `json:"id,omitempty"`      // of the profile
	DTB     int    `json:"dtbauto,omitempty"` // which .dtbauto the hardware takes, from 1; 0 if there is none
	Bank    Bank   `json:"bank"`
	PCR     int    `json:"pcr"`
	Phase   string `json:"phase,omitempty"`
	Value   string `json:"hash"` // hexadecimal
}

// slack is by how much a section may be longer in memory than in the file: more is no content but memory to work in, and
// hashing it could take a while.
const slack = 16 << 20

// Measure predicts PCR 11 for every profile, .dtbauto, phase and bank, as the stub and systemd extend it from the start: for
// each measured section that is not empty, in the stub's order, the hash of its name with a NUL and then the hash of its
// content in memory, with zeros up to its virtual size; then the hash of each word of the phase. It is what systemd-measure(1)
// calculates. The stub measures an .efifw, too, if the hardware takes it: the prediction is for hardware that takes none.
//
// The image has the stub's own sections in it, too, as Read returns it; Behind adds them to one that is not built yet.
func Measure(m *Image, banks []Bank, phases []string) ([]Prediction, error) {
	h, err := HashSections(m, banks)
	if err != nil {
		return nil, err
	}
	return h.Predict(phases), nil
}

// Behind returns the image with those sections of the stub that the stub measures: that of the file which Append lays out.
func (m *Image) Behind(stub *PE) (*Image, error) {
	behind := &Image{Profiles: slices.Clone(m.Profiles)}
	if len(behind.Profiles) == 0 {
		behind.Profiles = [][]Section{nil}
	}
	var own []Section
	for k, h := range stub.Sections {
		if h.Name == ".profile" {
			return nil, errors.New("the stub has profiles: what comes behind it cannot be measured")
		}
		replaced := slices.ContainsFunc(behind.Profiles[0], func(s Section) bool { return s.Name == h.Name })
		if slices.Contains(measured, h.Name) && (!replaced || slices.Contains(variants, h.Name)) {
			own = append(own, stub.section(k))
		}
	}
	behind.Profiles[0] = append(own, behind.Profiles[0]...)
	return behind, nil
}

// Hashes are those of an image's sections, from which its PCR 11 is predicted without reading them again.
type Hashes struct {
	image   *Image
	banks   []Bank
	digests map[digestKey][]byte
}

// HashSections hashes the sections that are measured, for each bank.
func HashSections(m *Image, banks []Bank) (*Hashes, error) {
	// A copy, for the image may get more sections before something is predicted.
	same := &Image{slices.Clone(m.Profiles)}
	digests, err := digestAll(same, banks)
	if err != nil {
		return nil, err
	}
	return &Hashes{same, banks, digests}, nil
}

// Predict returns what Measure does.
func (h *Hashes) Predict(phases []string) []Prediction {
	m := h.image
	var all []Prediction
	for n := range m.Bootable() {
		sections, err := m.Profile(n)
		if err != nil {
			continue // there is one
		}
		dtbs := slices.DeleteFunc(slices.Clone(sections), func(s *Section) bool { return s.Name != ".dtbauto" })
		for d := range max(1, len(dtbs)) {
			p := Prediction{Profile: n, ID: m.ID(n), PCR: PCRKernel}
			if len(dtbs) > 0 {
				p.DTB = d + 1
			}
			for _, bank := range h.banks {
				pcr := make([]byte, bank.hash().Size())
				for _, name := range measured {
					s := find(sections, name)
					if name == ".dtbauto" && len(dtbs) > 0 {
						s = dtbs[d]
					}
					if s == nil || s.Virtual == 0 || name == ".efifw" {
						continue
					}
					pcr = bank.extend(pcr, bank.sum([]byte(name+"\x00")))
					pcr = bank.extend(pcr, h.digests[digestKey{s, bank}])
				}
				for _, phase := range phases {
					p.Bank, p.Phase = bank, phase
					p.Value = hex.EncodeToString(extendPhase(bank, pcr, phase))
					all = append(all, p)
				}
			}
		}
	}
	return all
}

func extendPhase(bank Bank, pcr []byte, phase string) []byte {
	for word := range strings.SplitSeq(phase, ":") {
		if word != "" {
			pcr = bank.extend(pcr, bank.sum([]byte(word)))
		}
	}
	return pcr
}

type digestKey struct {
	section *Section
	bank    Bank
}

// digestAll hashes the measured sections of all profiles for each bank.
func digestAll(m *Image, banks []Bank) (map[digestKey][]byte, error) {
	if err := checkBanks(banks); err != nil {
		return nil, err
	}
	digests := map[digestKey][]byte{}
	buffers := newBuffers()
	for _, s := range m.Sections() {
		if !slices.Contains(measured, s.Name) || s.Name == ".efifw" {
			continue
		}
		list, err := s.digests(banks, buffers)
		if err != nil {
			return nil, fmt.Errorf("section %s: %w", s.Name, err)
		}
		for k, bank := range banks {
			digests[digestKey{s, bank}] = list[k]
		}
	}
	return digests, nil
}

func checkBanks(banks []Bank) error {
	for _, bank := range banks {
		if bank.hash() == nil {
			return fmt.Errorf("bank %q: want sha1, sha256, sha384 or sha512", bank)
		}
	}
	return nil
}

// buffers take turns: one is read into while the other is hashed.
type buffers [2][]byte

func newBuffers() *buffers { return &buffers{make([]byte, 1<<20), make([]byte, 1<<20)} }

// digests hashes what the section is in memory: it is read once, and the banks are side by side.
func (s *Section) digests(banks []Bank, buffers *buffers) ([][]byte, error) {
	if s.Virtual > s.Size+slack {
		return nil, fmt.Errorf("%d bytes in memory and %d in the file: that is no content", s.Virtual, s.Size)
	}
	var hashes []hash.Hash
	for _, bank := range banks {
		hashes = append(hashes, bank.hash())
	}
	var busy sync.WaitGroup
	defer busy.Wait()
	for at, turn := int64(0), 0; at < s.Virtual; turn = 1 - turn {
		b := buffers[turn]
		b = b[:min(int64(len(b)), s.Virtual-at)]
		data := b[:max(0, min(int64(len(b)), s.Size-at))]
		if len(data) > 0 {
			if n, err := s.ReadAt(data, at); n < len(data) {
				return nil, fmt.Errorf("at byte %d: %w", at+int64(n), short(err))
			}
		}
		clear(b[len(data):])
		busy.Wait()
		for _, h := range hashes {
			busy.Go(func() { h.Write(b) })
		}
		at += int64(len(b))
	}
	busy.Wait()
	var list [][]byte
	for _, h := range hashes {
		list = append(list, h.Sum(nil))
	}
	return list, nil
}

// Config is what the stub is started with besides the UKI.
type Config struct {
	Profile int
	Loader  string   // options that the boot loader gives and measures before: systemd-boot's are "@1" for profile 1
	Cmdline string   // in place of the UKI's; "" if there is none, or Secure Boot is on and the UKI has its own
	Addons  []*Image // in the order in which the stub loads them: those for all UKIs, those of this one, each sorted by name
}

// MeasureConfig predicts PCR 12 as boot loader and stub extend it from the start: with the loader's options, the number of the
// profile if it is not 0, the command line, the addons' command lines as one, their device trees, microcode (the last first) and
// initramfs archives. Credentials and extensions from the ESP are not part of it.
func MeasureConfig(c Config, banks []Bank) ([]Prediction, error) {
	var cmdlines []string
	var dtbs, microcode, initrds []*Section
	for k, addon := range c.Addons {
		sections, err := addon.Profile(0)
		if err != nil {
			return nil, err
		}
		if !addon.IsAddon() {
			return nil, fmt.Errorf("addon %d: it is a UKI or has nothing to add", k+1)
		}
		if s := find(sections, ".cmdline"); s != nil {
			text, err := s.text()
			if err != nil {
				return nil, err
			}
			cmdlines = append(cmdlines, cleanCmdline(text))
		}
		if s := find(sections, ".dtb"); s != nil {
			dtbs = append(dtbs, s)
		}
		if s := find(sections, ".ucode"); s != nil {
			microcode = append([]*Section{s}, microcode...)
		}
		if s := find(sections, ".initrd"); s != nil {
			initrds = append(initrds, s)
		}
	}
	var all []Prediction
	if err := checkBanks(banks); err != nil {
		return nil, err
	}
	var parts [][][]byte // for each part that is a section, by bank
	buffers := newBuffers()
	for _, s := range slices.Concat(dtbs, microcode, initrds) {
		list, err := s.digests(banks, buffers)
		if err != nil {
			return nil, fmt.Errorf("section %s of an addon: %w", s.Name, err)
		}
		parts = append(parts, list)
	}
	for k, bank := range banks {
		pcr := make([]byte, bank.hash().Size())
		text := func(s string) {
			if s != "" {
				pcr = bank.extend(pcr, bank.sum(utf16z(s)))
			}
		}
		text(c.Loader)
		if c.Profile > 0 {
			text(fmt.Sprint(c.Profile))
		}
		text(cleanCmdline(c.Cmdline))
		text(cleanCmdline(strings.Join(cmdlines, " ")))
		for _, digests := range parts {
			pcr = bank.extend(pcr, digests[k])
		}
		all = append(all, Prediction{Profile: c.Profile, Bank: bank, PCR: PCRConfig, Value: hex.EncodeToString(pcr)})
	}
	return all, nil
}

// cleanCmdline is what the stub makes of a command line: control characters are spaces, and none are at the ends.
func cleanCmdline(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' {
			return ' '
		}
		return r
	}, s)
	return strings.Trim(s, " ")
}

// utf16z returns the text in UTF-16 with a NUL, as UEFI has it.
func utf16z(s string) []byte {
	var b []byte
	for _, u := range append(utf16.Encode([]rune(s)), 0) {
		b = append(b, byte(u), byte(u>>8))
	}
	return b
}

// SHA256 returns the hash of the section as it is in the file, in hexadecimal.
func (s *Section) SHA256() (string, error) {
	h := sha256.New()
	if _, err := io.Copy(h, s.Reader()); err != nil {
		return "", fmt.Errorf("section %s: %w", s.Name, err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
