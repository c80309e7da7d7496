//! Payload in: from the socket into blocks, in place.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::super::frame::{BODY_BYTES_MAX, Code, HEADER_BYTES, Header, Kind, StripeSpec};
use super::{
    AHEAD_BYTES, ANSWERS_MAX, DataStream, FRAMES_PER_TURN, Key, Origin, Out, OutStripe, Payload,
    Placing, Role, RxState, SCRATCH_BYTES, Sink, Small, Turn, place, push_rest,
};
use crate::error::LossCause;
use crate::memory::Region;
use crate::plan::{BlockSet, Order};
use crate::window::OpenWindow;

impl DataStream {
    pub(super) fn receive(&mut self, bytes_max: usize) -> Result<Turn, LossCause> {
        let (mut bytes, mut frames) = (0, 0);
        // A call that received less than it had room for has emptied the socket.
        let mut drained = false;
        while bytes < bytes_max && frames < FRAMES_PER_TURN {
            if self.full() {
                self.heard(bytes);
                return Ok(Turn::Full);
            }
            if self.consume(&mut frames)? {
                continue;
            }
            if drained && !self.ended {
                self.heard(bytes);
                return Ok(Turn::WouldBlock);
            }
            match self.fetch() {
                Ok((0, _)) => return Err(LossCause::Closed),
                Ok((count, asked)) => {
                    bytes += count;
                    drained = count < asked;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.heard(bytes);
                    return Ok(Turn::WouldBlock);
                }
                Err(error) => return Err(LossCause::Broken(error.to_string())),
            }
        }
        self.heard(bytes);
        Ok(Turn::Over)
    }

    fn heard(&self, bytes: usize) {
        if bytes > 0 {
            match &self.role {
                Role::Initiator(client) => client.heard(),
                Role::Target(incoming) => incoming.heard(),
            }
        }
    }

    /// Goes one step with the bytes that are there; false when more are needed.
    fn consume(&mut self, frames: &mut usize) -> Result<bool, LossCause> {
        match &mut self.rx.state {
            RxState::Header => {
                let Some(header) = self.rx.ahead.bytes().first_chunk::<HEADER_BYTES>() else {
                    return Ok(false);
                };
                let header = Header::decode(header).ok_or_else(|| {
                    LossCause::Protocol("unknown frame on a data connection".to_owned())
                })?;
                self.rx.ahead.take(HEADER_BYTES);
                *frames += 1;
                self.begin_frame(header)?;
                Ok(true)
            }
            RxState::Body { header, body } => {
                let ahead = self.rx.ahead.bytes();
                let more = ahead.len().min(header.len as usize - body.len());
                body.extend_from_slice(&ahead[..more]);
                let whole = body.len() == header.len as usize;
                self.rx.ahead.take(more);
                if whole
                    && let RxState::Body { header, body } =
                        std::mem::replace(&mut self.rx.state, RxState::Header)
                {
                    self.frame_with_body(header, &body)?;
                }
                Ok(whole)
            }
            RxState::Payload { left: 0, .. } => {
                self.end_payload();
                Ok(true)
            }
            RxState::Payload { key, left, discard } => {
                let (key, left, discard) = (*key, *left, *discard);
                let there = self.rx.ahead.bytes().len().min(left as usize);
                if there > 0 {
                    if discard {
                        self.received(there);
                    } else {
                        self.place_ahead(key, there);
                    }
                    self.rx.ahead.take(there);
                }
                Ok(there > 0)
            }
        }
    }

    /// Asks the socket for what the state needs, and for the begin of what follows it: bytes
    /// received, and bytes there was room for.
    fn fetch(&mut self) -> io::Result<(usize, usize)> {
        self.pieces.clear();
        match &mut self.rx.state {
            RxState::Payload { key, left, discard } => {
                let (key, left, discard) = (*key, *left, *discard);
                self.fetch_payload(key, left, discard)
            }
            RxState::Body { header, body } if header.len as usize - body.len() > AHEAD_BYTES => {
                // The buffer grows as bytes arrive, whatever the header promises.
                let got = body.len();
                let more = (header.len as usize - got).min(SCRATCH_BYTES);
                body.resize(got + more, 0);
                push_rest(&mut self.pieces, body, got);
                // SAFETY: the piece lies in `body`, exclusively borrowed.
                let received = unsafe { self.socket.recv(&mut self.pieces) };
                body.truncate(got + *received.as_ref().unwrap_or(&0));
                Ok((received?, more))
            }
            RxState::Body { .. } | RxState::Header => {
                self.rx.ahead.offer(&mut self.pieces);
                let asked = self.pieces.bytes();
                // SAFETY: the piece lies in the buffer of `ahead`, exclusively borrowed.
                let received = unsafe { self.socket.recv(&mut self.pieces) }?;
                self.rx.ahead.end += received;
                Ok((received, asked))
            }
        }
    }

