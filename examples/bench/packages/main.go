// Command packages does one piece of work with a package, ours or another, so that both can be measured as processes that
// have nothing else to do:
//
//	packages hash fsverity|standard|simd sha256|sha512 MIB     hash blocks of 4 KiB, one after the other or many at once
//	packages read erofs|go-erofs IMAGE                         read the metadata of every file of an image
package main

import (
	"crypto/sha256"
	"crypto/sha512"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"

	goerofs "github.com/erofs/go-erofs"
	simd "github.com/minio/sha256-simd"

	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

func main() {
	err := fmt.Errorf("usage: packages hash WAY ALGORITHM MIB | packages read PACKAGE IMAGE")
	switch {
	case len(os.Args) == 5 && os.Args[1] == "hash":
		err = hash(os.Args[2], os.Args[3], os.Args[4])
	case len(os.Args) == 4 && os.Args[1] == "read":
		err = read(os.Args[2], os.Args[3])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// hash hashes a megabyte, which stays in the processor's cache, again and again.
func hash(way, algorithm, times string) error {
	alg, err := fsverity.ParseAlgorithm(algorithm)
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(times)
	if err != nil {
		return err
	}
	data := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{1}).Read(data)
	switch {
	case way == "fsverity":
		d := fsverity.NewDigester(alg)
		for range n {
			d.Reset()
			d.Write(data)
			d.Sum()
		}
	case way == "standard" && alg == fsverity.SHA256:
		for range n {
			for k := 0; k < len(data); k += fsverity.BlockSize {
				sha256.Sum256(data[k:][:fsverity.BlockSize])
			}
		}
	case way == "standard":
		for range n {
			for k := 0; k < len(data); k += fsverity.BlockSize {
				sha512.Sum512(data[k:][:fsverity.BlockSize])
			}
		}
	case way == "simd" && alg == fsverity.SHA256:
		hashSimd(data, n)
	default:
		return fmt.Errorf("%s of %v: no such way", way, alg)
	}
	return nil
}

// hashSimd has one goroutine for each lane, as the server of sha256-simd wants it.
func hashSimd(data []byte, n int) {
	const lanes = 16
	server := simd.NewAvx512Server()
	var all sync.WaitGroup
	for lane := range lanes {
		all.Go(func() {
			h := simd.NewAvx512(server)
			for range n {
				for k := lane * fsverity.BlockSize; k < len(data); k += lanes * fsverity.BlockSize {
					h.Reset()
					h.Write(data[k:][:fsverity.BlockSize])
					h.Sum(nil)
				}
			}
		})
	}
	all.Wait()
}

func read(with, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if with == "erofs" {
		_, _, err := erofs.Read(f, info.Size())
		return err
	}
	image, err := goerofs.Open(f)
	if err != nil {
		return err
	}
	return fs.WalkDir(image, ".", func(_ string, e fs.DirEntry, err error) error {
		if err == nil {
			_, err = e.Info()
		}
		return err
	})
}
