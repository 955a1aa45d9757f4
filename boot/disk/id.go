package disk

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
)

// Role says what an identifier is for.
type Role string

// The roles of the identifiers on a disk.
const (
	DiskID          Role = "disk"           // GUID of the GPT
	ESPPartition    Role = "esp partition"  // GUID of the partition: PARTUUID
	RootPartition   Role = "root partition" // GUID of the partition: PARTUUID
	RootFilesystem  Role = "root filesystem"
	rootHashSeed    Role = "root directory hash"
	espSerialNumber Role = "esp serial number"
)

// ID returns the identifier that a disk with this seed has for a role, in the form 8-4-4-4-12 in lower case: a UUID of
// version 8 (RFC 9562: "custom"), made of the SHA-256 of role, NUL and seed. It is known before the disk is: a boot entry
// may say root=UUID= of ID(seed, RootFilesystem).
func ID(seed []byte, role Role) string {
	b := idBytes(seed, role)
	b[6] = b[6]&0x0f | 0x80
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[0:4], b[4:6], b[6:8], b[8:10], b[10:16])
}

func idBytes(seed []byte, role Role) [32]byte {
	return sha256.Sum256(append([]byte(string(role)+"\x00"), seed...))
}

// ESPSerial returns the serial number of the ESP's file system in the form that UUID= wants: "1A2B-3C4D".
func ESPSerial(seed []byte) string {
	n := espSerial(seed)
	return fmt.Sprintf("%04X-%04X", n>>16, n&0xffff)
}

func espSerial(seed []byte) uint32 {
	b := idBytes(seed, espSerialNumber)
	return binary.LittleEndian.Uint32(b[:4])
}
