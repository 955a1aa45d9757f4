// Command composefs-boot makes composefs images of operating systems, keeps them in repositories and installs them.
//
// Each file of this package has a group of commands: it reads the flags, calls a package that does the work, and prints
// what came of it, as text or as JSON. There is no global state; newRoot makes the whole tree of commands for one run.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// version is set by the build.
var version = "development"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args, os.Stdin, os.Stdout, os.Stderr))
}

// run executes a command line and returns the exit code: 0, or 1 for errors of any kind, or 2 for a wrong command line.
func run(ctx context.Context, args []string, in io.Reader, out, errOut io.Writer) int {
	name := filepath.Base(args[0])
	args = args[1:]
	if slices.Contains(dropIns, name) {
		args = append([]string{name}, args...)
	} else if name != "cfsctl" {
		name = "composefs-boot"
	}
	root := newRoot(name, in, out, errOut)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintf(errOut, "%s: %s\n", name, strings.ReplaceAll(err.Error(), "\n", "; "))
	if _, wrong := err.(usageError); wrong {
		return 2
	}
	return 1
}

// usageError is an error of the command line itself.
type usageError struct{ error }
