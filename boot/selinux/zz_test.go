package selinux_test
import ("testing";"os";"strings";"path/filepath"
"github.com/composefs-boot/composefs-boot/repo/fstree")
func BenchmarkDebian(b *testing.B) {
	fc, _ := os.ReadFile("/tmp/e5/fc"); fch, _ := os.ReadFile("/tmp/e5/fch")
	var paths []string; var kinds []uint32
	filepath.Walk("/tmp/e5/os", func(p string, i os.FileInfo, err error) error {
		paths = append(paths, "/"+strings.TrimPrefix(strings.TrimPrefix(p,"/tmp/e5/os"),"/"))
		k := uint32(fstree.TypeRegular); if i.IsDir() {k=fstree.TypeDir} else if i.Mode()&os.ModeSymlink!=0 {k=fstree.TypeSymlink}
		kinds=append(kinds,k); return nil })
	for b.Loop() {
		p := load(b, map[string]string{"":string(fc), ".homedirs":string(fch)})
		for k := range paths { if _, err := p.Label(paths[k], kinds[k]); err != nil { b.Fatal(err) } }
	}
}
