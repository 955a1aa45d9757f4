// Package signer opens private keys, wherever they are: in a PEM file, in a TPM 2.0, or with a program that signs, so that smart
// cards, HSMs and key services of clouds need no code here.
//
// A key is named by a text: the name of a PEM file; "tpm2:" and a persistent handle, as 0x81010001, or the name of a key file of
// the TPM ("TSS2 PRIVATE KEY"); or "exec:COMMAND". Whoever signs needs only a crypto.Signer.
package signer

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"
)

// maxFile limits what is read of a file with keys or certificates, in bytes.
const maxFile = 1 << 20

// patience is how long a program may take for a signature: a person may have to touch a token.
const patience = 5 * time.Minute

// Signer is an open key. It is to be closed.
type Signer struct {
	crypto.Signer
	close func() error
}

// Close releases what the key holds.
func (s *Signer) Close() error {
	if s.close == nil {
		return nil
	}
	return s.close()
}

// Open opens the key that is named. The public key is what it must belong to; it may be nil for a PEM file or a TPM, and is needed
// for a program, which cannot be asked.
func Open(name string, public crypto.PublicKey) (*Signer, error) {
	if command, ok := strings.CutPrefix(name, "exec:"); ok {
		if public == nil {
			return nil, fmt.Errorf("%s: the public key or certificate is needed as well", name)
		}
		return &Signer{Signer: program{command, public}}, nil
	}
	if key, ok := strings.CutPrefix(name, "tpm2:"); ok {
		return openTPM(key, public)
	}
	key, err := readKey(name)
	if err != nil {
		return nil, err
	}
	if p, ok := public.(interface{ Equal(crypto.PublicKey) bool }); ok && !p.Equal(key.Public()) {
		return nil, fmt.Errorf("%s: it does not belong to the public key or certificate that is given", name)
	}
	return &Signer{Signer: key}, nil
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(b) > maxFile {
		err = fmt.Errorf("%s: more than %d bytes: no key or certificate", path, maxFile)
	}
	return b, err
}

// readKey reads the private key in a PEM file, PKCS #8 or PKCS #1.
func readKey(path string) (crypto.Signer, error) {
	b, err := readFile(path)
	if err != nil {
		return nil, err
	}
	for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
		var key any
		switch block.Type {
		case "PRIVATE KEY":
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case "RSA PRIVATE KEY":
			if block.Headers["DEK-Info"] != "" {
				return nil, errEncrypted(path)
			}
			key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
		case "ENCRYPTED PRIVATE KEY":
			return nil, errEncrypted(path)
		case tpmKeyFile:
			return nil, fmt.Errorf("%s: a key of a TPM: name it tpm2:%s", path, path)
		default:
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if s, ok := key.(crypto.Signer); ok {
			return s, nil
		}
		return nil, fmt.Errorf("%s: %T: it cannot sign", path, key)
	}
	return nil, fmt.Errorf("%s: no private key in it: want PEM with \"PRIVATE KEY\" or \"RSA PRIVATE KEY\"", path)
}

func errEncrypted(path string) error {
	return fmt.Errorf("%s: the key is encrypted: decrypt it with \"openssl pkey\" into a pipe, or use exec:COMMAND", path)
}

// ReadCertificate reads an X.509 certificate, the first in a PEM file, or DER.
func ReadCertificate(path string) (*x509.Certificate, error) {
	b, err := readFile(path)
	if err != nil {
		return nil, err
	}
	der := b
	for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "CERTIFICATE" {
			der = block.Bytes
			break
		}
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("%s: no certificate: want PEM or DER: %w", path, err)
	}
	return c, nil
}

// ReadPublicKey reads a public key, PEM or DER, or that of a certificate or of an unencrypted private key.
func ReadPublicKey(path string) (crypto.PublicKey, error) {
	b, err := readFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil {
		if key, err := x509.ParsePKIXPublicKey(b); err == nil {
			return key, nil
		}
	} else if block.Type == "PUBLIC KEY" {
		key, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		return key, nil
	} else if strings.HasSuffix(block.Type, "PRIVATE KEY") {
		key, err := readKey(path)
		if err != nil {
			return nil, err
		}
		return key.Public(), nil
	}
	if c, err := ReadCertificate(path); err == nil {
		return c.PublicKey, nil
	}
	return nil, fmt.Errorf("%s: no public key: want PEM or DER, or a certificate", path)
}

// program signs with a command of the shell: the digest, as bytes, is its standard input, and the signature, RSA with PKCS #1
// padding for SHA-256, its standard output. What it says on standard error goes to ours.
type program struct {
	command string
	public  crypto.PublicKey
}

func (p program) Public() crypto.PublicKey { return p.public }

func (p program) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	key, ok := p.public.(*rsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("exec:%s: a public key of type %T: want RSA", p.command, p.public)
	}
	if opts.HashFunc() != crypto.SHA256 {
		return nil, errors.New("exec: only SHA-256 is signed")
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c := exec.CommandContext(ctx, "sh", "-c", p.command)
	c.WaitDelay = time.Second
	c.Stdin, c.Stderr = bytes.NewReader(digest), os.Stderr
	out, err := c.Output()
	if err != nil {
		return nil, fmt.Errorf("exec:%s: %w", p.command, err)
	}
	// A program that signs something else, or with another key, is found here and not by the firmware.
	if err := rsa.VerifyPKCS1v15(key, crypto.SHA256, digest, out); err != nil {
		return nil, fmt.Errorf("exec:%s: its %d bytes are no signature of the digest by that key: want RSA with PKCS #1 padding", p.command, len(out))
	}
	return out, nil
}
