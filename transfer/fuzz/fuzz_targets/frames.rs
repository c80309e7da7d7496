//! Frames and their bodies, as they come from a peer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| blockplane_transfer::fuzzing::frame(data));
