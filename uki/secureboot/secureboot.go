// Package secureboot makes and reads what Secure Boot decides by: keys and certificates, the signature databases of the
// firmware, and signed updates of them. Everything is defined by the UEFI specification, chapters 8.2 and 32.4.
//
// The firmware has four variables with certificates and hashes, each a signature database:
//
//	PK    platform key: one certificate, whose key may change PK and KEK
//	KEK   key exchange keys: their keys may change db and dbx
//	db    what is started: files signed by these certificates, or with these hashes
//	dbx   what is not, whatever db says
//
// A machine without PK is in setup mode: it takes everything. With PK it takes updates alone, files *.auth, which have a time
// and are signed: PK and KEK by PK, db and dbx by KEK. An update replaces the variable, and then it has to be newer than the
// last one; or it appends what is not there yet.
//
// # A directory of keys
//
// New makes one; Dir reads and changes it.
//
//	PK.key  KEK.key  db.key     private keys, PEM (PKCS #8), for their owner alone
//	PK.pem  KEK.pem  db.pem     their certificates, self-signed
//	pcr.key  pcr.pub            a key for PCR policies, which the firmware knows nothing of
//	owner                       a GUID that says in databases whose entry it is
//	PK.auth  KEK.auth  db.auth  dbx.auth
//	                            the whole databases, to enrol on a machine in setup mode. PK and KEK are signed by PK.key,
//	                            db and dbx by KEK.key. They are the record of what the databases have.
//	updates/TIME-NAME.auth      for machines that are enrolled, in the order of their names
//	old/TIME-NAME               what was replaced
//
// A change is made beside the directory's files first and is then moved over them. If it is interrupted in between, the next
// one that opens the directory completes it.
package secureboot

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"
)

// GUID is an identifier of UEFI, in the bytes that files have: the first three numbers are little endian.
type GUID [16]byte

// ParseGUID reads the usual text, as 8be4df61-93ca-11d2-aa0d-00e098032b8c.
func ParseGUID(text string) (GUID, error) {
	var g GUID
	b, err := hex.DecodeString(strings.ReplaceAll(text, "-", ""))
	if err == nil && len(b) == len(g) {
		copy(g[:], b)
		if g.swap(); strings.EqualFold(g.String(), text) {
			return g, nil
		}
	}
	return GUID{}, fmt.Errorf("GUID %q: want one as 8be4df61-93ca-11d2-aa0d-00e098032b8c", text)
}

// NewGUID makes a random one, of version 4.
func NewGUID() GUID {
	var g GUID
	rand.Read(g[:])
	g[7] = g[7]&0x0f | 0x40
	g[8] = g[8]&0x3f | 0x80
	return g
}

// swap changes between the bytes of files and those in the order of the text.
func (g *GUID) swap() {
	binary.BigEndian.PutUint32(g[0:], binary.LittleEndian.Uint32(g[0:]))
	binary.BigEndian.PutUint16(g[4:], binary.LittleEndian.Uint16(g[4:]))
	binary.BigEndian.PutUint16(g[6:], binary.LittleEndian.Uint16(g[6:]))
}

func (g GUID) String() string {
	g.swap()
	return fmt.Sprintf("%x-%x-%x-%x-%x", g[:4], g[4:6], g[6:8], g[8:10], g[10:])
}

// MarshalText makes JSON of it.
func (g GUID) MarshalText() ([]byte, error) { return []byte(g.String()), nil }

func mustGUID(text string) GUID {
	g, err := ParseGUID(text)
	if err != nil {
		panic(err)
	}
	return g
}

// Variable names a variable of the firmware.
type Variable struct {
	Name string
	GUID GUID
}

// The signature databases of the firmware.
var (
	PK  = Variable{"PK", globalGUID}
	KEK = Variable{"KEK", globalGUID}
	DB  = Variable{"db", securityGUID}
	DBX = Variable{"dbx", securityGUID}
)

var (
	globalGUID   = mustGUID("8be4df61-93ca-11d2-aa0d-00e098032b8c")
	securityGUID = mustGUID("d719b2cb-3d3a-4596-a3bc-dad00e67656f")
	shimGUID     = mustGUID("605dab50-e046-4300-abb6-3dd810dd8b23")
)

// Variables are the four of them.
var Variables = []Variable{PK, KEK, DB, DBX}

// ParseVariable finds one of the four by its name.
func ParseVariable(name string) (Variable, error) {
	for _, v := range Variables {
		if v.Name == name {
			return v, nil
		}
	}
	return Variable{}, fmt.Errorf("variable %q: want PK, KEK, db or dbx", name)
}

// signer is the variable whose keys sign updates of v.
func (v Variable) signer() Variable {
	if v == PK || v == KEK {
		return PK
	}
	return KEK
}
