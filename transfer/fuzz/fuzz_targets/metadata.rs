//! Metadata blobs, as they come from anywhere.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| blockplane_transfer::fuzzing::metadata(data));
