// Package oci keeps OCI images in a repository, and makes composefs images of them.
//
// An image is a manifest, which names a config and layers by their digests. Each is a splitstream of the repository, and
// refers to the next by named references, so that whoever keeps one keeps what it needs:
//
//	streams/refs/oci/TAG            -> oci-manifest-DIGEST     % and / of the tag are written %25 and %2F
//	streams/oci-manifest-DIGEST     the manifest, an object; "config:DIGEST" -> config, DIFFID -> layer,
//	                                "blob:DIGEST" -> the layer as it came, compressed, an object
//	streams/oci-config-DIGEST       the config, an object; DIFFID -> layer, "composefs.image.v1" -> image, and others
//	streams/oci-layer-DIFFID        the archive, decompressed: headers in the stream, contents of more than 64 bytes as objects
//	streams/refs/oci-referrers/SUBJECT/DIGEST -> oci-manifest-DIGEST   an artifact that refers to an image
//	streams/refs/oci-members/INDEX/DIGEST     -> oci-manifest-DIGEST   a manifest of an artifact that is an index
//
// The references to composefs images are composefs.image for the plain one and composefs.image.boot for the one to boot, with
// .v1 behind it for the formats V0 and V1, and .xattrs=MODE if other extended attributes are kept than usually. The blobs of
// artifacts have streams of their own content type, by the digest of the blob. This is how composefs-rs 0.9 keeps images: either
// program reads, checks and extends what the other has written. It knows no indexes; an artifact that is one has the name of a
// manifest and a content type of its own: composefs-rs counts it, keeps it with all its manifests, and does not look into it.
//
// [Pull] reads an image from a [Source]; repo/oci/transport has those that are behind a network. Layers are downloaded, decompressed,
// hashed and split at the same time, see splitter, and the tree grows of those that are complete: all becomes durable at once, with the
// composefs images. The archive comes back bit for bit, so that the digest of a layer can be checked, and the layer given away again.
// For that, the headers must be kept as they are, which archive/tar does not hand out; so tarReader is our own, over blocks of 512 bytes,
// and one reader serves both the archive that is split and the stream that is read.
//
// [Image.Tree] lays the layers upon each other, from the streams: images are made again, in other formats, without the registry.
// What an archive leaves open has one meaning, which is that of composefs-rs where that has one:
//
//   - Whiteouts (".wh.NAME") and opaque directories (".wh..wh..opq") hide what is in the layers below, wherever they stand.
//   - The last of several entries of one path counts. A directory upon a directory changes the metadata and keeps the entries.
//   - Directories that are missing are made: 0755, root, time 0. A parent that is no directory is an error.
//   - A hard link leads to a file that is there already, in this layer or below.
//   - Extended attributes are PAX records SCHILY.xattr.NAME; global PAX headers say nothing.
//   - What could lead out of the tree, or what readers of archives take in different ways, is an error.
//
// The root gets the metadata of /usr, /run is emptied, and extended attributes are filtered: fstree.Tree.MakeContainerRoot.
//
// From far away, a pull goes on where an earlier one was stopped ([PullOptions].Resume). A compressed stream cannot be entered in the
// middle, so the compressed bytes of a layer are kept in tmp/ until its stream is durable, and are decompressed again; objects that are
// there are not written again. The file of a blob is locked by who brings it: who wants the same blob waits, and then finds the layer.
//
// A source may have the difference between two images instead of an image, an oci-delta artifact: the new image is made of the old one,
// which has to be in the repository, and is the same as if it had come whole. See repo/oci/tardiff for the differences of layers.
//
// Artifacts that refer to an image, [PullReferrers], stay as long as the image: [Follows] tells garbage collection so.
//
// [Push] gives an image to a [Target], with the digests that it had. Manifest and config are kept as they were, and the archives of the
// layers; what the manifest names is the archives compressed. A compressed layer is given as it came if that was kept, or compressed
// again if one of the usual compressors gives the same bytes; otherwise it becomes another blob, and with it the manifest another
// manifest, which Push says, while diff IDs and config, and so the composefs images, stay the same.
//
// [Fsck] finds what an image lacks, and [Repair] brings it again: from what is left of it in the repository, or from a source.
//
// All that comes from a source is untrusted. The digest of the manifest is for the caller to compare; everything else has to be what
// the manifest and the config say. Sizes are limited, see [Limits].
package oci
