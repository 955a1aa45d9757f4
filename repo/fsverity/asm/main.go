// Command asm writes the assembly of repo/fsverity: SHA-256 and SHA-512 of many 4096-byte blocks at once, one in each lane of
// a vector register. Run it with go generate.
//
// A compression of SHA-2 has no parallelism within, but the blocks of a Merkle tree are independent. So lane k of every
// register belongs to block k: the words of the message are transposed as they are loaded, and then each step of the
// algorithm is one instruction for all lanes. FIPS 180-4 defines the algorithm and its names.
package main

import (
	"math"
	"math/big"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

const message = 4096 // bytes of every block

// hash is SHA-256 or SHA-512.
type hash struct {
	name   string
	word   int // bytes
	rounds int
	// Rotations of the functions Σ0, Σ1, σ0, σ1; the last number of σ is a shift.
	sum0, sum1, sigma0, sigma1 [3]uint64
}

var (
	sha256 = hash{"256", 4, 64, [3]uint64{2, 13, 22}, [3]uint64{6, 11, 25}, [3]uint64{7, 18, 3}, [3]uint64{17, 19, 10}}
	sha512 = hash{"512", 8, 80, [3]uint64{28, 34, 39}, [3]uint64{14, 18, 41}, [3]uint64{1, 8, 7}, [3]uint64{19, 61, 6}}
)

func (h hash) chunk() int { return 16 * h.word } // bytes that a compression takes

// constants returns K: the first bits of the fractional parts of the cube roots of the first primes.
func (h hash) constants() []uint64 {
	var list []uint64
	for p := int64(2); len(list) < h.rounds; p++ {
		if !big.NewInt(p).ProbablyPrime(0) {
			continue
		}
		// The cube root of p << 3*bits is the root of p << bits, an integer.
		bits := uint(8 * h.word)
		x := new(big.Int).Lsh(big.NewInt(p), 3*bits)
		low, high := new(big.Int), new(big.Int).Lsh(big.NewInt(int64(math.Cbrt(float64(p)))+1), bits)
		for one := big.NewInt(1); new(big.Int).Sub(high, low).Cmp(one) > 0; {
			middle := new(big.Int).Rsh(new(big.Int).Add(low, high), 1)
			if cube := new(big.Int).Exp(middle, big.NewInt(3), nil); cube.Cmp(x) <= 0 {
				low = middle
			} else {
				high = middle
			}
		}
		mask := new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), bits), big.NewInt(1))
		list = append(list, new(big.Int).And(low, mask).Uint64())
	}
	return list
}

// padding returns K + W of the compression that ends a message of 4096 bytes: it is the same for all.
func (h hash) padding() []uint64 {
	bits := uint64(8 * h.word)
	mask := ^uint64(0) >> (64 - bits)
	rotate := func(x, n uint64) uint64 { return (x>>n | x<<(bits-n)) & mask }
	sigma := func(x uint64, r [3]uint64) uint64 { return rotate(x, r[0]) ^ rotate(x, r[1]) ^ x>>r[2] }
	w := make([]uint64, h.rounds)
	w[0], w[15] = 1<<(bits-1), 8*message
	for k := 16; k < h.rounds; k++ {
		w[k] = (sigma(w[k-2], h.sigma1) + w[k-7] + sigma(w[k-15], h.sigma0) + w[k-16]) & mask
	}
	for k, c := range h.constants() {
		w[k] = (w[k] + c) & mask
	}
	return w
}

func (h hash) table(name string, words []uint64) Mem {
	m := GLOBL(name, 8|16) // RODATA, NOPTR
	for k, w := range words {
		if h.word == 4 {
			DATA(4*k, U32(w))
		} else {
			DATA(8*k, U64(w))
		}
	}
	return m
}

// set is a set of vector instructions.
type set interface {
	width() int // bytes of a register
	// transpose loads the message words of one compression: word j of all lanes together.
	transpose(h hash, in, offset reg.GPPhysical)
	// schedule makes the next word in place of word j.
	schedule(h hash, j int)
	// round does a step of the compression with the state s and the constant at k, plus word j if it is not negative.
	round(h hash, s []reg.VecPhysical, k Mem, j int)
	begin(s []reg.VecPhysical) // before the first of a series of rounds
	state() []reg.VecPhysical
	move(from, to Op)
	add(h hash, a, b, to Op)
}

