//go:build !cgo || exclude_graphdriver_btrfs

package transport

// With cgo, one of the library's drivers needs a header of btrfs-progs: programs that are built so are without this transport, unless
// that driver is left out.
import _ "go.podman.io/image/v5/storage"
