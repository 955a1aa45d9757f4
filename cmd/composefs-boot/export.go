package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/repo/extract"
)

// exportResult is what export prints as JSON.
type exportResult struct {
	Image   string `json:"image"`
	Output  string `json:"output"`
	Entries int    `json:"entries"`
	Bytes   uint64 `json:"bytes"`   // of contents
	Sockets int    `json:"sockets"` // left out
}

func (a *app) exportCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "export --tar IMAGE",
		Short: "Write an image as a tar archive",
		Long: `Write an image as a tar archive to standard output or a file. IMAGE is an image file, or else a ref or digest of the
repository. The same image gives the same bytes, whoever exports it.

The archive is of PAX format, in the order of names, with nanoseconds, extended attributes (SCHILY.xattr) and hard links;
whiteouts are character devices of number 0. Every content is verified before it is written. tar has no sockets: they are
left out, and counted in a last line.`,
		Example: `  composefs-boot --repo r export --tar my-os | tar -x --xattrs --xattrs-include='*' -C ./tree
  composefs-boot export --tar --objects r/objects -o my-os.tar my-os.erofs`,
		Args: exactly(1),
	}
	isTar := c.Flags().Bool("tar", false, "the format, the only one so far")
	output := c.Flags().StringP("output", "o", "", "write to this `FILE`")
	objects := c.Flags().String("objects", "", "the `DIRECTORY` of objects [default: that of the repository]")
	c.RunE = func(c *cobra.Command, args []string) error {
		switch {
		case !*isTar:
			return usageError{errors.New("no format: give --tar")}
		case *output == "" && a.json:
			return usageError{errors.New("the archive goes to standard output, where --json would print: name a file with -o")}
		case *output == "" && isTerminal(a.out):
			return usageError{errors.New("the archive would go to the terminal: redirect standard output, or name a file with -o")}
		}
		i, err := a.openImage(args[0], *objects)
		if err != nil {
			return err
		}
		defer i.close()
		return a.export(c.Context(), i, *output)
	}
	return c
}

func (a *app) export(ctx context.Context, i *image, output string) error {
	tree, err := i.tree()
	if err != nil {
		return err
	}
	out := a.out
	var file *os.File
	if output != "" {
		if file, err = os.Create(output); err != nil {
			return err
		}
		defer file.Close()
		out = file
	}
	done, err := extract.Tar(ctx, out, tree, &i.objects)
	if err != nil {
		err = fmt.Errorf("%s: %w", i.name, err)
	}
	if err == nil && file != nil {
		err = file.Close()
	}
	if err != nil {
		// Half an archive is none. What is no file, as a pipe or /dev/stdout, stays.
		if info, statErr := os.Lstat(output); file != nil && statErr == nil && info.Mode().IsRegular() {
			os.Remove(output)
		}
		return err
	}
	if done.Sockets > 0 {
		fmt.Fprintf(a.err, "left out, since tar has no type for them: %d sockets\n", done.Sockets)
	}
	if a.json {
		return printJSON(a.out, exportResult{i.name, output, done.Entries, done.Bytes, done.Sockets})
	}
	return nil
}
