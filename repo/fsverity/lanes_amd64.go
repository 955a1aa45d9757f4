package fsverity

import "os"

//go:generate go -C asm run . -out ../blocks_amd64.s -stubs ../blocks_amd64.go -pkg fsverity

// engines are the ways to hash blocks by algorithm. The standard library has the instructions for one block at a time: SHA-NI
// for SHA-256, AVX2 for SHA-512.
var engines = choose(features())

type cpuFeatures struct{ avx512, avx2, sha bool }

// features looks at the processor. COMPOSEFS_FSVERITY=avx2 or generic makes it a lesser one, for tests.
func features() cpuFeatures {
	f := detect()
	switch os.Getenv("COMPOSEFS_FSVERITY") {
	case "avx2":
		f.avx512, f.sha = false, false
	case "generic":
		f = cpuFeatures{}
	}
	return f
}

// detect asks the processor, as the Intel manual says, volume 1, 14.3 and 15.2: an instruction set counts if the operating
// system saves its registers.
func detect() (f cpuFeatures) {
	const (
		osxsave, avx           = 1 << 27, 1 << 28 // leaf 1, ECX
		avx2, avx512f, sha, bw = 1 << 5, 1 << 16, 1 << 29, 1 << 30
		savesAVX, savesAVX512  = 0x06, 0xe6
	)
	if _, ecx := cpuid(1); ecx&(osxsave|avx) != osxsave|avx {
		return f
	}
	saved := xgetbv()
	ebx, _ := cpuid(7)
	f.avx2 = ebx&avx2 != 0 && saved&savesAVX == savesAVX
	f.avx512 = f.avx2 && ebx&(avx512f|bw) == avx512f|bw && saved&savesAVX512 == savesAVX512
	f.sha = f.avx2 && ebx&sha != 0
	return f
}

// choose says what pays on a processor, as measured: with AVX-512 a register of lanes takes as long as two to six blocks one
// after the other, with AVX2 three. SHA-NI alone is faster than AVX2.
func choose(f cpuFeatures) (e [3]lanes) {
	switch {
	case f.avx512 && f.sha:
		e[SHA256] = lanes{name: "avx512", width: 16, from: 6, hash32: sha256AVX512}
	case f.avx512:
		e[SHA256] = lanes{name: "avx512", width: 16, from: 3, hash32: sha256AVX512}
	case f.avx2 && !f.sha:
		e[SHA256] = lanes{name: "avx2", width: 8, from: 4, hash32: sha256AVX2}
	}
	switch {
	case f.avx512:
		e[SHA512] = lanes{name: "avx512", width: 8, from: 3, hash64: sha512AVX512}
	case f.avx2:
		e[SHA512] = lanes{name: "avx2", width: 4, from: 4, hash64: sha512AVX2}
	}
	return e
}
