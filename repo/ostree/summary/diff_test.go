package summary_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/composefs-boot/composefs-boot/repo/ostree/summary"
)

// diffed makes one of another, and returns the size of the difference.
func diffed(t testing.TB, old, new []byte) int {
	t.Helper()
	diff, err := summary.MakeDiff(old, new)
	if err != nil {
		t.Fatal(err)
	}
	s := summary.Subsummary{Sum: sha256.Sum256(new)}
	if got, err := s.ApplyDiff(old, diff); err != nil || !bytes.Equal(got, new) {
		t.Fatalf("%q of %q: %v", got, old, err)
	}
	return len(diff)
}

// What differs in a few refs is described in a few bytes.
func TestMakeDiff(t *testing.T) {
	random := rand.New(rand.NewPCG(7, 8))
	var refs []summary.Ref
	commit := func() (sum [32]byte) {
		for i := range sum {
			sum[i] = byte(random.Uint32())
		}
		return sum
	}
	for k := range 2000 {
		refs = append(refs, summary.Ref{Name: fmt.Sprintf("app/org.example.App%d/x86_64/stable", k), Commit: commit(), Timestamp: time.Unix(int64(random.IntN(1<<30)), 0)})
	}
	encode := func() []byte {
		b, err := summary.EncodeSubsummary(refs)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	old := encode()
	for range 5 {
		refs[random.IntN(len(refs))].Commit = commit()
	}
	if n := diffed(t, old, encode()); n > 500 {
		t.Errorf("5 other commits of 2000 take %d bytes", n)
	}
	refs = append(refs[:100], refs[101:]...)
	refs = append(refs, summary.Ref{Name: "runtime/org.example.Platform/x86_64/23", Commit: commit()})
	if n := diffed(t, old, encode()); n > len(old)/10 {
		t.Errorf("of %d bytes, %d are another one's", n, len(old))
	}
	if n := diffed(t, old, old); n > 50 {
		t.Errorf("nothing takes %d bytes", n)
	}
	for range 200 {
		a, b := make([]byte, random.IntN(200)), make([]byte, random.IntN(200))
		for _, s := range [][]byte{a, b} {
			for i := range s {
				s[i] = byte(random.IntN(2)) * byte(random.IntN(2))
			}
		}
		diffed(t, a, b)
	}
}

func FuzzMakeDiff(f *testing.F) {
	f.Add([]byte("0123456789abcdef0123456789abcdef"), []byte("x0123456789abcdef0123456789abcdefy"))
	f.Fuzz(func(t *testing.T, old, new []byte) { diffed(t, old, new) })
}
