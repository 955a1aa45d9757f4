package chain

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/composefs-boot/composefs-boot/boot/karg"
)

// when says with which value an argument matters.
type when int

const (
	always when = iota
	bare        // only as a word without a value
	on          // without a value, or with one that does not switch it off
	unit        // if the value names a unit for emergencies
)

// danger is an argument that gives whoever sits at the machine, or whoever wrote to its disk, more than the image.
type danger struct {
	names []string
	when  when
	why   string
}

// dangers are from the kernel's bootparam(7) and kernel-parameters, systemd's kernel-command-line(7), systemd-debug-generator(8)
// and systemd-run-generator(8), dracut.cmdline(7) and initramfs-tools(7).
var dangers = []danger{
	{[]string{"init"}, always, "starts this program in place of the image's init"},
	{[]string{"rdinit"}, always, "starts this program of the initramfs in place of the one that verifies the image"},
	{[]string{"initrd", "initrdmem"}, always, "loads another initramfs, which nothing signs"},
	{[]string{"dtb"}, always, "loads a device tree from the ESP, which nothing signs"},
	{[]string{"efivar-ssdt"}, always, "runs ACPI code from a variable of the firmware, which nothing signs"},
	{[]string{"kgdboc", "kgdboe", "kgdbwait", "kdb"}, always, "gives a debugger of the kernel to whoever is at the console"},
	{[]string{"rd.break", "break"}, always, "stops in the initramfs with a root shell"},
	{[]string{"rd.shell"}, on, "gives a root shell when the initramfs fails, which a changed disk can make it do"},
	{[]string{"rd.cmdline"}, always, "asks at the console for more arguments"},
	{[]string{"single", "s", "S", "1", "rescue", "rd.rescue", "emergency", "rd.emergency", "-b"}, bare, "starts a root shell in place of the system"},
	{[]string{"systemd.unit", "systemd.wants"}, unit, "starts a root shell in place of the system, or besides it"},
	{[]string{"systemd.debug-shell"}, on, "opens a root shell without a password on a console"},
	{[]string{"systemd.crash-shell"}, on, "opens a root shell when systemd crashes"},
	{[]string{"systemd.confirm-spawn"}, on, "asks at the console which services to start"},
	{[]string{"systemd.run"}, always, "runs a command as root"},
	{[]string{"systemd.setenv"}, always, "sets variables for all services: LD_PRELOAD loads code from anywhere"},
	{[]string{"systemd.set-credential", "systemd.set-credential-binary"}, always, "sets a credential: passwords, keys and units can come from it"},
	{[]string{"systemd.pull"}, always, "downloads files into the system before it starts"},
	{[]string{"systemd.mount-extra", "mount.usr"}, always, "mounts another file system over the verified one"},
	{[]string{"systemd.volatile"}, on, "puts another root in place of the verified one"},
	{[]string{"roothash", "usrhash"}, always, "makes systemd mount another root or /usr, beside the image"},
	{[]string{"nfsroot", "netroot", "rd.live.image"}, always, "takes the root from elsewhere than the disk"},
}

// emergencies are parts of the names of units that give a shell.
var emergencies = []string{"rescue", "emergency", "debug-shell", "runlevel1."}

// off are the values that switch an argument off.
var off = []string{"0", "n", "no", "f", "false", "off"}

// word is an argument as some program in the boot may see it.
type word struct {
	text, name, value string // the name with "-" for "_", as the kernel and systemd compare it
	has               bool   // a value
}

// words cuts a command line at every white space, and leaves quotes out. The kernel, systemd and the shell scripts of an initramfs
// disagree about quotes, and about what comes after "--": what is hidden in a quoted value for one is an argument for another.
// So every word counts.
func words(cmdline string) []word {
	cmdline, _, _ = strings.Cut(cmdline, "\x00")
	b := []byte(cmdline)
	for k := range b {
		if b[k] <= ' ' || b[k] == 0xa0 { // the stub makes spaces of control characters; the other is one for the kernel
			b[k] = ' '
		}
	}
	var list []word
	for text := range strings.FieldsSeq(string(b)) {
		text = strings.NewReplacer(`"`, "", `'`, "").Replace(text)
		w := word{text: text}
		w.name, w.value, w.has = strings.Cut(text, "=")
		w.name = plain(w.name)
		list = append(list, w)
	}
	return list
}

