// Package selinux labels a file tree by the SELinux policy that is in it.
//
// A policy's file_contexts has one specification a line: a regular expression for whole paths, a file type if it is for one
// type alone, and a label; the last one that matches counts, and "<<none>>" means no label. file_contexts.local and
// .homedirs come after it. file_contexts.subs and .subs_dist say which directories are labelled as if they were others.
// The files are described in selabel_file(5) and file_contexts(5).
//
// A policy has thousands of specifications, a tree thousands of paths. So a specification is looked at only for paths that
// begin with the text that its expression begins with, an expression is compiled when it is looked at for the first time,
// and those that are plain text, or plain text with everything below, are never compiled.
package selinux

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"path"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/dlclark/regexp2"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// Attribute is the extended attribute that holds a file's label.
const Attribute = "security.selinux"

// Limits of a policy.
const (
	maxFile  = 64 << 20 // bytes
	maxLine  = 64 << 10 // bytes
	maxSpecs = 1 << 20
)

// types are the file types by the codes that a specification may have.
var types = map[string]uint32{
	"": 0, "--": fstree.TypeRegular, "-d": fstree.TypeDir, "-c": fstree.TypeChar, "-b": fstree.TypeBlock,
	"-p": fstree.TypeFifo, "-l": fstree.TypeSymlink, "-s": fstree.TypeSocket,
}

// spec is a line of file_contexts.
type spec struct {
	label    string // "" for <<none>>
	fileType uint32 // 0: any
	where    string // file and line, for errors
	expr     string // "" if prefix and rest say all
	prefix   string // text that every matching path begins with
	suffix   string // text that it ends with, if rest is restExpr
	rest     rest

	once    sync.Once
	re      *regexp.Regexp
	re2     *regexp2.Regexp // for what RE2 cannot do: look-aheads
	compile error
}

// rest is what may follow the prefix.
type rest int

const (
	restExpr      rest = iota // what the expression says
	restNothing               // "/a/b"
	restBelow                 // "/a/b(/.*)?"
	restAnything              // "/a/b.*"
	restSomething             // "/a/b.+"
)

// Policy is the file labels of a policy.
type Policy struct {
	specs   []spec
	byStart map[string][]int // prefix -> specs, the last first
	lengths []int            // of prefixes
	subs    map[string]string
}

// Load reads the policy that /etc/selinux/config in the tree names. It returns nil if there is none. Errors name the file and
// the line.
func Load(t *fstree.Tree, open fstree.Open) (*Policy, error) {
	config, err := readFile(t, open, "/etc/selinux/config")
	if config == nil || err != nil {
		return nil, err
	}
	name := ""
	for line := range strings.Lines(string(config)) {
		key, value, ok := strings.Cut(line, "=")
		if ok && strings.EqualFold(strings.TrimSpace(key), "SELINUXTYPE") {
			name = strings.TrimSpace(value)
			break
		}
	}
	if name == "" {
		return nil, nil
	}
	if err := fstree.CheckName(name); err != nil {
		return nil, fmt.Errorf("/etc/selinux/config: SELINUXTYPE: %w", err)
	}
	p := &Policy{byStart: map[string][]int{}, subs: map[string]string{}}
	dir := "/etc/selinux/" + name + "/contexts/files/file_contexts"
	for _, suffix := range []string{"", ".local", ".homedirs", ".subs", ".subs_dist"} {
		text, err := readFile(t, open, dir+suffix)
		if err != nil {
			return nil, err
		}
		if text == nil {
			if suffix == "" {
				return nil, fmt.Errorf("%s: missing, but /etc/selinux/config names this policy", dir)
			}
			continue
		}
		parse := p.parseSpec
		if strings.HasPrefix(suffix, ".subs") {
			parse = p.parseSub
		}
		if err := eachLine(dir+suffix, text, parse); err != nil {
			return nil, err
		}
	}
	p.index()
	return p, nil
}

// readFile returns the content of a regular file of the tree, nil if there is none.
func readFile(t *fstree.Tree, open fstree.Open, name string) ([]byte, error) {
	inode := t.Lookup(name)
	if inode == nil || inode.Type() != fstree.TypeRegular {
		return nil, nil
	}
	if inode.Size() > maxFile {
		return nil, fmt.Errorf("%s: %d bytes, at most %d are read", name, inode.Size(), maxFile)
	}
	if inline, ok := inode.Content.(fstree.Inline); ok {
		return append([]byte{}, inline...), nil
	}
	f, err := open(name, inode)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return append([]byte{}, b...), nil
}

