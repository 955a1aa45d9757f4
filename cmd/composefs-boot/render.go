package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// printJSON prints a declared structure.
func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// printTable prints rows under a header, in the frame that cfsctl draws.
func printTable(w io.Writer, header []string, rows [][]string) {
	width := make([]int, len(header))
	for _, row := range append([][]string{header}, rows...) {
		for k, cell := range row {
			width[k] = max(width[k], utf8.RuneCountInString(cell))
		}
	}
	rule := func(left, fill, middle, right string) {
		parts := make([]string, len(width))
		for k, n := range width {
			parts[k] = strings.Repeat(fill, n+2)
		}
		fmt.Fprintln(w, left+strings.Join(parts, middle)+right)
	}
	line := func(row []string) {
		parts := make([]string, len(row))
		for k, cell := range row {
			parts[k] = " " + cell + strings.Repeat(" ", width[k]-utf8.RuneCountInString(cell)) + " "
		}
		fmt.Fprintln(w, "│"+strings.Join(parts, "┆")+"│")
	}
	rule("┌", "─", "┬", "┐")
	line(header)
	rule("╞", "═", "╪", "╡")
	for k, row := range rows {
		if k > 0 {
			rule("├", "╌", "┼", "┤")
		}
		line(row)
	}
	rule("└", "─", "┴", "┘")
}

// size prints a number of bytes for people.
func size(n int64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, k := float64(n)/1024, 0
	for f >= 1024 && k < len(units)-1 {
		f, k = f/1024, k+1
	}
	return fmt.Sprintf("%.1f %ciB", f, units[k])
}

// progress tells now and then how far a long work has come: in place on a terminal, in lines otherwise. With --json each is
// an object on a line of its own, on standard error.
type progress struct {
	stop chan bool
	done sync.WaitGroup
}

// progressEvent is a line of progress as JSON.
type progressEvent struct {
	Type  string `json:"type"` // "progress"
	What  string `json:"what"`
	Files int64  `json:"files,omitempty"`
	Bytes int64  `json:"bytes,omitempty"`
	Total int64  `json:"total,omitempty"` // of bytes, if known
}

// startProgress calls state until the progress is ended.
func (a *app) startProgress(state func() progressEvent) *progress {
	p := &progress{stop: make(chan bool)}
	if a.quiet {
		return p
	}
	terminal := isTerminal(a.err)
	interval := 5 * time.Second
	if terminal && !a.json {
		interval = 100 * time.Millisecond
	}
	p.done.Go(func() {
		tick := time.NewTicker(interval)
		defer tick.Stop()
		printed := false
		for {
			select {
			case <-p.stop:
				if printed && terminal && !a.json {
					fmt.Fprint(a.err, "\r\x1b[K")
				}
				return
			case <-tick.C:
			}
			e := state()
			e.Type = "progress"
			switch {
			case a.json:
				if b, err := json.Marshal(e); err == nil {
					fmt.Fprintf(a.err, "%s\n", b)
				}
			case terminal:
				fmt.Fprintf(a.err, "\r\x1b[K%s", e)
			default:
				fmt.Fprintln(a.err, e)
			}
			printed = true
		}
	})
	return p
}

func (e progressEvent) String() string {
	text := e.What
	if e.Total > 0 {
		const cells = 24
		filled := int(min(e.Bytes, e.Total) * cells / e.Total)
		text += " [" + strings.Repeat("=", filled) + strings.Repeat(" ", cells-filled) + "]"
	}
	if e.Files > 0 {
		text += fmt.Sprintf(" %d files", e.Files)
	}
	if e.Bytes > 0 {
		text += " " + size(e.Bytes)
	}
	if e.Total > 0 {
		text += " of " + size(e.Total)
	}
	return text
}

func (p *progress) end() {
	close(p.stop)
	p.done.Wait()
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