// plain is the name of an argument as it is compared. What systemd knows it knows for the initramfs alone, too.
func plain(name string) string {
	name = strings.ReplaceAll(name, "_", "-")
	if rest, ok := strings.CutPrefix(name, "rd."); ok && strings.HasPrefix(rest, "systemd.") {
		return rest
	}
	return name
}

func (d danger) is(w word) bool {
	if !slices.Contains(d.names, w.name) {
		return false
	}
	switch d.when {
	case bare:
		return !w.has
	case on:
		return !w.has || !slices.Contains(off, strings.ToLower(w.value))
	case unit:
		return slices.ContainsFunc(emergencies, func(e string) bool { return strings.Contains(w.value, e) })
	}
	return true
}

// allows tells whether an argument is permitted by name.
func allows(list []string, w word) bool {
	return slices.ContainsFunc(list, func(a string) bool { return a == w.text || !strings.Contains(a, "=") && plain(a) == w.name })
}

// leave is the way out of an argument that should not be there.
func leave(name string) string {
	return fmt.Sprintf("leave it out and build again, or permit it with --allow %s", name)
}

// dangerous returns a broken link for each argument that leads away from the image.
func dangerous(cmdline, where string, allow []string) []Link {
	var links []Link
	root := ""
	for _, w := range words(cmdline) {
		if allows(allow, w) {
			continue
		}
		broken := func(why string) {
			links = append(links, Link{Cmdline, where, Broken, fmt.Sprintf("%.200s: %s", w.text, why), leave(w.name)})
		}
		for _, d := range dangers {
			if d.is(w) {
				broken(d.why)
			}
		}
		if w.name == "root" {
			if root != "" && w.value != root {
				broken(fmt.Sprintf("root=%.100s stands before it: programs disagree about which one counts", root))
			}
			root = w.value
		}
	}
	return links
}

// cmdline checks a command line that is signed and names the image, and returns what it names.
func (v *verifier) cmdline(text, where string) (links []Link, images []karg.Image) {
	broken := func(found, way string) { links = append(links, Link{Cmdline, where, Broken, found, way}) }
	choice, err := karg.Parse(text)
	switch {
	case errors.Is(err, karg.ErrNone):
		broken("no composefs argument: nothing names the image", "build it with --image")
	case err != nil:
		broken(err.Error(), "build it with --image")
	}
	for k, i := range choice.Images {
		if i.Insecure {
			broken(fmt.Sprintf("%v: with \"?\" the image is booted without verification", i), "leave the \"?\" out")
		}
		if k > 0 && !allows(v.Allow, word{name: i.Key}) {
			broken(fmt.Sprintf("%v: a second image, which is booted when the first one is not on the disk", i), leave(i.Key))
		}
	}
	for _, i := range choice.Ignored {
		broken(fmt.Sprintf("%.200s: another argument of its kind stands before it", i), "leave it out")
	}
	links = append(links, dangerous(text, where, v.Allow)...)
	if len(links) == 0 {
		links = []Link{{Cmdline, where, OK, choice.Images[0].String(), ""}}
	}
	return links, choice.Images
}

// appended checks a command line that an addon appends.
func (v *verifier) appended(text, where string) []Link {
	links := dangerous(text, where, v.Allow)
	for _, a := range karg.Split(text) {
		if a.Key == karg.KeyDigest || a.Key == karg.KeyV2 {
			links = append(links, Link{Cmdline, where, Broken,
				fmt.Sprintf("%.200s=%.200s: an image, which may be booted when that of the UKI is not on the disk", a.Key, a.Value),
				"leave it out: the UKI names the image"})
		}
	}
	for k := range links {
		links[k].Kind = Addon
	}
	return links
}