    /// Receives payload into its blocks, or into nowhere.
    fn fetch_payload(&mut self, key: Key, left: u32, discard: bool) -> io::Result<(usize, usize)> {
        let window = self.window_of_placing();
        let open = window.as_ref().map(|window| window.enter());
        let mut staged = false;
        if discard || !self.may_place(key, matches!(open, Some(None))) {
            self.rx.scratch.resize(SCRATCH_BYTES, 0);
            let count = self.rx.scratch.len().min(left as usize);
            self.pieces.push(self.rx.scratch.as_mut_ptr(), count);
        } else if let Some(blocks) = blocks(&mut self.rx.placing, &mut self.rx.sinks, key) {
            let payload = Payload {
                region: blocks.region,
                set: blocks.set,
                order: blocks.order,
                range: blocks.range.start..blocks.range.start + u64::from(left),
            };
            staged = !self.socket.is_secure() && payload.is_short();
            if staged {
                self.pieces.push_room(left as usize);
            } else {
                payload.fill(&mut self.pieces, false);
            }
        }
        if self.pieces.bytes() == left as usize && !self.pieces.full() {
            self.rx.ahead.offer(&mut self.pieces);
        }
        let asked = self.pieces.bytes();
        // SAFETY: the pieces lie in buffers of this connection, or come from a set that was
        // validated against a region that the stripe or the transfer keeps alive; a window guard is
        // held for them, and region memory has no references.
        let received = unsafe { self.socket.recv(&mut self.pieces) }?;
        // What is beyond the payload is the next header.
        let payload = received.min(left as usize);
        if staged && let Some(blocks) = blocks(&mut self.rx.placing, &mut self.rx.sinks, key) {
            let range = blocks.range.start..blocks.range.start + payload as u64;
            let bytes = self.pieces.room(payload);
            place(blocks.region, blocks.set, blocks.order, range, bytes);
        }
        drop(open);
        self.rx.ahead.end += received - payload;
        self.received(payload);
        Ok((received, asked))
    }

    /// Puts payload that was received ahead into its blocks.
    fn place_ahead(&mut self, key: Key, count: usize) {
        let window = self.window_of_placing();
        let open = window.as_ref().map(|window| window.enter());
        if self.may_place(key, matches!(open, Some(None))) {
            let ahead = &self.rx.ahead.bytes[self.rx.ahead.start..][..count];
            let blocks = blocks(&mut self.rx.placing, &mut self.rx.sinks, key);
            if let Some(blocks) = blocks {
                let range = blocks.range.start..blocks.range.start + count as u64;
                place(blocks.region, blocks.set, blocks.order, range, ahead);
            }
        }
        drop(open);
        self.received(count);
    }

    /// Books payload that has arrived.
    fn received(&mut self, count: usize) {
        let RxState::Payload { key, left, discard } = &mut self.rx.state else {
            return;
        };
        *left -= u32::try_from(count).unwrap_or(*left);
        if !*discard && let Some(blocks) = blocks(&mut self.rx.placing, &mut self.rx.sinks, *key) {
            blocks.range.start += count as u64;
        }
    }

    fn window_of_placing(&self) -> Option<Arc<OpenWindow>> {
        let stripe = self.rx.placing.as_ref()?.stripe.as_ref()?;
        stripe.window.clone()
    }

