package secureboot

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// names lists the files below a directory, if it is there.
func names(t *testing.T, dir string) []string {
	t.Helper()
	var list []string
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			path, err = filepath.Rel(dir, path)
			list = append(list, path)
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return list
}

var fresh = []string{"KEK.auth", "KEK.key", "KEK.pem", "PK.auth", "PK.key", "PK.pem", "db.auth", "db.key", "db.pem", "owner", "pcr.key", "pcr.pub"}

// Private keys are their owner's alone, whatever the umask.
func TestModes(t *testing.T) {
	for _, umask := range []int{0, 0o077, 0o777} {
		old := unix.Umask(0o022)
		parent := t.TempDir()
		unix.Umask(umask)
		files, err := made()
		path := filepath.Join(parent, "keys")
		if err == nil {
			if umask == 0o777 { // a directory that could not be opened is no use
				err = os.Mkdir(path, 0)
				err = errors.Join(err, os.Chmod(path, 0o700))
			}
			err = errors.Join(err, Create(path, files))
		}
		unix.Umask(old)
		if err != nil {
			t.Fatal(err)
		}
		if got := names(t, path); !slices.Equal(got, fresh) {
			t.Errorf("files %q", got)
		}
		d := reopen(t, path)
		unix.Umask(umask)
		change, err := d.Rotate(DB, usual)
		if err == nil {
			err = d.Apply(change)
		}
		unix.Umask(old)
		if err != nil && umask != 0o777 {
			t.Fatal(err)
		}
		for _, name := range append(names(t, path), ".") {
			info, err := os.Stat(filepath.Join(path, name))
			if err != nil {
				t.Fatal(err)
			}
			want := fs.FileMode(0o644)
			if name == "." {
				want = 0o700
			} else if strings.HasSuffix(name, ".key") {
				want = 0o600
			}
			if info.Mode().Perm() != want {
				t.Errorf("umask %o: %s has %v, want %v", umask, name, info.Mode().Perm(), want)
			}
		}
	}
}

// Nothing is overwritten, and what was made before a failure is removed.
func TestCreateAllOrNothing(t *testing.T) {
	files, err := made()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		dir := t.TempDir()
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		there := filepath.Join(dir, f.Name)
		write(t, there, []byte("precious"))
		if err := Create(dir, files); err == nil || !strings.Contains(err.Error(), f.Name+": it is there already") {
			t.Errorf("%s: %v", f.Name, err)
		}
		if got := names(t, dir); !slices.Equal(got, []string{f.Name}) || string(contents(t, there)) != "precious" {
			t.Errorf("%s: %q is left", f.Name, got)
		}
		if err := os.Remove(there); err != nil {
			t.Fatal(err)
		}
		// A link that leads nowhere is there, too.
		if err := os.Symlink(filepath.Join(dir, "elsewhere"), there); err != nil {
			t.Fatal(err)
		}
		if err := Create(dir, files); err == nil {
			t.Errorf("%s: a key is written through a link", f.Name)
		}
	}
	// A file that comes to be there meanwhile: here it is the same twice.
	twice := filepath.Join(t.TempDir(), "twice.key")
	if err := CreateFiles([]File{{twice, true, []byte("one")}, {twice, true, []byte("two")}}); err == nil {
		t.Errorf("a key is overwritten: %s", contents(t, twice))
	} else if _, err := os.Lstat(twice); err == nil {
		t.Error("what was made is left")
	}
	// The last file cannot be made: the directory goes as well.
	path := filepath.Join(t.TempDir(), "keys")
	if err := Create(path, append(slices.Clone(files), File{Name: "none/file"})); err == nil {
		t.Error("no error")
	}
	if _, err := os.Lstat(path); err == nil {
		t.Errorf("the directory is left, with %q", names(t, path))
	}
}

