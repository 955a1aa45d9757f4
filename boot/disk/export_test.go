package disk

// Clusters tells what makes a FAT file system a FAT32.
func (p *Plan) Clusters() int64 { return p.fat.clusters }

func (p *Plan) ClusterSize() int64 { return p.fat.cluster }
