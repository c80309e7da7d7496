//! The wire as the document describes it, written a second time: for those who lie on it.

use std::io::{self, Read, Write};

pub(crate) const HELLO: u8 = 1;
pub(crate) const WELCOME: u8 = 2;
pub(crate) const REFUSE: u8 = 3;
pub(crate) const PING: u8 = 16;
pub(crate) const ASK_REGION: u8 = 32;
pub(crate) const ASK_WINDOW: u8 = 33;
pub(crate) const WINDOW_QUIET: u8 = 34;
pub(crate) const NOTIFY: u8 = 35;
pub(crate) const REGION: u8 = 48;
pub(crate) const WINDOW: u8 = 49;
pub(crate) const WINDOW_CLOSE: u8 = 50;
pub(crate) const REGION_GONE: u8 = 51;
pub(crate) const NOTIFIED: u8 = 52;
pub(crate) const STRIPE_DONE: u8 = 53;
pub(crate) const WRITE: u8 = 64;
pub(crate) const WRITE_ABORT: u8 = 65;
pub(crate) const READ: u8 = 66;
pub(crate) const READ_CANCEL: u8 = 67;
pub(crate) const DATA: u8 = 80;
pub(crate) const READ_DONE: u8 = 81;
/// Code of an epoch that is over.
pub(crate) const STALE: u8 = 10;

pub(crate) const HEADER_BYTES: usize = 24;
/// Of the metadata and of the wire.
const VERSION: u16 = 3;

/// A frame with a length that may be a lie.
pub(crate) fn header(kind: u8, code: u8, len: u32, id: u64, part: u32) -> Vec<u8> {
    let mut out = vec![kind, code, 0, 0];
    out.extend(len.to_le_bytes());
    out.extend(id.to_le_bytes());
    out.extend(part.to_le_bytes());
    out.extend([0; 4]);
    out
}

pub(crate) fn frame(kind: u8, id: u64, part: u32, body: &[u8]) -> Vec<u8> {
    let mut out = header(kind, 0, body.len() as u32, id, part);
    out.extend(body);
    out
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u16).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Who says hello to whom; `nonce` for a data connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hello<'a> {
    pub(crate) nonce: Option<u64>,
    pub(crate) to: &'a str,
    pub(crate) epoch: u64,
}

impl Hello<'_> {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut body = b"BPWR".to_vec();
        body.extend(VERSION.to_le_bytes());
        body.extend([u8::from(self.nonce.is_some()), 0]);
        // The liar is never missed.
        body.extend(600_000u32.to_le_bytes());
        body.extend(self.nonce.unwrap_or(0).to_le_bytes());
        body.extend(666u64.to_le_bytes());
        body.extend(self.epoch.to_le_bytes());
        text(&mut body, "liar");
        text(&mut body, self.to);
        frame(HELLO, 0, 0, &body)
    }
}

pub(crate) fn welcome(nonce: u64) -> Vec<u8> {
    let mut body = b"BPWR".to_vec();
    body.extend(VERSION.to_le_bytes());
    body.extend([0; 2]);
    body.extend(600_000u32.to_le_bytes());
    body.extend(nonce.to_le_bytes());
    body.extend(64u32.to_le_bytes());
    frame(WELCOME, 0, 0, &body)
}

/// The nonce in an answer to a hello.
pub(crate) fn nonce_of(body: &[u8]) -> u64 {
    u64::from_le_bytes(body[12..20].try_into().unwrap())
}

/// Ids of a stripe, as they are on the wire.
#[derive(Clone, Debug)]
pub(crate) enum Ids<'a> {
    List(&'a [u32]),
    Spans(&'a [(u32, u32)]),
}

/// A stripe: all of its layout may be a lie.
#[derive(Clone, Debug)]
pub(crate) struct Stripe<'a> {
    pub(crate) region: u64,
    pub(crate) window: Option<u64>,
    pub(crate) blocks: u32,
    pub(crate) block_stride: u64,
    pub(crate) layers: u32,
    pub(crate) layer_stride: u64,
    pub(crate) run_bytes: u64,
    pub(crate) range: (u64, u64),
    /// Count and stride of the loops inside of a layer of a block.
    pub(crate) inner: &'a [(u32, u64)],
    pub(crate) ids: Ids<'a>,
}

