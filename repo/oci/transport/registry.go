package transport

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"reflect"
	"regexp"
	"strings"

	"github.com/docker/distribution/registry/api/errcode"
	"go.podman.io/image/v5/docker"
	"go.podman.io/image/v5/pkg/blobinfocache/none"
	"go.podman.io/image/v5/types"

	"github.com/composefs-boot/composefs-boot/repo/oci"
)

// registryBlob opens a blob of a registry. The library can ask for a part of one, see blobAt. If the registry does not know that, or
// sends the whole instead, which the library cannot be relied upon to read (v5.41.2: after a broken connection it returns bytes that
// it has not read, or panics), the whole is asked for, as it is for the beginning.
func (i *Image) registryBlob(ctx context.Context, info types.BlobInfo, offset int64) (io.ReadCloser, error) {
	if offset > 0 && !i.noRanges.Load() {
		r, err := blobAt(ctx, i.source, info, offset)
		if r != nil || err != nil && !errors.Is(i.explain(err), oci.ErrPermanent) {
			return r, err
		}
		i.noRanges.Store(true)
	}
	ctx, stop := context.WithCancel(ctx)
	r, _, err := i.source.GetBlob(ctx, info, none.NoCache)
	if err == nil && offset > 0 {
		_, err = io.CopyN(io.Discard, r, offset)
	}
	if err != nil {
		stop()
		if r != nil {
			r.Close()
		}
		return nil, err
	}
	return &body{r, stop}, nil
}

// blobAt opens a blob from an offset on. It returns nil if the registry sends the whole. The library has range requests in the method
// GetBlobAt, whose argument is a slice of a type that other modules cannot name (struct{ Offset, Length uint64 }); therefore it is
// called by reflection.
func blobAt(ctx context.Context, source types.ImageSource, info types.BlobInfo, offset int64) (io.ReadCloser, error) {
	get := reflect.ValueOf(source).MethodByName("GetBlobAt")
	chunks := reflect.MakeSlice(get.Type().In(2), 1, 1)
	chunks.Index(0).FieldByName("Offset").SetUint(uint64(offset))
	chunks.Index(0).FieldByName("Length").SetUint(uint64(info.Size - offset)) // some registries know no ranges without an end
	ctx, stop := context.WithCancel(ctx)
	out := get.Call([]reflect.Value{reflect.ValueOf(ctx), reflect.ValueOf(info), chunks})
	if err, _ := out[2].Interface().(error); err != nil {
		stop()
		return nil, err
	}
	streams, failures := out[0].Interface().(chan io.ReadCloser), out[1].Interface().(chan error)
	drain := func() { // the library waits until somebody hears of it
		for range failures {
		}
	}
	select {
	case r, ok := <-streams:
		go drain()
		if !ok {
			stop()
			return nil, errors.New("the registry sends no content")
		}
		// The body of a part is that of the HTTP response itself.
		kind := reflect.TypeOf(r)
		if kind.Kind() == reflect.Pointer {
			kind = kind.Elem()
		}
		if strings.HasPrefix(kind.PkgPath(), "net/http") {
			return &body{r, stop}, nil
		}
		stop()
		r.Close()
		return nil, nil
	case err, ok := <-failures:
		stop()
		if !ok {
			err = errors.New("the registry sends no content")
		}
		return nil, err
	}
}

// body is what a registry sends.
type body struct {
	io.ReadCloser
	stop context.CancelFunc
}

// Close ends the connection first, so that nobody reads the rest of what comes.
func (b *body) Close() error {
	b.stop()
	return b.ReadCloser.Close()
}

// explain marks errors that another attempt does not help against, and names the way out of some.
func (i *Image) explain(err error) error {
	if err == nil {
		return nil
	}
	var certificate *tls.CertificateVerificationError
	var unauthorized docker.ErrUnauthorizedForCredentials
	var host *net.DNSError
	var code errcode.ErrorCoder
	switch {
	case errors.As(err, &certificate):
		return oci.Permanent(fmt.Errorf("%w (--cert-dir names a directory with the *.crt of its authority)", err))
	case errors.As(err, &host) && host.IsNotFound:
		return oci.Permanent(err)
	case errors.Is(err, http.ErrSchemeMismatch):
		return oci.Permanent(fmt.Errorf("%w (--tls-verify=false also permits HTTP)", err))
	case errors.As(err, &unauthorized), errors.As(err, &code) && statusOf(code) == http.StatusUnauthorized:
		return oci.Permanent(fmt.Errorf("%w (--authfile names a file with credentials, as podman login --authfile writes it)", err))
	case code != nil:
		status := statusOf(code)
		if status >= 400 && status < 500 && status != http.StatusTooManyRequests && status != http.StatusRequestTimeout {
			return oci.Permanent(err)
		}
	}
	if !i.Remote() || refused.MatchString(err.Error()) {
		return oci.Permanent(err)
	}
	return err
}

func statusOf(c errcode.ErrorCoder) int { return c.ErrorCode().Descriptor().HTTPStatusCode }

// refused is how the library puts an answer of 400 to 499, of those that do not pass, which has no body for programs to read.
var refused = regexp.MustCompile(`StatusCode: 4(0[^8]|[13-9]\d|2[^9])\b`)