    /// Whether payload may still go into its blocks. If not, its owner is told and the rest of the
    /// frame is thrown away. A `closed` window is one whose guard could not be had.
    fn may_place(&mut self, key: Key, closed: bool) -> bool {
        match &self.role {
            Role::Target(incoming) => {
                let stripe = self.rx.placing.as_mut().map(|placing| &mut placing.stripe);
                if let Some(Some(stripe)) = &stripe
                    && !closed
                    && !stripe.region.released()
                {
                    return true;
                }
                if let Some(stripe) = stripe.and_then(Option::take) {
                    incoming.placed();
                    let code = if stripe.region.released() {
                        Code::UnknownRegion
                    } else {
                        Code::WindowClosed
                    };
                    self.answer_write(key, code);
                }
            }
            Role::Initiator(client) => {
                if let Some(sink) = self.rx.sinks.get(&key) {
                    if !sink.transfer.called_off() {
                        return true;
                    }
                    self.rx.sinks.remove(&key);
                    client.give_back(key);
                }
            }
        }
        if let RxState::Payload { discard, .. } = &mut self.rx.state {
            *discard = true;
        }
        false
    }

    fn begin_frame(&mut self, header: Header) -> Result<(), LossCause> {
        let protocol = |what: &str| Err(LossCause::Protocol(what.to_owned()));
        let key = (header.id, header.part);
        match (header.kind, &self.role) {
            (Kind::Notify, Role::Target(_)) if !self.follows_its_stripe(header.id) => {
                return protocol("NOTIFY without its WRITE");
            }
            (Kind::Write | Kind::Read | Kind::Notify, Role::Target(_)) => {
                if header.len as usize > BODY_BYTES_MAX {
                    return protocol("frame too long");
                }
                self.rx.state = RxState::Body {
                    header,
                    body: Vec::new(),
                };
                return Ok(());
            }
            (Kind::Data, Role::Target(_)) => {
                let Some(placing) = self
                    .rx
                    .placing
                    .as_ref()
                    .filter(|placing| placing.key == key)
                else {
                    return protocol("DATA without WRITE");
                };
                let left = placing
                    .stripe
                    .as_ref()
                    .map(|stripe| stripe.range.end - stripe.range.start);
                if left.is_some_and(|left| u64::from(header.len) > left) {
                    return protocol("DATA beyond its stripe");
                }
                let discard = left.is_none();
                self.rx.state = RxState::Payload {
                    key,
                    left: header.len,
                    discard,
                };
                return Ok(());
            }
            (Kind::Data, Role::Initiator(_)) => {
                let sink = self.rx.sinks.get(&key);
                if sink.is_some_and(|s| u64::from(header.len) > s.range.end - s.range.start) {
                    return protocol("DATA beyond its stripe");
                }
                // Bytes of a READ that was called off are thrown away.
                let discard = sink.is_none();
                self.rx.state = RxState::Payload {
                    key,
                    left: header.len,
                    discard,
                };
                return Ok(());
            }
            (Kind::WriteAbort, Role::Target(incoming)) if header.len == 0 => {
                if let Some(placing) = self.rx.placing.take_if(|placing| placing.key == key)
                    && placing.stripe.is_some()
                {
                    incoming.placed();
                    self.answer_write(key, Code::Aborted);
                }
            }
            (Kind::StripeDone, Role::Initiator(client)) if header.len == 0 => {
                let Some(code) = Code::from(header.code) else {
                    return protocol("unknown answer");
                };
                client.stripe_answered(key, code);
            }
            (Kind::Notified, Role::Initiator(client)) if header.len == 0 => {
                let Some(code) = Code::from(header.code) else {
                    return protocol("unknown answer");
                };
                client.notified(header.id, code);
            }
            (Kind::ReadCancel, Role::Target(_)) if header.len == 0 => self.drop_served(key),
            (Kind::ReadDone, Role::Initiator(client)) if header.len == 0 => {
                let sink = self.rx.sinks.remove(&key);
                if let Some(sink) = sink {
                    let code = Code::from(header.code).unwrap_or(Code::Unsupported);
                    if code == Code::Ok && !sink.range.is_empty() {
                        return protocol("READ done before its last byte");
                    }
                    client.read_done(&sink.transfer, key, code);
                }
                if !self.read_ended() {
                    return protocol("READ done that nobody asked for");
                }
            }
            _ => return protocol("a frame that does not belong here"),
        }
        Ok(())
    }

    /// Target: the stripe before this notification has arrived, or was refused.
    fn follows_its_stripe(&self, id: u64) -> bool {
        let refused = |placing: &Placing| placing.stripe.is_none() && placing.key.0 == id;
        self.rx.whole == Some(id) || self.rx.placing.as_ref().is_some_and(refused)
    }