impl Stripe<'_> {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = self.region.to_le_bytes().to_vec();
        out.extend(self.window.unwrap_or(0).to_le_bytes());
        out.extend([u8::from(self.window.is_some()), 0]);
        out.extend(0u64.to_le_bytes());
        out.extend(self.blocks.to_le_bytes());
        out.extend(self.block_stride.to_le_bytes());
        out.extend(self.layers.to_le_bytes());
        out.extend(self.layer_stride.to_le_bytes());
        out.extend(self.run_bytes.to_le_bytes());
        out.extend(0u32.to_le_bytes());
        out.extend(self.layers.to_le_bytes());
        out.extend(self.range.0.to_le_bytes());
        out.extend(self.range.1.to_le_bytes());
        out.push(self.inner.len() as u8);
        for (count, stride) in self.inner {
            out.extend(count.to_le_bytes());
            out.extend(stride.to_le_bytes());
        }
        match self.ids {
            Ids::List(ids) => {
                out.push(0);
                out.extend((ids.len() as u32).to_le_bytes());
                ids.iter().for_each(|id| out.extend(id.to_le_bytes()));
            }
            Ids::Spans(spans) => {
                out.push(1);
                out.extend((spans.len() as u32).to_le_bytes());
                for (first, count) in spans {
                    out.extend(first.to_le_bytes());
                    out.extend(count.to_le_bytes());
                }
            }
        }
        out
    }
}

/// Metadata of an agent that may not exist.
pub(crate) fn metadata(name: &str, epoch: u64, tcp: &str, region: (u64, u64)) -> Vec<u8> {
    let mut payload = epoch.to_le_bytes().to_vec();
    payload.extend([0; 16]);
    text(&mut payload, name);
    text(&mut payload, tcp);
    text(&mut payload, "");
    // Complete, revision 1, no base, nothing released; one region.
    payload.push(0);
    payload.extend(1u64.to_le_bytes());
    payload.extend(0u64.to_le_bytes());
    payload.extend(0u32.to_le_bytes());
    payload.extend(1u32.to_le_bytes());
    payload.extend(region.0.to_le_bytes());
    payload.extend(region.1.to_le_bytes());
    payload.extend([0, 0]);
    text(&mut payload, "lie");
    let mut out = b"BPMD".to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend([0; 2]);
    out.extend((payload.len() as u32).to_le_bytes());
    out.extend(crc32c::crc32c(&payload).to_le_bytes());
    out.extend(payload);
    out
}

/// A received frame.
#[derive(Clone, Debug)]
pub(crate) struct Received {
    pub(crate) kind: u8,
    pub(crate) code: u8,
    pub(crate) id: u64,
    pub(crate) part: u32,
    pub(crate) body: Vec<u8>,
}

/// The next frame that is not a heartbeat.
pub(crate) fn receive(socket: &mut impl Read) -> io::Result<Received> {
    loop {
        let mut header = [0; HEADER_BYTES];
        socket.read_exact(&mut header)?;
        let len = u32::from_le_bytes(header[4..8].try_into().unwrap());
        let mut body = vec![0; len as usize];
        socket.read_exact(&mut body)?;
        if header[0] != PING {
            return Ok(Received {
                kind: header[0],
                code: header[1],
                id: u64::from_le_bytes(header[8..16].try_into().unwrap()),
                part: u32::from_le_bytes(header[16..20].try_into().unwrap()),
                body,
            });
        }
    }
}

/// Sends until the other side has had enough of it, or does not read for a while; bytes sent.
pub(crate) fn pour(socket: &mut impl Write, frame: &[u8], times: usize) -> usize {
    let mut sent = 0;
    for _ in 0..times {
        if socket.write_all(frame).is_err() {
            break;
        }
        sent += frame.len();
    }
    sent
}
