package disk
import ("context";"os")
type node struct{ size int64 }
func (p *Plan) planRoot() error { p.Root=Partition{Offset:p.ESP.Offset+p.ESP.Size,Size:64<<20}; p.Size=p.Root.Offset+p.Root.Size+align; return nil }
func (p *Plan) writeRoot(ctx context.Context, out *os.File, done func(int64)) error { return nil }
