package transport

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"reflect"

	"github.com/docker/distribution/registry/api/errcode"
	"go.podman.io/image/v5/docker"
	"go.podman.io/image/v5/types"

	"github.com/composefs-boot/composefs-boot/repo/oci"
)

// blobAt opens a blob of a registry from an offset on. The library has range requests in the method GetBlobAt, whose argument is a
// slice of a type that other modules cannot name (struct{ Offset, Length uint64 }); therefore it is called by reflection. GetBlob
// would do for the beginning, but goes on by itself, and waits a second, when the connection breaks.
func blobAt(ctx context.Context, source types.ImageSource, info types.BlobInfo, offset int64) (io.ReadCloser, error) {
	get := reflect.ValueOf(source).MethodByName("GetBlobAt")
	chunks := reflect.MakeSlice(get.Type().In(2), 1, 1)
	chunks.Index(0).FieldByName("Offset").SetUint(uint64(offset))
	chunks.Index(0).FieldByName("Length").SetUint(math.MaxUint64) // to the end
	ctx, stop := context.WithCancel(ctx)
	out := get.Call([]reflect.Value{reflect.ValueOf(ctx), reflect.ValueOf(info), chunks})
	if err, _ := out[2].Interface().(error); err != nil {
		stop()
		return nil, err
	}
	streams, failures := out[0].Interface().(chan io.ReadCloser), out[1].Interface().(chan error)
	for streams != nil || failures != nil {
		select {
		case r, ok := <-streams:
			if ok {
				return &body{r, failures, stop}, nil
			}
			streams = nil
		case err, ok := <-failures:
			if ok {
				stop()
				return nil, err
			}
			failures = nil
		}
	}
	stop()
	return nil, errors.New("the registry sends no content")
}

// body is what a registry sends.
type body struct {
	io.ReadCloser
	failures chan error
	stop     context.CancelFunc
}

// Close ends the connection first: the library would read the rest of what comes.
func (b *body) Close() error {
	b.stop()
	err := b.ReadCloser.Close()
	go func() {
		for range b.failures { // until the library has done with it
		}
	}()
	return err
}

// explain marks errors that another attempt does not help against, and names the way out of some.
func (i *Image) explain(err error) error {
	if err == nil {
		return nil
	}
	var certificate *tls.CertificateVerificationError
	var unauthorized docker.ErrUnauthorizedForCredentials
	var record tls.RecordHeaderError
	var code errcode.ErrorCoder
	switch {
	case errors.As(err, &certificate):
		return oci.Permanent(fmt.Errorf("%w (--cert-dir names a directory with the *.crt of its authority)", err))
	case errors.As(err, &record):
		return oci.Permanent(fmt.Errorf("%w (--tls-verify=false also permits HTTP)", err))
	case errors.As(err, &unauthorized):
		return oci.Permanent(fmt.Errorf("%w (--authfile names a file with credentials, as podman login --authfile writes it)", err))
	case errors.As(err, &code):
		status := code.ErrorCode().Descriptor().HTTPStatusCode
		if status == http.StatusUnauthorized {
			return oci.Permanent(fmt.Errorf("%w (--authfile names a file with credentials, as podman login --authfile writes it)", err))
		}
		if status >= 400 && status < 500 && status != http.StatusTooManyRequests && status != http.StatusRequestTimeout {
			return oci.Permanent(err)
		}
	}
	if !i.Remote() {
		return oci.Permanent(err)
	}
	return err
}
