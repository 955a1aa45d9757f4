package signer

import (
	"crypto"
	"crypto/rsa"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strconv"
	"sync"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"golang.org/x/sys/unix"
)

// TPMVariable is the environment variable that says where the TPM is: a device, or the Unix socket of one in software (swtpm
// socket --tpm2 --server type=unixio,path=...).
const TPMVariable = "COMPOSEFS_TPM"

const tpmDevice = "/dev/tpmrm0"

// A key file of a TPM is PEM with a structure that is defined by "ASN.1 Specification for TPM 2.0 Key Files" (Bottomley,
// draft). The key in it is encrypted for the TPM that made it.
const tpmKeyFile = "TSS2 PRIVATE KEY"

// loadable says that the key is a child of a key in the TPM, and not sealed data or a key of another TPM.
var loadable = asn1.ObjectIdentifier{2, 23, 133, 10, 1, 3}

type tpmKeyASN1 struct {
	Type        asn1.ObjectIdentifier
	EmptyAuth   asn1.RawValue `asn1:"explicit,optional,tag:0"`
	Policy      asn1.RawValue `asn1:"explicit,optional,tag:1"`
	Secret      asn1.RawValue `asn1:"explicit,optional,tag:2"`
	AuthPolicy  asn1.RawValue `asn1:"explicit,optional,tag:3"`
	Description asn1.RawValue `asn1:"explicit,optional,tag:4"`
	RSAParent   asn1.RawValue `asn1:"explicit,optional,tag:5"`
	Parent      int64
	Public      []byte // TPM2B_PUBLIC
	Private     []byte // TPM2B_PRIVATE
}

// isTrue reads a boolean in its tag. OpenSSL's provider writes 1, which is true in BER but not allowed in DER.
func isTrue(v asn1.RawValue) bool {
	return len(v.Bytes) == 3 && v.Bytes[0] == asn1.TagBoolean && v.Bytes[1] == 1 && v.Bytes[2] != 0
}

// tpmKey is a key in a TPM.
type tpmKey struct {
	name   string
	tpm    transport.TPMCloser
	public *rsa.PublicKey
	key    tpm2.NamedHandle
	loaded []tpm2.TPMHandle // to be flushed
	mu     sync.Mutex       // one command at a time
}

// openTPM opens a persistent handle, as 0x81010001, or a key file.
func openTPM(name string, public crypto.PublicKey) (*Signer, error) {
	k := &tpmKey{name: name}
	err := k.open()
	if p, ok := public.(interface{ Equal(crypto.PublicKey) bool }); err == nil && ok && !p.Equal(k.public) {
		err = errors.New("it does not belong to the public key or certificate that is given")
	}
	if err != nil {
		if k.tpm != nil {
			k.close()
		}
		return nil, fmt.Errorf("tpm2:%s: %w", name, err)
	}
	return &Signer{k, k.close}, nil
}

// open connects to the TPM, finds or loads the key there, and reads its public part.
func (k *tpmKey) open() error {
	handle, err := strconv.ParseUint(k.name, 0, 32)
	isHandle := err == nil
	var file tpmKeyASN1
	if !isHandle {
		b, err := readFile(k.name)
		if err == nil {
			file, err = parseKeyFile(b)
		}
		if err != nil {
			return err
		}
	} else if handle>>24 != uint64(tpm2.TPMHTPersistent) {
		return fmt.Errorf("handle 0x%x: persistent ones are 0x81000000 to 0x81ffffff", handle)
	}
	if k.tpm, err = connectTPM(); err != nil {
		return err
	}
	k.key.Handle = tpm2.TPMHandle(handle)
	if !isHandle {
		if err := k.load(file); err != nil {
			return err
		}
	}
	read, err := tpm2.ReadPublic{ObjectHandle: k.key.Handle}.Execute(k.tpm)
	if errors.Is(err, tpm2.TPMRCHandle) {
		return fmt.Errorf("the TPM has no such key: %w", err)
	}
	if err != nil {
		return err
	}
	k.key.Name = read.Name
	return k.readPublic(read.OutPublic)
}

