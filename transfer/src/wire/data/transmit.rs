//! Payload out: from blocks to the socket, in place.

use std::io;

use super::super::frame::{Code, HEADER_BYTES, Header, Kind};
use super::super::socket::Pieces;
use super::{
    BYTES_PER_TURN, Chunk, DataStream, Key, Origin, Out, OutStripe, Role, SCRATCH_BYTES, Turn,
    ZEROS, fill, push_rest,
};
use crate::error::LossCause;

impl DataStream {
    pub(super) fn transmit(&mut self) -> Result<Turn, LossCause> {
        let mut bytes = 0;
        while bytes < BYTES_PER_TURN {
            self.pieces.clear();
            let (chunk_bytes, pieces) = (self.chunk_bytes, &mut self.pieces);
            let Some(front) = self.tx.queue.front_mut() else {
                return Ok(Turn::WouldBlock);
            };
            let mut guard = None;
            let sent = match front {
                Out::Frame { bytes, sent } => {
                    push_rest(pieces, bytes, *sent);
                    // SAFETY: the piece lies in `bytes`, exclusively borrowed.
                    unsafe { self.socket.send(pieces) }
                }
                Out::Stripe(stripe) => match stripe.next_pieces(pieces, chunk_bytes, &mut guard) {
                    // SAFETY: the pieces lie in buffers of `stripe` or in regions that it keeps
                    // alive; a window guard is held for memory that is served to the peer.
                    Next::Send => unsafe { self.socket.send(pieces) },
                    Next::Finished => {
                        drop(guard);
                        self.stripe_out();
                        continue;
                    }
                },
            };
            drop(guard);
            match sent {
                Ok(count) => {
                    bytes += count;
                    let over = match front {
                        Out::Frame { bytes, sent } => {
                            *sent += count;
                            *sent == bytes.len()
                        }
                        Out::Stripe(stripe) => {
                            stripe.advance(count as u64);
                            false
                        }
                    };
                    if over {
                        self.tx.queue.pop_front();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.writable = false;
                    return Ok(Turn::WouldBlock);
                }
                Err(error) => return Err(LossCause::Broken(error.to_string())),
            }
        }
        Ok(Turn::Over)
    }

    /// The front stripe needs no more payload: it is complete or called off.
    fn stripe_out(&mut self) {
        let Some(Out::Stripe(stripe)) = self.tx.queue.pop_front() else {
            return;
        };
        let (id, part) = stripe.key;
        match (&stripe.origin, &self.role) {
            (Origin::Own { .. }, Role::Initiator(client)) => {
                if stripe.range.is_empty() {
                    client.sent(stripe.key);
                } else if stripe.prologue_sent == 0 {
                    client.give_back(stripe.key);
                } else {
                    client.sent(stripe.key);
                    let abort = Header::new(Kind::WriteAbort, id, part).encode();
                    self.tx.queue.push_front(Out::Frame {
                        bytes: abort.to_vec(),
                        sent: 0,
                    });
                }
            }
            (Origin::Served(_), _) => {
                let done = Header::new(Kind::ReadDone, id, part)
                    .code(stripe.served())
                    .encode();
                self.tx.queue.push_front(Out::Frame {
                    bytes: done.to_vec(),
                    sent: 0,
                });
            }
            (Origin::Own { .. }, Role::Target(_)) => {}
        }
    }

    pub(super) fn push_read_done(&mut self, (id, part): Key, code: Code) {
        let bytes = Header::new(Kind::ReadDone, id, part)
            .code(code)
            .encode()
            .to_vec();
        self.tx.queue.push_back(Out::Frame { bytes, sent: 0 });
    }

    /// Target: the initiator does not want the rest of a READ.
    pub(super) fn drop_served(&mut self, key: Key) {
        for out in &mut self.tx.queue {
            if let Out::Stripe(stripe) = out
                && stripe.key == key
            {
                // A chunk under way is finished, nothing follows it.
                let end = stripe
                    .chunk
                    .as_ref()
                    .map_or(stripe.range.start, |chunk| chunk.end);
                stripe.range.end = end;
            }
        }
    }
}

enum Next {
    Send,
    Finished,
}

type Guard<'a> = Option<parking_lot::RwLockReadGuard<'a, bool>>;

impl OutStripe {
    /// The next pieces to send, or the end of the stripe.
    fn next_pieces<'a>(
        &'a mut self,
        pieces: &mut Pieces,
        chunk_bytes: u32,
        guard: &mut Guard<'a>,
    ) -> Next {
        let at_boundary = self
            .chunk
            .as_ref()
            .is_none_or(|chunk| chunk.end == self.range.start);
        if at_boundary {
            let called_off = match &self.origin {
                Origin::Own { transfer, .. } => transfer.called_off(),
                Origin::Served(stripe) => stripe.refusal().is_some(),
            };
            let prologue_left = self.prologue_sent < self.prologue.len() && self.prologue_sent > 0;
            if self.range.is_empty() && self.prologue_sent == self.prologue.len()
                || called_off && !prologue_left
                || self.chunk.as_ref().is_some_and(|chunk| chunk.blank)
            {
                return Next::Finished;
            }
            if !called_off && !self.range.is_empty() {
                let left = self.range.end - self.range.start;
                let len = u32::try_from(left.min(u64::from(chunk_bytes))).unwrap_or(chunk_bytes);
                let mut header = Header::new(Kind::Data, self.key.0, self.key.1);
                header.len = len;
                self.chunk = Some(Chunk {
                    header: header.encode(),
                    header_sent: 0,
                    end: self.range.start + u64::from(len),
                    blank: false,
                });
            }
        }
        push_rest(pieces, &mut self.prologue, self.prologue_sent);
        let Some(chunk) = &mut self.chunk else {
            return Next::Send;
        };
        push_rest(pieces, &mut chunk.header, chunk.header_sent);
        let range = self.range.start..chunk.end;
        match &self.origin {
            Origin::Own { transfer, set } => {
                if let Some(set) = transfer.work.as_ref().and_then(|work| work.sets.get(*set)) {
                    fill(pieces, &set.local_region, &set.local, set.order, range);
                }
            }
            Origin::Served(stripe) => {
                match stripe.window.as_ref().map(|window| window.enter()) {
                    Some(None) => chunk.blank = true,
                    Some(held) => *guard = held,
                    None => {}
                }
                if chunk.blank {
                    let count = (range.end - range.start).min(SCRATCH_BYTES as u64);
                    let count = usize::try_from(count).unwrap_or(SCRATCH_BYTES);
                    pieces.push(ZEROS.as_ptr().cast_mut(), count);
                } else {
                    fill(pieces, &stripe.region, &stripe.set, stripe.order, range);
                }
            }
        }
        Next::Send
    }

    /// Books `count` sent bytes: prologue, chunk header, payload.
    fn advance(&mut self, count: u64) {
        let mut count = count;
        let mut book = |sent: &mut usize, whole: usize| {
            let taken = count.min((whole - *sent) as u64);
            *sent += usize::try_from(taken).unwrap_or(0);
            count -= taken;
        };
        book(&mut self.prologue_sent, self.prologue.len());
        if let Some(chunk) = &mut self.chunk {
            book(&mut chunk.header_sent, HEADER_BYTES);
            self.range.start += count;
        }
    }

    /// How a READ of the peer ended.
    fn served(&self) -> Code {
        let refusal = match &self.origin {
            Origin::Served(_) if self.chunk.as_ref().is_some_and(|chunk| chunk.blank) => {
                return Code::WindowClosed;
            }
            Origin::Served(stripe) => stripe.refusal(),
            Origin::Own { .. } => None,
        };
        if self.range.is_empty() {
            Code::Ok
        } else {
            refusal.unwrap_or(Code::Aborted)
        }
    }
}
