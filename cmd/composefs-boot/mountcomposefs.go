package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/boot/setuproot"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// mountComposefs is a run of the command mount.composefs.
type mountComposefs struct {
	image         setuproot.ImageMount
	target        string
	fake, verbose bool
}

func (a *app) mountComposefsCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "mount.composefs",
		Short: "Mount an image that is a file anywhere, as the program mount.composefs does",
		Long: `Mount the composefs image IMAGE at the directory MOUNTPOINT, as mount.composefs 1.0.8 does. Under this name, in
/usr/sbin, mount(8) and fstab find it for the type composefs. Needs root.

  -o OPTION[,OPTION]...  options, see below; may be given several times; a backslash goes before a comma in a value
  -t composefs           the type
  -f                     check the command line, and mount nothing
  -v                     print what is done
  -n, -s                 nothing; mount(8) gives them

  basedir=PATH[:PATH]... the directories of objects, the first one that has an object counts
  digest=DIGEST          the image must have this fs-verity digest; implies verity
  verity                 every object must have the fs-verity digest that the image names
  tryverity              the same, where the kernel can
  noverity               undoes these
  idmap=PATH             map owners by this user namespace, /proc/PID/ns/user
  upperdir=PATH          directory for what is changed
  workdir=PATH           directory that the kernel works in, on the same file system
  ro, rw                 whether it can be changed, with upperdir [default: rw]`,
		Example: `  mount.composefs -o basedir=objects tree.cfs /mnt
  mount -t composefs -o basedir=/srv/objects,digest=$(composefs-info measure-file tree.cfs) tree.cfs /mnt
  /srv/tree.cfs  /srv/tree  composefs  ro,basedir=/srv/objects,verity  0 0`,
	}
	return a.dropIn(c, "mount.composefs [-fnsv] [-t composefs] -o OPTIONS IMAGE MOUNTPOINT",
		func(_ *cobra.Command, args []string, common []option) error {
			m, err := parseMountComposefs(args, common)
			if err != nil || m.fake {
				return err
			}
			abilities, err := m.image.Look()
			if err != nil {
				return err
			}
			steps, err := m.image.Plan(abilities, m.target)
			if err != nil {
				return err
			}
			if m.verbose {
				fmt.Fprint(a.out, setuproot.Format(steps))
			}
			_, err = setuproot.Execute(steps)
			return err
		})
}

func parseMountComposefs(args []string, common []option) (mountComposefs, error) {
	var m mountComposefs
	var o mountOptions
	operands, err := getopt(args, append(common,
		option{"h", false, func(string) error { return errHelp }},
		option{"o", true, o.add},
		option{"t", true, func(s string) error {
			if s != "composefs" {
				return fmt.Errorf("-t %s: want composefs", s)
			}
			return nil
		}},
		flag("f", &m.fake),
		flag("v", &m.verbose),
		option{"n", false, nil},
		option{"s", false, nil},
	))
	if err != nil {
		return m, err
	}
	if len(operands) != 2 {
		return m, fmt.Errorf("%d operands: want IMAGE and MOUNTPOINT (see --help)", len(operands))
	}
	m.image, err = o.mount(operands[0])
	m.target = operands[1]
	return m, err
}

// mountOptions is what -o says.
type mountOptions struct {
	basedir, digest, idmap, upper, work string
	verity                              setuproot.Verity
	noVerity, readOnly                  bool
}

// add reads a list of options. A backslash before any character of a value stands for that character.
func (o *mountOptions) add(list string) error {
	for {
		end := indexUnescaped(list)
		key, value, _ := strings.Cut(list[:end], "=")
		if err := o.set(key, unescapeValue(value)); err != nil {
			return err
		}
		if end == len(list) {
			return nil
		}
		list = list[end+1:]
	}
}

func (o *mountOptions) set(key, value string) error {
	values := map[string]*string{"basedir": &o.basedir, "digest": &o.digest, "idmap": &o.idmap, "upperdir": &o.upper, "workdir": &o.work}
	switch key {
	case "basedir", "digest", "idmap", "upperdir", "workdir":
		if value == "" {
			return fmt.Errorf("-o %s: no value: want %s=...", key, key)
		}
		*values[key] = value
		return nil
	case "verity":
		o.verity, o.noVerity = setuproot.RequireVerity, false
	case "tryverity":
		o.verity = max(o.verity, setuproot.TryVerity)
	case "noverity":
		o.verity, o.noVerity = setuproot.NoVerity, true
	case "ro", "rw":
		o.readOnly = key == "ro"
	default:
		return fmt.Errorf("-o %s: unsupported option (see --help)", key)
	}
	return nil
}

// mount checks what the options say together.
func (o *mountOptions) mount(image string) (setuproot.ImageMount, error) {
	m := setuproot.ImageMount{Image: image, Objects: strings.Split(o.basedir, ":"), Verity: o.verity, IDMap: o.idmap,
		Upper: o.upper, Work: o.work, Writable: o.upper != "" && !o.readOnly}
	switch {
	case o.basedir == "":
		return m, errors.New("no object directory: give it with -o basedir=PATH")
	case slices.Contains(m.Objects, ""):
		return m, fmt.Errorf("-o basedir=%s: an empty path: want paths with one \":\" between them", o.basedir)
	case (o.upper == "") != (o.work == ""):
		return m, errors.New("-o upperdir and workdir go together: give both or none")
	case o.digest != "" && o.noVerity:
		return m, errors.New("-o digest and noverity: leave one of them out")
	}
	if o.digest != "" {
		var err error
		if m.Digest, err = fsverity.ParseHex(strings.ToLower(o.digest)); err != nil {
			return m, fmt.Errorf("-o digest: %w", err)
		}
		m.Verity = setuproot.RequireVerity
	}
	return m, nil
}

// indexUnescaped returns where the first option of a list ends: at a comma, or where the list does.
func indexUnescaped(list string) int {
	for k := 0; k < len(list); k++ {
		switch list[k] {
		case '\\':
			k++
		case ',':
			return k
		}
	}
	return len(list)
}

func unescapeValue(s string) string {
	var b strings.Builder
	for k := 0; k < len(s); k++ {
		if s[k] == '\\' {
			if k++; k == len(s) {
				break
			}
		}
		b.WriteByte(s[k])
	}
	return b.String()
}
