package secureboot

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/composefs-boot/composefs-boot/uki/signer"
)

// Dir is a directory of keys, as it was when it was opened. Its private keys are read only when something is signed, and may be
// elsewhere.
type Dir struct {
	Path         string
	Owner        GUID
	Certificates map[Variable]*x509.Certificate // of PK, KEK and db
	Databases    map[Variable]Database          // all four; dbx may be empty

	// Keys says where a private key is, if not in the directory, as signer.Open takes it.
	Keys map[Variable]string

	last  time.Time // of the last update
	state [sha256.Size]byte
}

// OpenDir opens a directory that New made, and completes a change that was interrupted. Databases that are not signed by the
// keys of the directory are an error: they would be refused by every machine.
func OpenDir(path string) (*Dir, error) {
	if _, err := os.Lstat(filepath.Join(path, committed)); err == nil {
		unlock, err := lock(path)
		if err != nil {
			return nil, err
		}
		err = recoverChange(path)
		unlock()
		if err != nil {
			return nil, err
		}
	}
	d := &Dir{Path: path, Certificates: map[Variable]*x509.Certificate{}, Databases: map[Variable]Database{}}
	text, err := readFile(filepath.Join(path, "owner"))
	if err != nil {
		return nil, fmt.Errorf("%w: make a directory of keys with \"keys new\"", err)
	}
	if d.Owner, err = ParseGUID(strings.TrimSpace(string(text))); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(path, "owner"), err)
	}
	for _, v := range []Variable{PK, KEK, DB} {
		if d.Certificates[v], err = signer.ReadCertificate(filepath.Join(path, v.Name+".pem")); err != nil {
			return nil, err
		}
	}
	for _, v := range Variables {
		if err := d.readDatabase(v); err != nil {
			return nil, err
		}
	}
	d.state, err = readState(path)
	return d, err
}

func (d *Dir) readDatabase(v Variable) error {
	path := filepath.Join(d.Path, v.Name+".auth")
	b, err := readFile(path)
	if errors.Is(err, fs.ErrNotExist) && v == DBX {
		return nil
	}
	if err != nil {
		return err
	}
	u, err := ParseUpdate(b)
	if err == nil {
		err = u.Verify(v, false, d.Certificates[v.signer()])
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	d.Databases[v] = u.Database
	if u.Time.After(d.last) {
		d.last = u.Time
	}
	return nil
}

// readState is a hash of the files that a change depends on.
func readState(path string) (state [sha256.Size]byte, err error) {
	h := sha256.New()
	for _, v := range Variables {
		for _, kind := range []string{".pem", ".auth"} {
			b, err := readFile(filepath.Join(path, v.Name+kind))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return state, err
			}
			fmt.Fprintln(h, len(b))
			h.Write(b)
		}
	}
	h.Sum(state[:0])
	return state, nil
}

// open opens a private key.
func (d *Dir) open(v Variable) (*signer.Signer, error) {
	name := d.Keys[v]
	if name == "" {
		name = filepath.Join(d.Path, v.Name+".key")
	}
	key, err := signer.Open(name, d.Certificates[v].PublicKey)
	if err != nil {
		return nil, fmt.Errorf("key of %s: %w", v.Name, err)
	}
	return key, nil
}

// changing collects the files of a change.
type changing struct {
	*Dir
	time  time.Time // of its updates
	files []File
}

// begin begins a change. Firmware takes an update only if its time is after that of the one before, so it may be later than
// it is.
func (d *Dir) begin(now time.Time) *changing {
	now = now.UTC().Truncate(time.Second)
	if next := d.last.Add(time.Second); now.Before(next) {
		now = next
	}
	return &changing{Dir: d, time: now}
}

func (c *changing) dated(dir, name string) string {
	return dir + "/" + c.time.Format("20060102T150405Z") + "-" + name
}

// keep keeps a file that is to be replaced. A private key may not be there.
func (c *changing) keep(name string) error {
	b, err := readFile(filepath.Join(c.Path, name))
	if errors.Is(err, fs.ErrNotExist) && strings.HasSuffix(name, ".key") {
		return nil
	}
	c.files = append(c.files, File{c.dated("old", name), strings.HasSuffix(name, ".key"), b})
	return err
}

// key is a private key with its certificate.
type key struct {
	*signer.Signer
	certificate *x509.Certificate
}

func (c *changing) sign(name string, v Variable, add bool, d Database, by key) error {
	b, err := Sign(v, add, c.time, d, by, by.certificate)
	c.files = append(c.files, File{name, false, b})
	return err
}