func TestCheckPlace(t *testing.T) {
	top := t.TempDir()
	mkdir := func(name string, mode fs.FileMode) string {
		path := filepath.Join(top, name)
		if err := os.MkdirAll(path, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	file := write(t, filepath.Join(top, "file"), nil)
	private, readable := mkdir("private", 0o700), mkdir("readable", 0o755)
	group, world, sticky := mkdir("group", 0o770), mkdir("world", 0o777), mkdir("sticky", 0o777|fs.ModeSticky)
	repository := mkdir("repo", 0o755)
	mkdir("repo/objects/00", 0o755)
	mkdir("repo/images", 0o755)
	notOne := mkdir("program", 0o755)
	mkdir("program/objects", 0o755)
	link := filepath.Join(top, "link")
	if err := os.Symlink(mkdir("repo/streams", 0o755), link); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		private: "", private + "/new": "", readable: "", notOne + "/objects": "",
		sticky + "/new": "", sticky: "others may write",
		group: "others may write", group + "/new": "others may write", world: "others may write", world + "/new": "others may write",
		repository: "composefs repository", repository + "/new": "composefs repository", repository + "/objects/00": "composefs repository",
		link: "composefs repository", link + "/new": "composefs repository",
		file: "no directory", top + "/none/new": "no such file",
	} {
		err := CheckPlace(path)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", path, err, want)
		}
		if want != "" && path != file {
			files := []File{{"x.key", true, nil}}
			if Create(path, files) == nil {
				t.Errorf("%s: a key is made there", path)
			}
		}
	}
}

func certificates(t *testing.T, d Database) (names []string) {
	t.Helper()
	for _, e := range d {
		c, err := e.Certificate()
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, c.Subject.CommonName+" "+c.SerialNumber.Text(62))
	}
	return names
}

// firmware is a machine that takes updates as the specification says: the last word of each variable, and its time.
type firmware struct {
	databases map[Variable]Database
	times     map[Variable]time.Time
}

