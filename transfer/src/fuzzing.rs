//! What fuzz targets call: the decoders of everything that a peer sends. Compiled for them only.

use crate::peer::Metadata;
use crate::wire::fuzz_frames;

/// A metadata blob. What is accepted survives being written and read again.
pub fn metadata(data: &[u8]) {
    if let Ok(metadata) = Metadata::from_bytes(data) {
        let again = Metadata::from_bytes(&metadata.to_bytes());
        assert_eq!(again.ok(), Some(metadata));
    }
}

/// A frame: header and body, as any kind that has one.
pub fn frame(data: &[u8]) {
    fuzz_frames(data);
}