// enrol writes a whole database.
func (c *changing) enrol(v Variable, d Database, by key) error {
	return c.sign(v.Name+".auth", v, false, d, by)
}

// replaceBy and add write updates for machines that have the database already.
func (c *changing) replaceBy(v Variable, d Database, by key) error {
	return c.sign(c.dated("updates", v.Name+".auth"), v, false, d, by)
}

func (c *changing) add(v Variable, d Database, by key) error {
	return c.sign(c.dated("updates", v.Name+".append.auth"), v, true, d, by)
}

// Rotate plans a new key for PK, KEK or db. A machine trusts the old one as well until it is revoked, but PK has only one.
func (d *Dir) Rotate(v Variable, o Options) ([]File, error) {
	if v != PK && v != KEK && v != DB {
		return nil, fmt.Errorf("%s: it has no key: want PK, KEK or db", v.Name)
	}
	by, err := d.open(v.signer())
	if err != nil {
		return nil, err
	}
	defer by.Close()
	signs := key{by, d.Certificates[v.signer()]}
	fresh, err := o.identity(v)
	if err != nil {
		return nil, err
	}
	next := key{&signer.Signer{Signer: fresh.key}, fresh.certificate}
	c := d.begin(o.Time)
	for _, name := range []string{v.Name + ".key", v.Name + ".pem", v.Name + ".auth"} {
		if err := c.keep(name); err != nil {
			return nil, err
		}
	}
	pair, err := fresh.files(v)
	if err != nil {
		return nil, err
	}
	c.files = append(c.files, pair...)
	added := Database{CertificateEntry(d.Owner, fresh.certificate)}
	switch v {
	case PK:
		err = errors.Join(c.enrol(PK, added, next), c.enrol(KEK, d.Databases[KEK], next), c.replaceBy(PK, added, signs))
	case KEK:
		err = errors.Join(c.enrol(KEK, d.Databases[KEK].With(added...), signs), c.enrol(DB, d.Databases[DB], next), c.add(KEK, added, signs))
		if len(d.Databases[DBX]) > 0 {
			err = errors.Join(err, c.enrol(DBX, d.Databases[DBX], next))
		}
	case DB:
		err = errors.Join(c.enrol(DB, d.Databases[DB].With(added...), signs), c.add(DB, added, signs))
	}
	return c.files, err
}

// Revoke plans that entries are trusted no longer. They are put into dbx, and taken out of db for machines that are still to
// be enrolled; those of KEK are taken out of it. The keys that the directory has now cannot be revoked.
func (d *Dir) Revoke(entries Database, now time.Time) ([]File, error) {
	var fromKEK, intoDBX Database
	for _, e := range entries {
		for v, c := range d.Certificates {
			if bytes.Equal(e.Data, c.Raw) {
				return nil, fmt.Errorf("%s: it is the certificate of %s in use: rotate it first", c.Subject, v.Name)
			}
		}
		inKEK := d.Databases[KEK].Has(e)
		if inKEK {
			fromKEK = append(fromKEK, e)
		}
		if (!inKEK || d.Databases[DB].Has(e)) && !d.Databases[DBX].Has(e) {
			intoDBX = append(intoDBX, e)
		}
	}
	c := d.begin(now)
	if len(fromKEK) > 0 {
		by, err := d.open(PK)
		if err != nil {
			return nil, err
		}
		defer by.Close()
		signs, rest := key{by, d.Certificates[PK]}, d.Databases[KEK].Without(fromKEK...)
		if err := errors.Join(c.keep("KEK.auth"), c.enrol(KEK, rest, signs), c.replaceBy(KEK, rest, signs)); err != nil {
			return nil, err
		}
	}
	if len(intoDBX) > 0 {
		by, err := d.open(KEK)
		if err != nil {
			return nil, err
		}
		defer by.Close()
		signs := key{by, d.Certificates[KEK]}
		if len(d.Databases[DBX]) > 0 {
			err = c.keep("dbx.auth")
		}
		err = errors.Join(err, c.enrol(DBX, d.Databases[DBX].With(intoDBX...), signs), c.add(DBX, Database{}.With(intoDBX...), signs))
		if rest := d.Databases[DB].Without(intoDBX...); len(rest) < len(d.Databases[DB]) {
			err = errors.Join(err, c.keep("db.auth"), c.enrol(DB, rest, signs))
		}
		if err != nil {
			return nil, err
		}
	}
	if len(c.files) == 0 {
		return nil, errors.New("nothing to do: dbx has it already")
	}
	return c.files, nil
}