// eachLine calls parse with the fields of each line that is neither empty nor a comment.
func eachLine(name string, text []byte, parse func(where string, fields []string) error) error {
	lines := bufio.NewScanner(strings.NewReader(string(text)))
	lines.Buffer(nil, maxLine)
	number := 1
	for ; lines.Scan(); number++ {
		fields := strings.Fields(lines.Text())
		if len(fields) == 0 || strings.HasPrefix(fields[0], "#") {
			continue
		}
		where := fmt.Sprintf("%s: line %d", name, number)
		if err := parse(where, fields); err != nil {
			return fmt.Errorf("%s: %w", where, err)
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("%s: line %d: %w", name, number, err)
	}
	return nil
}

func (p *Policy) parseSub(_ string, fields []string) error {
	if len(fields) != 2 {
		return fmt.Errorf("%d fields: want a directory and the one that it is labelled like", len(fields))
	}
	p.subs[fields[0]] = fields[1]
	return nil
}

func (p *Policy) parseSpec(where string, fields []string) error {
	if len(fields) == 2 {
		fields = []string{fields[0], "", fields[1]}
	}
	if len(fields) != 3 {
		return fmt.Errorf("%d fields: want an expression, perhaps a file type, and a label", len(fields))
	}
	fileType, ok := types[fields[1]]
	if !ok || fields[1] == "" && len(fields[0]) == 0 {
		return fmt.Errorf("file type %q: want one of -- -d -c -b -p -l -s", fields[1])
	}
	if len(p.specs) == maxSpecs {
		return fmt.Errorf("more than %d specifications", maxSpecs)
	}
	label := fields[2]
	if label == "<<none>>" {
		label = ""
	}
	p.specs = append(p.specs, spec{label: label, fileType: fileType, where: where, expr: fields[0]})
	return nil
}

func (p *Policy) index() {
	for k := len(p.specs) - 1; k >= 0; k-- {
		s := &p.specs[k]
		s.prefix, s.rest = analyze(s.expr)
		if s.rest == restExpr {
			s.suffix = literalEnd(s.expr)
		}
		p.byStart[s.prefix] = append(p.byStart[s.prefix], k)
	}
	seen := map[int]bool{}
	for prefix := range p.byStart {
		if !seen[len(prefix)] {
			seen[len(prefix)] = true
			p.lengths = append(p.lengths, len(prefix))
		}
	}
	slices.Sort(p.lengths)
}

const (
	special     = `\.+*?^$()[]{}|`
	quantifiers = "?*{+"
)

// literal reads a character that stands for itself at position k, with its backslash if it has one. It returns the position
// after it, or k if there is none.
func literal(expr string, k int) (c byte, next int) {
	switch {
	case expr[k] == '\\':
		if k+1 < len(expr) && strings.IndexByte(special+`-/ @:=,;~#&%!"'<>`, expr[k+1]) >= 0 {
			return expr[k+1], k + 2
		}
		return 0, k
	case strings.IndexByte(special, expr[k]) >= 0:
		return 0, k
	}
	return expr[k], k + 1
}

// analyze finds the plain text that an expression begins with, and whether what follows it is simple.
func analyze(expr string) (prefix string, r rest) {
	// An alternative outside of parentheses could begin with anything.
	if alternatives(expr) {
		return "", restExpr
	}
	var text []byte
	k := 0
	for k < len(expr) {
		c, next := literal(expr, k)
		// A quantifier takes this character back.
		if next == k || next < len(expr) && strings.IndexByte(quantifiers, expr[next]) >= 0 {
			break
		}
		text = append(text, c)
		k = next
	}
	switch expr[k:] {
	case "":
		return string(text), restNothing
	case "(/.*)?":
		return string(text), restBelow
	case ".*":
		return string(text), restAnything
	case ".+":
		return string(text), restSomething
	}
	return string(text), restExpr
}

// literalEnd finds the plain text that an expression ends with.
func literalEnd(expr string) string {
	if alternatives(expr) || strings.Contains(expr, `\Q`) {
		return ""
	}
	var text []byte
	class := false
	for k := 0; k < len(expr); {
		c, next := literal(expr, k)
		switch {
		case class:
			if expr[k] == '\\' {
				k++
			}
			class = k >= len(expr) || expr[k] != ']'
			next, text = k+1, text[:0]
		case next == k:
			class = expr[k] == '['
			if expr[k] == '{' {
				// The numbers of a quantifier are not text.
				if end := strings.IndexByte(expr[k:], '}'); end > 0 {
					k += end
				}
			}
			if expr[k] == '\\' {
				k++
			}
			next, text = k+1, text[:0]
		default:
			text = append(text, c)
		}
		k = next
	}
	return string(text)
}

func alternatives(expr string) bool {
	depth, class := 0, false
	for k := 0; k < len(expr); k++ {
		switch c := expr[k]; {
		case c == '\\':
			k++
		case class:
			class = c != ']'
		case c == '[':
			class = true
		case c == '(':
			depth++
		case c == ')':
			depth--
		case c == '|' && depth <= 0:
			return true
		}
	}
	return false
}

// matches reports whether a path that begins with the prefix matches.
func (s *spec) matches(path string) (bool, error) {
	after := path[len(s.prefix):]
	switch s.rest {
	case restNothing:
		return after == "", nil
	case restBelow:
		return after == "" || after[0] == '/' && !strings.Contains(after, "\n"), nil
	case restAnything:
		return !strings.Contains(after, "\n"), nil
	case restSomething:
		return after != "" && !strings.Contains(after, "\n"), nil
	}
	if !strings.HasSuffix(path, s.suffix) {
		return false, nil
	}
	s.once.Do(func() {
		whole := "^(?:" + s.expr + ")$"
		var err error
		if s.re, err = regexp.Compile(whole); err == nil {
			return
		}
		if s.re2, err = regexp2.Compile(`\A(?:`+s.expr+`)\z`, regexp2.None); err != nil {
			s.compile = fmt.Errorf("%s: expression %q: %w", s.where, s.expr, err)
			return
		}
		// Back-tracking can take for ever.
		s.re2.MatchTimeout = 5 * time.Second
	})
	switch {
	case s.compile != nil:
		return false, s.compile
	case s.re != nil:
		return s.re.MatchString(path), nil
	}
	ok, err := s.re2.MatchString(path)
	if err != nil {
		return false, fmt.Errorf("%s: expression %q: %w", s.where, s.expr, err)
	}
	return ok, nil
}

// Label returns the label of a file by its absolute path and the type bits of its mode, "" if it has none. Directories that
// are labelled like others are not looked at, see [Policy.Apply].
func (p *Policy) Label(path string, fileType uint32) (string, error) {
	var room [64]int
	candidates := room[:0]
	for _, n := range p.lengths {
		if n > len(path) {
			break
		}
		candidates = append(candidates, p.byStart[path[:n]]...)
	}
	slices.SortFunc(candidates, func(a, b int) int { return b - a })
	for _, k := range candidates {
		s := &p.specs[k]
		if s.fileType != 0 && s.fileType != fileType {
			continue
		}
		ok, err := s.matches(path)
		if err != nil {
			return "", err
		}
		if ok {
			return s.label, nil
		}
	}
	return "", nil
}

// Strip removes all labels.
func Strip(t *fstree.Tree) {
	t.Walk(func(_ string, i *fstree.Inode) error {
		i.RemoveXattr(Attribute)
		return nil
	})
}

// Apply labels the whole tree. A file whose names would get different labels is split: each of the later names gets a
// file of its own, as it would be if the tree were unpacked and labelled name by name. Links are to be counted again.
func (p *Policy) Apply(t *fstree.Tree) error {
	a := applier{p, map[*fstree.Inode]string{}}
	if t.Root.Dir() == nil {
		return errors.New("the root is not a directory")
	}
	if err := a.set(t.Root, "/"); err != nil {
		return err
	}
	return a.directory(t.Root.Dir(), "/")
}

type applier struct {
	p       *Policy
	labeled map[*fstree.Inode]string // files, by the label that their first name gave them
}

func (a applier) set(i *fstree.Inode, as string) error {
	label, err := a.p.Label(as, i.Type())
	if err != nil {
		return err
	}
	put(i, label)
	return nil
}

func put(i *fstree.Inode, label string) {
	if label == "" {
		i.RemoveXattr(Attribute)
		return
	}
	i.SetXattr(Attribute, []byte(label))
}

// directory labels what is in a directory that is labelled like the path as.
func (a applier) directory(d *fstree.Directory, as string) error {
	for k := range d.Entries {
		e := &d.Entries[k]
		name := path.Join(as, e.Name)
		if like, ok := a.p.subs[name]; ok {
			name = like
		}
		if sub := e.Inode.Dir(); sub != nil {
			if err := a.set(e.Inode, name); err != nil {
				return err
			}
			if err := a.directory(sub, name); err != nil {
				return err
			}
			continue
		}
		label, err := a.p.Label(name, e.Inode.Type())
		if err != nil {
			return err
		}
		if first, ok := a.labeled[e.Inode]; ok {
			if first == label {
				continue
			}
			split := *e.Inode
			split.Xattrs = slices.Clone(split.Xattrs)
			e.Inode = &split
		} else if e.Inode.Nlink != 1 {
			a.labeled[e.Inode] = label
		}
		put(e.Inode, label)
	}
	return nil
}
