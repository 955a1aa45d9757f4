package boot

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/uki"
	"github.com/composefs-boot/composefs-boot/uki/secureboot"
)

// Signing is the key for Secure Boot. With one, an install puts nothing onto the ESP that firmware which trusts its certificate
// alone would not start: what is made is signed, and what is brought must be signed already.
type Signing struct {
	Key         crypto.Signer
	Certificate *x509.Certificate
}

// sign writes a signed copy of a program for UEFI.
func (s *Signing) sign(c uki.Content, scratch *Scratch) (uki.Content, error) {
	p, err := uki.ParsePE(c, c.Size)
	if err != nil {
		return c, err
	}
	f, err := scratch.Create()
	if err != nil {
		return c, err
	}
	if err := uki.Sign(f, p, s.Key, s.Certificate); err != nil {
		return c, err
	}
	info, err := f.Stat()
	return uki.Content{ReaderAt: f, Size: info.Size()}, err
}

// verify refuses a program that the firmware would not start: one that is not signed with the key of the install, or not trusted
// by the keys that are to be enrolled. Without either, anything goes.
func (d Deployment) verify(c uki.Content) error {
	var trusts []uki.Trust
	if d.Sign != nil {
		trusts = append(trusts, uki.Trust{Certificates: []*x509.Certificate{d.Sign.Certificate}})
	}
	if d.Enroll != nil {
		trusts = append(trusts, d.Enroll.Trust)
	}
	for _, t := range trusts {
		p, err := uki.ParsePE(c, c.Size)
		if err == nil {
			_, err = p.Verify(t)
		}
		if err != nil {
			return fmt.Errorf("with Secure Boot it would not be used: %w", err)
		}
	}
	return nil
}

// Enrollment is keys that systemd-boot enrols, see systemd-boot(7): at the next boot of a virtual machine in setup mode, on other
// machines when somebody chooses it in the menu.
type Enrollment struct {
	Trust uki.Trust // of firmware that has them
	files []Place
}

// ReadEnrollment reads PK.auth, KEK.auth and db.auth of a directory, and dbx.auth if it is there.
func ReadEnrollment(dir string, scratch *Scratch) (*Enrollment, error) {
	e := &Enrollment{}
	databases := map[secureboot.Variable]secureboot.Database{}
	for _, v := range secureboot.Variables {
		name := path.Join(dir, v.Name+".auth")
		c, err := scratch.Open(name)
		if errors.Is(err, fs.ErrNotExist) && v == secureboot.DBX {
			continue
		}
		if err != nil {
			return nil, err
		}
		if databases[v], err = readUpdate(c, v); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		p := contentPlace("loader/keys/auto/"+v.Name+".auth", c) // systemd-boot looks for the name auto
		p.Loader = true                                          // keys that are there already are somebody's decision
		e.files = append(e.files, p)
	}
	var err error
	e.Trust, err = secureboot.Trust(databases[secureboot.DB], databases[secureboot.DBX])
	return e, err
}

// maxUpdate limits a file of keys, in bytes; the dbx of all machines has some 20,000.
const maxUpdate = 1 << 20

func readUpdate(c uki.Content, v secureboot.Variable) (secureboot.Database, error) {
	if c.Size > maxUpdate {
		return nil, fmt.Errorf("%d bytes, at most %d are read", c.Size, maxUpdate)
	}
	b, err := io.ReadAll(c.Reader())
	if err != nil {
		return nil, err
	}
	u, err := secureboot.ParseUpdate(b)
	if err != nil {
		return nil, err
	}
	if of, _, _, err := u.Covers(); err != nil || of != v {
		return nil, errors.Join(err, fmt.Errorf("it is no update of %s", v.Name))
	}
	return u.Database, nil
}

// Sizes of files that are searched for private keys, in bytes: the smallest RSA key for Secure Boot has more than the first,
// and the largest, in a file with all its certificates, has less than the second.
const (
	minKeyFile = 100
	maxKeyFile = 64 << 10
)

// RefuseKeys refuses a directory with a file that has the private half of one of the public keys: an image is for everybody to
// read. Keys that are encrypted are not recognized.
func RefuseKeys(dir string, public []crypto.PublicKey) error {
	if len(public) == 0 {
		return nil
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	return fs.WalkDir(root.FS(), ".", func(name string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		info, err := e.Info()
		if err != nil || info.Size() < minKeyFile || info.Size() > maxKeyFile {
			return err
		}
		f, err := root.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		b, err := io.ReadAll(io.LimitReader(f, maxKeyFile))
		if err == nil && hasKey(b, public) {
			err = errKeyInTree(path.Join(dir, name))
		}
		return err
	})
}

func errKeyInTree(name string) error {
	return fmt.Errorf("%s: this is a private key that is signed with here, and all would be able to read it: move it out of the tree", name)
}

// RefuseKeysIn refuses a tree as RefuseKeys does a directory.
func RefuseKeysIn(t *fstree.Tree, open fstree.Open, public []crypto.PublicKey) error {
	if len(public) == 0 {
		return nil
	}
	return t.Walk(func(name string, i *fstree.Inode) error {
		if _, ok := i.Content.(*fstree.Object); !ok || i.Size() < minKeyFile || i.Size() > maxKeyFile {
			return nil
		}
		f, err := open(name, i)
		if err != nil {
			return err
		}
		defer f.Close()
		b, err := io.ReadAll(io.LimitReader(f, maxKeyFile))
		if err == nil && hasKey(b, public) {
			err = errKeyInTree(name)
		}
		return err
	})
}

// hasKey tells whether a file, PEM or DER, has the private half of one of the public keys.
func hasKey(b []byte, public []crypto.PublicKey) bool {
	ders := [][]byte{b}
	for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
		if strings.HasSuffix(block.Type, "PRIVATE KEY") {
			ders = append(ders, block.Bytes)
		}
	}
	for _, der := range ders {
		if len(der) == 0 || der[0] != 0x30 { // no sequence
			continue
		}
		half, ok := publicOf(der).(interface{ Equal(crypto.PublicKey) bool })
		for _, p := range public {
			if ok && half.Equal(p) {
				return true
			}
		}
	}
	return false
}

// publicOf returns the public half of a private key, nil if there is none.
func publicOf(der []byte) crypto.PublicKey {
	if key, err := x509.ParsePKCS8PrivateKey(der); err == nil {
		if private, ok := key.(crypto.Signer); ok {
			return private.Public()
		}
	}
	if key, err := x509.ParsePKCS1PrivateKey(der); err == nil {
		return key.Public()
	}
	if key, err := x509.ParseECPrivateKey(der); err == nil {
		return key.Public()
	}
	return nil
}
