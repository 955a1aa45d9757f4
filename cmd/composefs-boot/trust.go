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

// trust reads what the flags name. All of it counts together.
func (f *trustFlags) trust() (uki.Trust, error) {
	if len(f.db) == 0 && *f.firmware == "" {
		return uki.Trust{}, usageError{errors.New("--db or --firmware is needed: whose signature is to be trusted?")}
	}
	db, err := readEntries(f.db, secureboot.GUID{})
	if err != nil {
		return uki.Trust{}, err
	}
	dbx, err := readEntries(f.dbx, secureboot.GUID{})
	if err != nil {
		return uki.Trust{}, err
	}
	if *f.firmware != "" {
		has, err := secureboot.ReadFirmware(*f.firmware)
		if err != nil {
			return uki.Trust{}, err
		}
		db, dbx = db.With(has.DB...), dbx.With(has.DBX...)
	}
	return secureboot.Trust(db, dbx)
}