func connectTPM() (transport.TPMCloser, error) {
	path := os.Getenv(TPMVariable)
	if path == "" {
		path = tpmDevice
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("%w: there is no TPM 2.0: name another device or socket in %s", err, TPMVariable)
	}
	if info.Mode()&fs.ModeSocket != 0 {
		c, err := net.Dial("unix", path)
		if err != nil {
			return nil, err
		}
		return transport.FromReadWriteCloser(c), nil
	}
	if info.Mode()&fs.ModeDevice == 0 {
		return nil, fmt.Errorf("%s: no device or socket: look at %s", path, TPMVariable)
	}
	// Not by os.OpenFile, which makes it non-blocking: then an answer that is not there yet reads as the end of the file.
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		err = &fs.PathError{Op: "open", Path: path, Err: err}
	}
	if errors.Is(err, fs.ErrPermission) {
		err = fmt.Errorf("%w: be root, or a member of the device's group", err)
	}
	if err != nil {
		return nil, err
	}
	return transport.FromReadWriteCloser(os.NewFile(uintptr(fd), path)), nil
}

// readPublic takes keys that can sign what this program has hashed, with the scheme that firmware and TPM policies want.
func (k *tpmKey) readPublic(b tpm2.TPM2BPublic) error {
	public, err := b.Contents()
	if err != nil {
		return err
	}
	if public.Type != tpm2.TPMAlgRSA {
		return fmt.Errorf("key of type 0x%x: want RSA, 0x%x", uint16(public.Type), uint16(tpm2.TPMAlgRSA))
	}
	parms, err := public.Parameters.RSADetail()
	if err != nil {
		return err
	}
	unique, err := public.Unique.RSA()
	if err != nil {
		return err
	}
	switch {
	case !public.ObjectAttributes.SignEncrypt:
		return errors.New("the key is not for signing")
	case public.ObjectAttributes.Restricted:
		return errors.New("the key is restricted: it signs only what the TPM has made itself")
	case parms.Scheme.Scheme != tpm2.TPMAlgNull && parms.Scheme.Scheme != tpm2.TPMAlgRSASSA:
		return fmt.Errorf("the key has the scheme 0x%x: want RSASSA (PKCS #1), 0x%x, or none", uint16(parms.Scheme.Scheme), uint16(tpm2.TPMAlgRSASSA))
	}
	k.public, err = tpm2.RSAPub(parms, unique)
	return err
}

// parseKeyFile reads a key file.
func parseKeyFile(b []byte) (f tpmKeyASN1, err error) {
	block, _ := pem.Decode(b)
	if block == nil || block.Type != tpmKeyFile {
		return f, fmt.Errorf("no PEM with %q", tpmKeyFile)
	}
	if rest, err := asn1.Unmarshal(block.Bytes, &f); err != nil {
		return f, err
	} else if len(rest) > 0 {
		return f, fmt.Errorf("%d bytes after the key", len(rest))
	}
	switch {
	case !f.Type.Equal(loadable):
		return f, fmt.Errorf("type %v: want a loadable key, %v: import it into this TPM first", f.Type, loadable)
	case len(f.Policy.FullBytes) > 0 || len(f.AuthPolicy.FullBytes) > 0:
		return f, errors.New("the key has a policy: use exec:COMMAND with a program that satisfies it")
	case !isTrue(f.EmptyAuth):
		return f, errors.New("the key has a password: use exec:COMMAND with a program that asks for it")
	case f.Parent < 0 || f.Parent > 1<<32-1:
		return f, fmt.Errorf("parent %d is no handle", f.Parent)
	}
	return f, nil
}

