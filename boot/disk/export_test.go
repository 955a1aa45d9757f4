package disk

import "testing"

// SetToolDirs replaces the directories where tools are found beside PATH.
func SetToolDirs(t *testing.T, dirs ...string) {
	old := toolDirs
	toolDirs = dirs
	t.Cleanup(func() { toolDirs = old })
}

// Clusters tells what makes a FAT file system a FAT32.
func (p *Plan) Clusters() int64 { return p.fat.clusters }

func (p *Plan) ClusterSize() int64 { return p.fat.cluster }
