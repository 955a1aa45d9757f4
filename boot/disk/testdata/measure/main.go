// Measure runs in a guest: it reads every file of the repository at its argument and asks the kernel for its digest. For each
// file that is not what its name says it prints a line of WRONG, the path and why; at last RIGHT and how many were right.
package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

func main() {
	repository := os.Args[1]
	right := 0
	filepath.WalkDir(repository, func(file string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			if err = measureFile(repository, file); err == nil {
				right++
			}
		}
		if err != nil {
			fmt.Printf("WRONG %s: %v\n", strings.TrimPrefix(file, repository), err)
		}
		return nil
	})
	fmt.Printf("RIGHT %d\n", right)
}

func measureFile(repository, file string) error {
	f, err := os.Open(file)
	if err != nil {
		return fmt.Errorf("open: %w", errors.Unwrap(err))
	}
	defer f.Close()
	measured, err := fsverity.Measure(f)
	if err != nil {
		return err
	}
	computed, _, err := fsverity.OfReader(measured.Algorithm(), f)
	if err != nil {
		return fmt.Errorf("read: %w", errors.Unwrap(err))
	}
	if computed != measured {
		return fmt.Errorf("measured %v, its content has %v", measured, computed)
	}
	if object, ok := strings.CutPrefix(file, repository+"/objects/"); ok && object != measured.ObjectPath() {
		return fmt.Errorf("measured %v", measured)
	}
	return nil
}