    /// Target: WRITE and READ with their stripe, NOTIFY with its payload.
    fn frame_with_body(&mut self, header: Header, body: &[u8]) -> Result<(), LossCause> {
        let Role::Target(incoming) = &self.role else {
            return Ok(());
        };
        let key = (header.id, header.part);
        let whole = self.rx.whole.take();
        if header.kind == Kind::Notify {
            // The notification of a stripe that was refused goes the way of its bytes.
            if whole == Some(header.id) {
                let code = incoming.deliver(body);
                let answer = Header::new(Kind::Notified, header.id, 0).code(code);
                self.answer(answer);
            }
            return Ok(());
        }
        let write = header.kind == Kind::Write;
        let waiting = self.tx.answers.len() + self.tx.answers_first;
        if write && waiting >= ANSWERS_MAX || !write && self.tx.reads_open >= incoming.reads_max() {
            let what = "more operations than the connection may have open";
            return Err(LossCause::Protocol(what.to_owned()));
        }
        self.tx.reads_open += usize::from(!write);
        let spec = StripeSpec::decode(body)
            .ok_or_else(|| LossCause::Protocol("malformed stripe description".to_owned()))?;
        match incoming.admit(spec, write) {
            Ok(stripe) if write => {
                self.rx.placing = Some(Placing {
                    key,
                    stripe: Some(stripe),
                });
                self.complete_placed();
            }
            Ok(stripe) => {
                let range = stripe.range.clone();
                self.tx.id_bytes += id_bytes(&stripe.set);
                let done = Header::new(Kind::ReadDone, key.0, key.1).code(Code::Ok);
                self.tx.queue.push_back(Out::Stripe(Box::new(OutStripe {
                    key,
                    origin: Origin::Served(stripe),
                    prologue: Small::new(Vec::new()),
                    range,
                    chunk: None,
                    epilogue: Small::new(done.encode().to_vec()),
                })));
            }
            Err(code) if write => {
                self.answer_write(key, code);
                // The payload is on its way: it is thrown away.
                self.rx.placing = Some(Placing { key, stripe: None });
            }
            Err(code) => self.push_read_done(key, code),
        }
        Ok(())
    }

    fn end_payload(&mut self) {
        self.rx.state = RxState::Header;
        // A READ is complete when the target says so, after the last byte.
        self.complete_placed();
    }

    /// Target: answers a stripe when all its bytes are in place.
    fn complete_placed(&mut self) {
        let Role::Target(incoming) = &self.role else {
            return;
        };
        let whole = |placing: &mut Placing| {
            placing
                .stripe
                .as_ref()
                .is_some_and(|stripe| stripe.range.is_empty())
        };
        if let Some(placing) = self.rx.placing.take_if(whole) {
            incoming.placed();
            self.answer_write(placing.key, Code::Ok);
            self.rx.whole = Some(placing.key.0);
        }
    }
}

/// Where payload of a stripe goes.
struct Blocks<'a> {
    region: &'a Region,
    set: &'a BlockSet,
    order: Order,
    /// What is left of the stripe.
    range: &'a mut Range<u64>,
}

/// The blocks of the stripe that is being placed, or of a READ of this agent.
fn blocks<'a>(
    placing: &'a mut Option<Placing>,
    sinks: &'a mut HashMap<Key, Sink>,
    key: Key,
) -> Option<Blocks<'a>> {
    if let Some(placing) = placing {
        let stripe = placing.stripe.as_mut()?;
        return Some(Blocks {
            region: &stripe.region,
            set: &stripe.set,
            order: stripe.order,
            range: &mut stripe.range,
        });
    }
    let Sink {
        transfer,
        set,
        range,
    } = sinks.get_mut(&key)?;
    let set = transfer.work.as_ref()?.sets.get(*set)?;
    Some(Blocks {
        region: &set.local_region,
        set: &set.local,
        order: set.order,
        range,
    })
}

/// Bytes that the ids of a set take.
pub(super) fn id_bytes(set: &BlockSet) -> usize {
    match set.ids.as_span() {
        Some(_) => 0,
        None => set.ids.len() * size_of::<u32>(),
    }
}
