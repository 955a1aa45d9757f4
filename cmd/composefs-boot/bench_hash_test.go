//go:build bench

package main

import "testing"

// hash compares the ways to hash a gigabyte of blocks of 4 KiB on one processor. Ours makes a tree over them, too, which is
// one block in 128 or 64.
func (b *bench) hash(t *testing.T) {
	way := func(way, algorithm string, env ...string) invocation {
		return invocation{args: []string{b.packages, "hash", way, algorithm, "1024"}, env: append(env, "GOMAXPROCS=1")}
	}
	ours := func(algorithm string, env ...string) func(int) sample {
		return func(int) sample { return way("fsverity", algorithm, env...).measure(t) }
	}
	plain := func(target float64) rival {
		return always(t, "crypto, no SHA-NI", way("standard", "sha256", "GODEBUG=cpu.sha=off"), target)
	}
	shaNI := always(t, "crypto, SHA-NI", way("standard", "sha256"), 1)
	standard := func(target float64) rival { return always(t, "crypto", way("standard", "sha512"), target) }

	const runs = 3
	if b.flags["avx512f"] {
		peers := []rival{plain(0.25)}
		if b.flags["sha_ni"] {
			peers = append(peers, shaNI)
		}
		peers = append(peers, always(t, "sha256-simd", way("simd", "sha256")))
		b.compare("1 GiB of blocks, sha256, AVX-512", 0, runs, ours("sha256"), peers...)
		b.compare("1 GiB of blocks, sha512, AVX-512", 0, runs, ours("sha512"), standard(0.33))
	} else {
		b.printf("hashing with AVX-512: not on this processor\n")
	}
	if b.flags["avx2"] {
		b.compare("1 GiB of blocks, sha256, AVX2", 0, runs, ours("sha256", "COMPOSEFS_FSVERITY=avx2"), plain(0.5))
		b.compare("1 GiB of blocks, sha512, AVX2", 0, runs, ours("sha512", "COMPOSEFS_FSVERITY=avx2"), standard(0.62))
	} else {
		b.printf("hashing with AVX2: not on this processor\n")
	}
	if b.flags["sha_ni"] {
		b.compare("1 GiB of blocks, sha256, SHA-NI alone", 0, runs, ours("sha256", "COMPOSEFS_FSVERITY=generic"), shaNI)
	} else {
		b.printf("hashing with SHA-NI: not on this processor\n")
	}
}