func enrolled(t *testing.T, d *Dir) *firmware {
	f := &firmware{map[Variable]Database{}, map[Variable]time.Time{}}
	for _, v := range []Variable{DB, DBX, KEK, PK} { // in setup mode until PK is there
		b, err := os.ReadFile(filepath.Join(d.Path, v.Name+".auth"))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := errors.Join(err, f.take(v, false, b)); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

func (f *firmware) take(v Variable, add bool, b []byte) error {
	u, err := ParseUpdate(b)
	if err != nil {
		return err
	}
	if len(f.databases[PK]) > 0 {
		ok := false
		for _, e := range f.databases[v.signer()] {
			c, err := e.Certificate()
			ok = ok || err == nil && u.Verify(v, add, c) == nil
		}
		if !ok {
			return errors.New("not signed by a key that may")
		}
	}
	if add {
		f.databases[v] = f.databases[v].With(u.Database...)
	} else if !u.Time.After(f.times[v]) {
		return errors.New("not newer than the last one")
	} else {
		f.databases[v] = u.Database
	}
	if u.Time.After(f.times[v]) {
		f.times[v] = u.Time
	}
	return nil
}

// update takes the updates of the directory that it has not seen.
func (f *firmware) update(t *testing.T, d *Dir, seen map[string]bool) {
	t.Helper()
	for _, name := range names(t, filepath.Join(d.Path, "updates")) {
		if seen[name] {
			continue
		}
		seen[name] = true
		variable, _, _ := strings.Cut(name[strings.Index(name, "-")+1:], ".")
		v, err := ParseVariable(variable)
		if err == nil {
			err = f.take(v, strings.HasSuffix(name, ".append.auth"), contents(t, filepath.Join(d.Path, "updates", name)))
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A machine that is enrolled and updated has what one has that is enrolled afresh, after every change, even if all of them are
// made in the same second.
func TestRotateAndRevoke(t *testing.T) {
	d := newDir(t)
	machine, late, seen := enrolled(t, d), enrolled(t, d), map[string]bool{}
	check := func(what string) {
		t.Helper()
		machine.update(t, d, seen)
		again := enrolled(t, d)
		for _, v := range Variables {
			if a, b := again.databases[v], machine.databases[v]; len(a) != len(b) || !slices.EqualFunc(a, b, Entry.same) {
				t.Errorf("%s: %s has %d entries in a new machine and %d in an updated one", what, v.Name, len(a), len(b))
			}
			if v != DBX && !again.databases[v].Has(CertificateEntry(owner, d.Certificates[v])) {
				t.Errorf("%s: %s.pem is not in %s", what, v.Name, v.Name)
			}
		}
	}
	check("fresh")
	rotate := func(v Variable) {
		t.Helper()
		old, oldKey := d.Certificates[v], contents(t, filepath.Join(d.Path, v.Name+".key"))
		files, err := d.Rotate(v, usual)
		d = apply(t, d, files, err)
		check("rotate " + v.Name)
		if d.Certificates[v].Equal(old) {
			t.Errorf("%s has the old certificate", v.Name)
		}
		kept, _ := filepath.Glob(filepath.Join(d.Path, "old", "*-"+v.Name+".key"))
		if len(kept) == 0 || !bytes.Equal(contents(t, kept[len(kept)-1]), oldKey) {
			t.Errorf("the old key of %s is not kept: %q", v.Name, kept)
		}
	}
	oldDB, oldKEK := d.Certificates[DB], d.Certificates[KEK]
	rotate(DB)
	if got := certificates(t, d.Databases[DB]); len(got) != 2 {
		t.Errorf("db has %q", got)
	}
	rotate(KEK)
	files, err := d.Revoke(Database{HashEntry(owner, [32]byte{1})}, day)
	d = apply(t, d, files, err)
	check("revoke a hash")
	rotate(PK)
	if len(d.Databases[PK]) != 1 {
		t.Errorf("PK has %d certificates", len(d.Databases[PK]))
	}
	rotate(KEK)
	rotate(PK)
	rotate(DB)
	files, err = d.Revoke(Database{CertificateEntry(NewGUID(), oldKEK)}, day)
	d = apply(t, d, files, err)
	check("revoke the old KEK")
	if d.Databases[KEK].Has(CertificateEntry(owner, oldKEK)) {
		t.Error("the old KEK is still there")
	}
	files, err = d.Revoke(Database{CertificateEntry(owner, oldDB), HashEntry(owner, [32]byte{1}), HashEntry(owner, [32]byte{2})}, day)
	d = apply(t, d, files, err)
	machine.update(t, d, seen)
	late.update(t, d, map[string]bool{})
	again := enrolled(t, d)
	for name, f := range map[string]*firmware{"a machine": machine, "a late one": late, "a new one": again} {
		trust, err := Trust(f.databases[DB], f.databases[DBX])
		if err != nil {
			t.Fatal(err)
		}
		if len(trust.Revoked.Hashes) != 2 || len(trust.Revoked.Certificates) != 1 || !trust.Revoked.Certificates[0].Equal(oldDB) {
			t.Errorf("%s revokes %+v", name, trust.Revoked)
		}
	}
	if again.databases[DB].Has(CertificateEntry(owner, oldDB)) {
		t.Error("a new machine gets the revoked certificate")
	}
	for what, entries := range map[string]Database{
		"rotate it first":          {CertificateEntry(owner, d.Certificates[DB])},
		"has it already":           {HashEntry(owner, [32]byte{2})},
		"certificate of PK in use": {CertificateEntry(owner, d.Certificates[PK])},
	} {
		if _, err := d.Revoke(entries, day); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%v, want %q", err, what)
		}
	}
	if _, err := d.Rotate(DBX, usual); err == nil {
		t.Error("dbx has a new key")
	}
	for _, name := range names(t, d.Path) {
		if strings.HasPrefix(name, staged) || strings.HasPrefix(name, committed) {
			t.Errorf("%s is left", name)
		}
	}
}

// A change that stops at any moment is made whole by whoever opens the directory next, or is as if it had never been.
func TestInterruptedChange(t *testing.T) {
	d := newDir(t)
	files, err := d.Rotate(DB, usual)
	if err != nil {
		t.Fatal(err)
	}
	before := d.state
	// Before it is committed.
	if err := os.Mkdir(filepath.Join(d.Path, staged), 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(d.Path, staged, "db.pem"), []byte("half"))
	if d = reopen(t, d.Path); d.state != before {
		t.Error("a change that was not committed counts")
	}
	if err := d.Apply(files); err != nil {
		t.Fatal(err)
	}
	after := reopen(t, d.Path)
	if after.state == before {
		t.Error("nothing has changed")
	}
	// After that, with 0, 1, ... of its files moved.
	for moved := range len(files) {
		d := newDir(t)
		top := filepath.Join(d.Path, committed)
		for k, f := range files {
			dir := top
			if k < moved {
				dir = d.Path
			}
			path := filepath.Join(dir, f.Name)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			write(t, path, f.Data)
		}
		if err := os.MkdirAll(top, 0o755); err != nil {
			t.Fatal(err)
		}
		if d = reopen(t, d.Path); d.state != after.state {
			t.Errorf("after %d files: another state", moved)
		}
		if got, want := names(t, d.Path), names(t, after.Path); !slices.Equal(got, want) {
			t.Errorf("after %d files: %q, want %q", moved, got, want)
		}
	}
}

// Two changes of the same state: the second one would undo the first.
func TestConcurrentChanges(t *testing.T) {
	d := newDir(t)
	other := reopen(t, d.Path)
	one, err := d.Revoke(Database{HashEntry(owner, [32]byte{1})}, day)
	if err != nil {
		t.Fatal(err)
	}
	two, err := other.Revoke(Database{HashEntry(owner, [32]byte{2})}, day)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Apply(one); err != nil {
		t.Fatal(err)
	}
	if err := other.Apply(two); err == nil || !strings.Contains(err.Error(), "try again") {
		t.Errorf("%v", err)
	}
	if d = reopen(t, d.Path); len(d.Databases[DBX]) != 1 {
		t.Errorf("dbx has %d entries", len(d.Databases[DBX]))
	}
}

// A directory whose parts do not belong together is refused.
func TestOpenDirRefuses(t *testing.T) {
	for name, spoil := range map[string]func(d *Dir){
		"db.auth: no update of db signed by": func(d *Dir) {
			b := contents(t, filepath.Join(d.Path, "PK.auth"))
			write(t, filepath.Join(d.Path, "db.auth"), b)
		},
		"KEK.pem: no certificate":  func(d *Dir) { write(t, filepath.Join(d.Path, "KEK.pem"), nil) },
		"make a directory of keys": func(d *Dir) { os.Remove(filepath.Join(d.Path, "owner")) },
		"owner: GUID":              func(d *Dir) { write(t, filepath.Join(d.Path, "owner"), []byte("me")) },
		"PK.auth: no such file":    func(d *Dir) { os.Remove(filepath.Join(d.Path, "PK.auth")) },
	} {
		d := newDir(t)
		spoil(d)
		if _, err := OpenDir(d.Path); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%v, want %q", err, name)
		}
	}
	// A private key that is kept elsewhere is not needed before something is signed with it.
	d := newDir(t)
	safe := filepath.Join(t.TempDir(), "PK.key")
	if err := os.Rename(filepath.Join(d.Path, "PK.key"), safe); err != nil {
		t.Fatal(err)
	}
	d = reopen(t, d.Path)
	if _, err := d.Rotate(DB, usual); err != nil {
		t.Error(err)
	}
	if _, err := d.Rotate(KEK, usual); err == nil || !strings.Contains(err.Error(), "PK.key") {
		t.Errorf("%v", err)
	}
	d.Keys = map[Variable]string{PK: safe}
	files, err := d.Rotate(PK, usual)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if strings.HasPrefix(f.Name, "old/") && strings.HasSuffix(f.Name, ".key") {
			t.Error("a key that is not there is kept")
		}
	}
	d.Keys = map[Variable]string{PK: filepath.Join(d.Path, "db.key")}
	if _, err := d.Rotate(PK, usual); err == nil || !strings.Contains(err.Error(), "does not belong") {
		t.Errorf("%v", err)
	}
}