func kernel(h hash, v set, name string, k, padding Mem) {
	lanes := v.width() / h.word
	TEXT(name, NOSPLIT, "func(state *"+map[int]string{4: "uint32", 8: "uint64"}[h.word]+", in **[4096]byte)")
	Pragma("noescape")
	Doc(name+" hashes "+itoa(lanes)+" messages of 4096 bytes. state holds word by word the value of every lane, at first the",
		"initial one; in is an array of pointers to the messages.")
	state := Load(Param("state"), reg.RAX).(reg.GPPhysical)
	in := Load(Param("in"), reg.RBX).(reg.GPPhysical)
	offset, constants, count := reg.RCX, reg.RDX, reg.RSI
	table := reg.RDI
	word := func(k int) Mem { return Mem{Base: state, Disp: k * v.width()} }
	s := v.state()
	if a, ok := v.(*avx2); ok {
		a.words = AllocLocal(16 * v.width())
	}
	LEAQ(k, table)
	XORQ(offset, offset)

	Label("message")
	v.transpose(h, in, offset)
	for k := range s {
		v.move(word(k), s[k])
	}
	v.begin(s)
	at := func(base reg.Register, k int) Mem { return Mem{Base: base, Disp: k * h.word} }
	for j := range 16 {
		v.round(h, rotated(s, j), at(table, j), j)
	}
	LEAQ(Mem{Base: table, Disp: 16 * h.word}, constants)
	MOVQ(U32(h.rounds/16-1), count)
	Label("rounds")
	for j := range 16 {
		v.schedule(h, j)
		v.round(h, rotated(s, j), at(constants, j), j)
	}
	ADDQ(U32(16*h.word), constants)
	DECQ(count)
	JNZ(LabelRef("rounds"))
	for k := range s {
		v.add(h, word(k), s[k], s[k])
		v.move(s[k], word(k))
	}
	ADDQ(U32(h.chunk()), offset)
	CMPQ(offset, U32(message))
	JLT(LabelRef("message"))

	LEAQ(padding, constants)
	MOVQ(U32(h.rounds/8), count)
	v.begin(s)
	Label("padding")
	for j := range 8 {
		v.round(h, rotated(s, j), at(constants, j), -1)
	}
	ADDQ(U32(8*h.word), constants)
	DECQ(count)
	JNZ(LabelRef("padding"))
	for k := range s {
		v.add(h, word(k), s[k], s[k])
		v.move(s[k], word(k))
	}
	VZEROUPPER()
	RET()
}

// rotated returns the registers of a to h in round j: instead of moving values, the names move.
func rotated(s []reg.VecPhysical, j int) []reg.VecPhysical {
	out := make([]reg.VecPhysical, 8)
	for k := range out {
		out[k] = s[(k-j%8+8)%8]
	}
	return out
}

func itoa(n int) string {
	if n >= 10 {
		return string(rune('0'+n/10)) + string(rune('0'+n%10))
	}
	return string(rune('0' + n))
}

// swap makes words of big-endian bytes.
func (h hash) swap() Mem {
	m := GLOBL("swap"+h.name, 8|16)
	for k := range 64 {
		from := k%16/h.word*h.word + h.word - 1 - k%h.word
		DATA(k, U8(from))
	}
	return m
}

// byteRotation rotates words of 64 bits to the right by 8.
func byteRotation() Mem {
	m := GLOBL("rotation", 8|16)
	for k := range 32 {
		DATA(k, U8(k%16/8*8+(k+1)%8))
	}
	return m
}

func main() {
	ConstraintExpr("amd64")
	rotation := byteRotation()
	for _, h := range []*hash{&sha256, &sha512} {
		k, padding, swap := h.table("k"+h.name, h.constants()), h.table("padding"+h.name, h.padding()), h.swap()
		kernel(*h, &avx512{swap: swap}, "sha"+h.name+"AVX512", k, padding)
		kernel(*h, &avx2{swap: swap, byteRotation: rotation}, "sha"+h.name+"AVX2", k, padding)
	}
	TEXT("cpuid", NOSPLIT, "func(leaf uint32) (ebx, ecx uint32)")
	Doc("cpuid returns what the processor says about itself, of sub-leaf 0.")
	Load(Param("leaf"), reg.EAX)
	XORL(reg.ECX, reg.ECX)
	CPUID()
	Store(reg.EBX, Return("ebx"))
	Store(reg.ECX, Return("ecx"))
	RET()
	TEXT("xgetbv", NOSPLIT, "func() uint32")
	Doc("xgetbv returns the registers that the operating system saves.")
	XORL(reg.ECX, reg.ECX)
	XGETBV()
	Store(reg.EAX, ReturnIndex(0))
	RET()
	Generate()
}
