package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"sync/atomic"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// convertResult is what convert prints as JSON.
type convertResult struct {
	Repository string           `json:"repository"`
	Algorithm  string           `json:"algorithm"`
	Format     string           `json:"format"`
	Images     []convertedImage `json:"images"`
	Streams    int              `json:"streams"`
	Objects    int              `json:"objects"`
	New        int              `json:"objects_new"`
}

type convertedImage struct {
	From string   `json:"from"`
	To   string   `json:"to"`
	Refs []string `json:"refs"`
	Karg string   `json:"karg"`
}

func (a *app) convertCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "convert [DESTINATION]",
		Short: "Write the images again, in another format or with another algorithm",
		Long: `Write the images and streams of a repository, and what they need, into the repository DESTINATION, which is made if need be.
There --algorithm may be another one: every content is verified and named again. Interrupted, it goes on where it was.

Without DESTINATION the images are written again in the same repository, in the format of --erofs-version; their refs lead to
the new ones, and gc removes the old ones.

An image in another format or with other digests has another digest itself: boot entries that name the old one need the
argument that is printed. What carries digests in its content, such as a sealed OCI configuration, stays as it is.`,
		Example: `  composefs-boot --repo old convert --algorithm sha512 new
  composefs-boot --repo r --erofs-version 1 convert`,
		Args: between(0, 1),
	}
	algorithm := c.Flags().String("algorithm", "", "digest `ALGORITHM` of a new repository: sha256 or sha512 [default: the same]")
	c.RunE = func(c *cobra.Command, args []string) error {
		if len(args) == 0 && *algorithm != "" {
			return usageError{errors.New("--algorithm needs a DESTINATION: a repository has one algorithm")}
		}
		return a.withRepo(func(r *repo.Repo) error {
			format := erofs.V1
			var err error
			if a.format != "" {
				if format, err = erofs.ParseFormat(a.format); err != nil {
					return usageError{err}
				}
			}
			to := r
			if len(args) == 1 {
				if to, err = openDestination(r, args[0], *algorithm, format); err != nil {
					return err
				}
				defer to.Close()
			}
			var objects atomic.Int64
			p := a.startProgress(func() progressEvent { return progressEvent{What: "converting", Files: objects.Load()} })
			done, err := r.ConvertTo(c.Context(), to, repo.ConvertOptions{Format: format, Objects: &objects, Lock: a.lock()})
			p.end()
			if err != nil {
				return err
			}
			return a.printConversion(to, format, done)
		})
	}
	return c
}

// openDestination opens the repository to which another one is converted. One that is made requires fs-verity if that one does.
func openDestination(from *repo.Repo, path, algorithm string, format erofs.Format) (*repo.Repo, error) {
	config := repo.Config{Algorithm: from.Algorithm(), Format: format, Insecure: !from.RequiresVerity()}
	var err error
	if algorithm != "" {
		if config.Algorithm, err = fsverity.ParseAlgorithm(algorithm); err != nil {
			return nil, usageError{err}
		}
	}
	one, err := filepath.EvalSymlinks(from.Path())
	if err != nil {
		return nil, err
	}
	if two, err := filepath.EvalSymlinks(path); err == nil && one == two {
		return nil, usageError{fmt.Errorf("%s is the repository itself: leave it out", path)}
	}
	if _, err := repo.Init(path, config); err != nil {
		return nil, err
	}
	return repo.Open(path, repo.Options{})
}

func (a *app) printConversion(to *repo.Repo, format erofs.Format, done repo.Conversion) error {
	result := convertResult{to.Path(), to.Algorithm().Name(), format.String(), []convertedImage{}, len(done.Streams), done.Objects,
		done.Stats.Objects}
	for _, i := range done.Images {
		result.Images = append(result.Images, convertedImage{i.From.String(), i.To.String(), append([]string{}, i.Refs...), argument(i.To, format)})
	}
	if a.json {
		return printJSON(a.out, result)
	}
	for _, i := range result.Images {
		fmt.Fprintf(a.out, "%s -> %s", i.From, i.To)
		for _, ref := range i.Refs {
			fmt.Fprint(a.out, " refs/", ref)
		}
		fmt.Fprintf(a.out, "\n  %s\n", i.Karg)
	}
	fmt.Fprintf(a.out, "%s: %d images, %d streams, %d objects, %d of them new\n", to.Path(), len(result.Images), result.Streams,
		result.Objects, result.New)
	return nil
}