// load loads the key of a file below its parent: a persistent key, or the storage key that the TPM makes again whenever it is
// asked to.
func (k *tpmKey) load(file tpmKeyASN1) error {
	public, err := tpm2.Unmarshal[tpm2.TPM2BPublic](file.Public)
	if err != nil {
		return fmt.Errorf("public part: %w", err)
	}
	private, err := tpm2.Unmarshal[tpm2.TPM2BPrivate](file.Private)
	if err != nil {
		return fmt.Errorf("private part: %w", err)
	}
	parent := tpm2.TPMHandle(file.Parent)
	if parent>>24 == tpm2.TPMHandle(tpm2.TPMHTPersistent) {
		name, err := tpm2.ReadPublic{ObjectHandle: parent}.Execute(k.tpm)
		if err != nil {
			return fmt.Errorf("parent 0x%x: %w", uint32(parent), err)
		}
		return k.loadBelow(tpm2.NamedHandle{Handle: parent, Name: name.Name}, *public, *private)
	}
	// The specification's storage key has coordinates of no bytes, that of the TCG's guidance has zeros.
	templates := []tpm2.TPMTPublic{emptyECC(), tpm2.ECCSRKTemplate}
	if isTrue(file.RSAParent) {
		templates = []tpm2.TPMTPublic{emptyRSA(), tpm2.RSASRKTemplate}
	}
	for n, template := range templates {
		made, err := tpm2.CreatePrimary{PrimaryHandle: parent, InPublic: tpm2.New2B(template)}.Execute(k.tpm)
		if err != nil {
			return fmt.Errorf("parent: storage key of hierarchy 0x%x: %w", uint32(parent), err)
		}
		err = k.loadBelow(tpm2.NamedHandle{Handle: made.ObjectHandle, Name: made.Name}, *public, *private)
		flush := k.flush(made.ObjectHandle)
		if err == nil || n == len(templates)-1 {
			return errors.Join(err, flush)
		}
	}
	return nil
}

func emptyECC() tpm2.TPMTPublic {
	t := tpm2.ECCSRKTemplate
	t.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{})
	return t
}

func emptyRSA() tpm2.TPMTPublic {
	t := tpm2.RSASRKTemplate
	t.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{})
	return t
}

func (k *tpmKey) loadBelow(parent tpm2.NamedHandle, public tpm2.TPM2BPublic, private tpm2.TPM2BPrivate) error {
	auth := tpm2.AuthHandle{Handle: parent.Handle, Name: parent.Name, Auth: tpm2.PasswordAuth(nil)}
	got, err := tpm2.Load{ParentHandle: auth, InPrivate: private, InPublic: public}.Execute(k.tpm)
	if errors.Is(err, tpm2.TPMRCIntegrity) {
		return fmt.Errorf("the key was not made by this TPM: %w", err)
	}
	if err != nil {
		return err
	}
	k.key.Handle = got.ObjectHandle
	k.loaded = append(k.loaded, got.ObjectHandle)
	return nil
}

func (k *tpmKey) flush(handle tpm2.TPMHandle) error {
	_, err := tpm2.FlushContext{FlushHandle: handle}.Execute(k.tpm)
	return err
}

func (k *tpmKey) close() error {
	var err error
	for _, handle := range k.loaded {
		err = errors.Join(err, k.flush(handle))
	}
	return errors.Join(err, k.tpm.Close())
}

func (k *tpmKey) Public() crypto.PublicKey { return k.public }

func (k *tpmKey) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if _, pss := opts.(*rsa.PSSOptions); pss || opts.HashFunc() != crypto.SHA256 || len(digest) != crypto.SHA256.Size() {
		return nil, fmt.Errorf("tpm2:%s: only PKCS #1 signatures with SHA-256 are made", k.name)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	signed, err := tpm2.Sign{
		KeyHandle: tpm2.AuthHandle{Handle: k.key.Handle, Name: k.key.Name, Auth: tpm2.PasswordAuth(nil)},
		Digest:    tpm2.TPM2BDigest{Buffer: digest},
		InScheme: tpm2.TPMTSigScheme{
			Scheme:  tpm2.TPMAlgRSASSA,
			Details: tpm2.NewTPMUSigScheme(tpm2.TPMAlgRSASSA, &tpm2.TPMSSchemeHash{HashAlg: tpm2.TPMAlgSHA256}),
		},
		Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck, Hierarchy: tpm2.TPMRHNull},
	}.Execute(k.tpm)
	if errors.Is(err, tpm2.TPMRCAuthFail) || errors.Is(err, tpm2.TPMRCBadAuth) {
		return nil, fmt.Errorf("tpm2:%s: the key has a password: use exec:COMMAND with a program that asks for it: %w", k.name, err)
	}
	if err != nil {
		return nil, fmt.Errorf("tpm2:%s: %w", k.name, err)
	}
	signature, err := signed.Signature.Signature.RSASSA()
	if err != nil {
		return nil, fmt.Errorf("tpm2:%s: %w", k.name, err)
	}
	return signature.Sig.Buffer, nil
}
