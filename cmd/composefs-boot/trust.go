package main

import (
	"errors"

	"github.com/spf13/pflag"

	"github.com/composefs-boot/composefs-boot/uki"
	"github.com/composefs-boot/composefs-boot/uki/secureboot"
)

// trustFlags say whose signatures are trusted, for commands that verify.
type trustFlags struct {
	db, dbx  []string
	firmware *string
}

func (f *trustFlags) addTo(flags *pflag.FlagSet) {
	flags.StringArrayVar(&f.db, "db", nil, "trust what is in `FILE`: a certificate, a signature list, an .auth file or a program")
	flags.StringArrayVar(&f.dbx, "dbx", nil, "refuse what is in `FILE`, in any of these forms")
	f.firmware = addFirmwareFlag(flags, "trust what the firmware of this machine trusts, and refuse what it refuses")
}

// addFirmwareFlag adds --firmware, whose value may be left out.
func addFirmwareFlag(flags *pflag.FlagSet, help string) *string {
	v := flags.String("firmware", "", help+", from `DIR` [default: "+secureboot.Efivars+"]")
	flags.Lookup("firmware").NoOptDefVal = secureboot.Efivars
	return v
}

func (f *trustFlags) given() bool { return len(f.db)+len(f.dbx) > 0 || *f.firmware != "" }

// read reads what the flags name, all of which counts together, and with --firmware the revocation list of shim, if it has one.
func (f *trustFlags) read() (t uki.Trust, sbatLevel string, err error) {
	if len(f.db) == 0 && *f.firmware == "" {
		return t, "", usageError{errors.New("--db or --firmware is needed: whose signature is to be trusted?")}
	}
	db, err := readEntries(f.db, secureboot.GUID{})
	if err != nil {
		return t, "", err
	}
	dbx, err := readEntries(f.dbx, secureboot.GUID{})
	if err != nil {
		return t, "", err
	}
	if *f.firmware != "" {
		has, err := secureboot.ReadFirmware(*f.firmware)
		if err != nil {
			return t, "", err
		}
		db, dbx, sbatLevel = db.With(has.DB...), dbx.With(has.DBX...), has.SBATLevel
	}
	t, err = secureboot.Trust(db, dbx)
	return t, sbatLevel, err
}
