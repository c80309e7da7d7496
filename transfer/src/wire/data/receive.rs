//! Payload in: from the socket into blocks, in place.

use std::io;

use super::super::frame::{BODY_BYTES_MAX, Code, HEADER_BYTES, Header, Kind, StripeSpec};
use super::{
    BYTES_PER_TURN, DataStream, FRAMES_PER_TURN, Key, Origin, Out, OutStripe, Placing, Role,
    RxState, SCRATCH_BYTES, Turn, fill, push_rest,
};
use crate::error::LossCause;

impl DataStream {
    pub(super) fn receive(&mut self) -> Result<Turn, LossCause> {
        let (mut bytes, mut frames) = (0, 0);
        while bytes < BYTES_PER_TURN && frames < FRAMES_PER_TURN {
            let received = match &self.rx.state {
                RxState::Header if self.rx.header_got == HEADER_BYTES => {
                    self.rx.header_got = 0;
                    frames += 1;
                    let header = Header::decode(&self.rx.header).ok_or_else(|| {
                        LossCause::Protocol("unknown frame on a data connection".to_owned())
                    })?;
                    self.begin_frame(header)?;
                    continue;
                }
                RxState::Header => self.receive_header(),
                RxState::Body { header, body } if body.len() == header.len as usize => {
                    let RxState::Body { header, body } =
                        std::mem::replace(&mut self.rx.state, RxState::Header)
                    else {
                        continue;
                    };
                    self.frame_with_body(header, &body)?;
                    continue;
                }
                RxState::Body { .. } => self.receive_body(),
                RxState::Payload { left: 0, .. } => {
                    self.end_payload();
                    continue;
                }
                RxState::Payload { key, left, discard } => {
                    let (key, left, discard) = (*key, *left, *discard);
                    self.receive_payload(key, left, discard)
                }
            };
            match received {
                Ok(0) => return Err(LossCause::Closed),
                Ok(count) => bytes += count,
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

    fn receive_header(&mut self) -> io::Result<usize> {
        self.pieces.clear();
        push_rest(&mut self.pieces, &mut self.rx.header, self.rx.header_got);
        // SAFETY: the piece lies in `self.rx.header`, exclusively borrowed.
        let received = unsafe { self.socket.recv(&mut self.pieces) }?;
        self.rx.header_got += received;
        Ok(received)
    }

    fn receive_body(&mut self) -> io::Result<usize> {
        let RxState::Body { header, body } = &mut self.rx.state else {
            return Ok(0);
        };
        // The buffer grows as bytes arrive, whatever the header promises.
        let got = body.len();
        let more = (header.len as usize - got).min(SCRATCH_BYTES);
        body.resize(got + more, 0);
        self.pieces.clear();
        push_rest(&mut self.pieces, body, got);
        // SAFETY: the piece lies in `body`, exclusively borrowed.
        let received = unsafe { self.socket.recv(&mut self.pieces) };
        body.truncate(got + *received.as_ref().unwrap_or(&0));
        received
    }

    fn receive_payload(&mut self, key: Key, left: u32, discard: bool) -> io::Result<usize> {
        self.pieces.clear();
        let received = if discard {
            self.receive_scratch(left)
        } else {
            match &self.role {
                Role::Target(_) => self.receive_placed(left),
                Role::Initiator(_) => self.receive_sink(key, left),
            }
        }?;
        // What is beyond the payload is the next header.
        let payload = received.min(left as usize);
        if let RxState::Payload { left, .. } = &mut self.rx.state {
            *left -= u32::try_from(payload).unwrap_or(*left);
            if *left == 0 {
                self.rx.header_got = received - payload;
            }
        }
        Ok(received)
    }

    fn receive_scratch(&mut self, left: u32) -> io::Result<usize> {
        self.rx.scratch.resize(SCRATCH_BYTES, 0);
        let count = self.rx.scratch.len().min(left as usize);
        self.pieces.push(self.rx.scratch.as_mut_ptr(), count);
        // SAFETY: the piece lies in the scratch buffer, exclusively borrowed.
        unsafe { self.socket.recv(&mut self.pieces) }
    }

    /// Target: bytes of a WRITE into their blocks.
    fn receive_placed(&mut self, left: u32) -> io::Result<usize> {
        let Role::Target(incoming) = &self.role else {
            return Ok(0);
        };
        let Some(placing) = &mut self.rx.placing else {
            return Ok(0);
        };
        let Some(stripe) = &mut placing.stripe else {
            return Ok(0);
        };
        let open = stripe.window.as_ref().map(|window| window.enter());
        let refused = match &open {
            Some(None) => Some(Code::WindowClosed),
            _ if stripe.region.released() => Some(Code::UnknownRegion),
            _ => None,
        };
        if let Some(code) = refused {
            incoming.stripe_done(placing.key, code);
            drop(open);
            placing.stripe = None;
            if let RxState::Payload { discard, .. } = &mut self.rx.state {
                *discard = true;
            }
            return self.receive_scratch(left);
        }
        let end = stripe.range.start + u64::from(left);
        let range = stripe.range.start..end;
        fill(
            &mut self.pieces,
            &stripe.region,
            &stripe.set,
            stripe.order,
            range,
        );
        if self.pieces.bytes() == left as usize && !self.pieces.full() {
            push_rest(&mut self.pieces, &mut self.rx.header, 0);
        }
        // SAFETY: the pieces come from a set that was validated against a region that `stripe`
        // keeps alive, or lie in `self.rx.header`; region memory has no references.
        let received = unsafe { self.socket.recv(&mut self.pieces) }?;
        stripe.range.start += (received as u64).min(u64::from(left));
        Ok(received)
    }

    /// Initiator: bytes of a READ into local blocks.
    fn receive_sink(&mut self, key: Key, left: u32) -> io::Result<usize> {
        let Role::Initiator(client) = &self.role else {
            return Ok(0);
        };
        let Some(sink) = self.rx.sinks.get_mut(&key) else {
            return Ok(0);
        };
        if sink.transfer.called_off() {
            self.rx.sinks.remove(&key);
            client.give_back(key);
            if let RxState::Payload { discard, .. } = &mut self.rx.state {
                *discard = true;
            }
            return self.receive_scratch(left);
        }
        let Some(set) = sink
            .transfer
            .work
            .as_ref()
            .and_then(|work| work.sets.get(sink.set))
        else {
            return Ok(0);
        };
        let range = sink.range.start..sink.range.start + u64::from(left);
        fill(
            &mut self.pieces,
            &set.local_region,
            &set.local,
            set.order,
            range,
        );
        if self.pieces.bytes() == left as usize && !self.pieces.full() {
            push_rest(&mut self.pieces, &mut self.rx.header, 0);
        }
        // SAFETY: the pieces come from a set that was validated against a region that the transfer
        // keeps alive, or lie in `self.rx.header`; region memory has no references.
        let received = unsafe { self.socket.recv(&mut self.pieces) }?;
        sink.range.start += (received as u64).min(u64::from(left));
        Ok(received)
    }

    fn begin_frame(&mut self, header: Header) -> Result<(), LossCause> {
        let protocol = |what: &str| Err(LossCause::Protocol(what.to_owned()));
        let key = (header.id, header.part);
        match (header.kind, &self.role) {
            (Kind::Write | Kind::Read, Role::Target(_)) => {
                if header.len as usize > BODY_BYTES_MAX {
                    return protocol("stripe description too long");
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
                    incoming.stripe_done(key, Code::Aborted);
                }
            }
            (Kind::ReadCancel, Role::Target(_)) if header.len == 0 => self.drop_served(key),
            (Kind::ReadDone, Role::Initiator(client)) if header.len == 0 => {
                if let Some(sink) = self.rx.sinks.remove(&key) {
                    let code = Code::from(header.code).unwrap_or(Code::Unsupported);
                    if code == Code::Ok && !sink.range.is_empty() {
                        return protocol("READ done before its last byte");
                    }
                    client.read_done(&sink.transfer, key, code);
                }
            }
            _ => return protocol("a frame that does not belong here"),
        }
        Ok(())
    }

    /// Target: WRITE and READ with their stripe.
    fn frame_with_body(&mut self, header: Header, body: &[u8]) -> Result<(), LossCause> {
        let Role::Target(incoming) = &self.role else {
            return Ok(());
        };
        let key = (header.id, header.part);
        let spec = StripeSpec::decode(body)
            .ok_or_else(|| LossCause::Protocol("malformed stripe description".to_owned()))?;
        let write = header.kind == Kind::Write;
        match incoming.admit(spec, write) {
            Ok(stripe) if write => {
                self.rx.placing = Some(Placing {
                    key,
                    stripe: Some(stripe),
                });
                self.complete_placed();
            }
            Ok(stripe) => {
                if self.tx.queue.len() >= incoming.reads_max() {
                    self.push_read_done(key, Code::Busy);
                } else {
                    let range = stripe.range.clone();
                    self.tx.queue.push_back(Out::Stripe(OutStripe {
                        key,
                        origin: Origin::Served(stripe),
                        prologue: Vec::new(),
                        prologue_sent: 0,
                        range,
                        chunk: None,
                    }));
                }
            }
            Err(code) if write => {
                incoming.stripe_done(key, code);
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
            incoming.stripe_done(placing.key, Code::Ok);
        }
    }
}
