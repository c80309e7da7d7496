//! Payload out: from blocks to the socket, in place.

use std::io;

use super::super::frame::{Code, HEADER_BYTES, Header, Kind};
use super::super::socket::Pieces;
use super::receive::id_bytes;
use super::{
    Chunk, DataStream, Key, Origin, Out, OutStripe, Payload, Role, SCRATCH_BYTES, Turn, Tx, ZEROS,
    push_rest,
};
use crate::error::LossCause;

impl DataStream {
    pub(super) fn transmit(&mut self, bytes_max: usize) -> Result<Turn, LossCause> {
        let mut bytes = 0;
        match self.socket.flush() {
            Ok(true) => {}
            Ok(false) => {
                self.writable = false;
                return Ok(Turn::WouldBlock);
            }
            Err(error) => return Err(LossCause::Broken(error.to_string())),
        }
        loop {
            self.tx.place_answers();
            if self.tx.queue.is_empty() {
                return Ok(Turn::WouldBlock);
            }
            if bytes >= bytes_max {
                return Ok(Turn::Over);
            }
            self.pieces.clear();
            let mut guard = None;
            let limits = Limits {
                chunk_bytes: self.chunk_bytes,
                call_bytes: (bytes_max - bytes) as u64,
                copy_short: !self.socket.is_secure(),
            };
            let next = self.tx.gather(&mut self.pieces, limits, &mut guard);
            if next == Next::Over {
                drop(guard);
                self.stripe_out();
                continue;
            }
            let asked = self.pieces.bytes();
            // SAFETY: the pieces lie in frames and stripes of the queue or in regions that they
            // keep alive; a window guard is held for memory that is served to the peer.
            let sent = unsafe { self.socket.send(&mut self.pieces) };
            drop(guard);
            match sent {
                Ok(count) => {
                    bytes += count;
                    self.book(count as u64);
                    if count < asked || self.socket.unsent() {
                        // Full: the kernel tells when it is not any more.
                        self.writable = false;
                        return Ok(Turn::WouldBlock);
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
    }

    /// Books sent bytes of the queue, in its order.
    fn book(&mut self, mut count: u64) {
        while let Some(front) = self.tx.queue.front_mut() {
            match front {
                Out::Frame { bytes, sent } => {
                    let taken = count.min((bytes.len() - *sent) as u64);
                    *sent += usize::try_from(taken).unwrap_or(0);
                    count -= taken;
                    if *sent < bytes.len() {
                        return;
                    }
                    let read_done = bytes.first() == Some(&(Kind::ReadDone as u8));
                    self.tx.reads_open -= usize::from(read_done);
                    self.tx.answers_first = self.tx.answers_first.saturating_sub(1);
                    self.tx.queue.pop_front();
                }
                Out::Stripe(stripe) => {
                    count = stripe.book(count);
                    if !stripe.complete() {
                        return;
                    }
                    self.stripe_out();
                }
            }
            if count == 0 {
                return;
            }
        }
    }

    /// The front stripe needs no more payload: it is complete or called off.
    fn stripe_out(&mut self) {
        let Some(Out::Stripe(stripe)) = self.tx.queue.pop_front() else {
            return;
        };
        let (id, part) = stripe.key;
        match (&stripe.origin, &self.role) {
            (Origin::Own { .. }, Role::Initiator(client)) => {
                if stripe.complete() {
                    client.sent(stripe.key);
                } else if !stripe.prologue.begun() {
                    client.give_back(stripe.key);
                } else {
                    client.sent(stripe.key);
                    if !stripe.range.is_empty() {
                        let abort = Header::new(Kind::WriteAbort, id, part).encode();
                        self.push_first(abort.to_vec());
                    }
                }
            }
            (Origin::Served(served), _) => {
                self.tx.id_bytes -= id_bytes(&served.set);
                if stripe.complete() {
                    self.tx.reads_open -= 1;
                } else {
                    let done = Header::new(Kind::ReadDone, id, part).code(stripe.served());
                    self.push_first(done.encode().to_vec());
                }
            }
            (Origin::Own { .. }, Role::Target(_)) => {}
        }
    }

    fn push_first(&mut self, bytes: Vec<u8>) {
        self.tx.queue.push_front(Out::Frame { bytes, sent: 0 });
    }

    /// Target: answers a stripe of a WRITE.
    pub(super) fn answer_write(&mut self, (id, part): Key, code: Code) {
        self.answer(Header::new(Kind::StripeDone, id, part).code(code));
    }

    /// Sends an answer at the next boundary of what is being sent.
    pub(super) fn answer(&mut self, header: Header) {
        let bytes = header.encode().to_vec();
        self.tx.answers.push(Out::Frame { bytes, sent: 0 });
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
                stripe.chunk = stripe.chunk.take().filter(|chunk| chunk.header_sent > 0);
                let begun = stripe.chunk.as_ref().map(|chunk| chunk.end);
                stripe.range.end = begun.unwrap_or(stripe.range.start);
            }
        }
    }
}

/// What a look at the queue found.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    /// The front stripe is over, complete or not.
    Over,
    /// Pieces to send.
    Send,
}

/// What a stripe added to the pieces.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Added {
    /// Nothing: it is over.
    Over,
    /// Not all that is left of it.
    Some,
    /// All that is left of it.
    Rest,
}

/// How much is put together.
#[derive(Clone, Copy)]
struct Limits {
    /// Payload of one frame.
    chunk_bytes: u32,
    /// Payload of one stripe in one system call.
    call_bytes: u64,
    /// Short pieces are copied together. Encryption copies everything anyway.
    copy_short: bool,
}

type Guard<'a> = Option<parking_lot::RwLockReadGuard<'a, bool>>;

impl Tx {
    /// Puts answers before everything else, unless something is half sent.
    fn place_answers(&mut self) {
        let half_sent = match self.queue.front() {
            Some(Out::Frame { sent, .. }) => *sent > 0,
            Some(Out::Stripe(stripe)) => stripe.half_sent(),
            None => false,
        };
        if !half_sent {
            // Behind earlier answers: a notification is answered after its stripe.
            for answer in self.answers.drain(..) {
                self.queue.insert(self.answers_first, answer);
                self.answers_first += 1;
            }
        }
    }

    /// Collects what one system call can send, from the front of the queue.
    fn gather<'a>(
        &'a mut self,
        pieces: &mut Pieces,
        limits: Limits,
        guard: &mut Guard<'a>,
    ) -> Next {
        for (index, out) in self.queue.iter_mut().enumerate() {
            if pieces.full() {
                break;
            }
            match out {
                Out::Frame { bytes, sent } => push_rest(pieces, bytes, *sent),
                Out::Stripe(stripe) => {
                    // One guard per call.
                    let served = matches!(stripe.origin, Origin::Served(_));
                    if served && guard.is_some() {
                        break;
                    }
                    match stripe.add(pieces, limits, guard) {
                        Added::Over if index == 0 => return Next::Over,
                        Added::Rest if !served => {}
                        Added::Over | Added::Some | Added::Rest => break,
                    }
                }
            }
        }
        Next::Send
    }
}

impl OutStripe {
    /// Nothing of it is left to send.
    fn complete(&self) -> bool {
        self.range.is_empty() && self.epilogue.over() && self.prologue.over() && !self.blank()
    }

    /// A frame of it is sent in part.
    fn half_sent(&self) -> bool {
        let chunk = self.chunk.as_ref();
        self.prologue.begun() && !self.prologue.over()
            || chunk.is_some_and(|chunk| chunk.header_sent > 0 && chunk.end > self.range.start)
            || self.epilogue.begun()
    }

    fn blank(&self) -> bool {
        self.chunk.as_ref().is_some_and(|chunk| chunk.blank)
    }

    /// Adds the next pieces to send.
    fn add<'a>(&'a mut self, pieces: &mut Pieces, limits: Limits, guard: &mut Guard<'a>) -> Added {
        let boundary = self
            .chunk
            .as_ref()
            .is_none_or(|chunk| chunk.end == self.range.start || chunk.header_sent == 0);
        let announced = self.prologue.over() || !self.prologue.begun();
        let own = matches!(self.origin, Origin::Own { .. });
        let open = !self.range.is_empty() || own && !self.epilogue.begun();
        if boundary && (self.blank() || announced && open && self.called_off()) {
            return Added::Over;
        }
        if self.range.is_empty() && self.prologue.over() && self.epilogue.over() {
            return Added::Over;
        }
        if boundary && !self.range.is_empty() {
            if self.called_off() {
                // Only the rest of the announcement, which is half sent.
                self.prologue.push(pieces);
                return Added::Some;
            }
            self.chunk = Some(self.next_chunk(limits.chunk_bytes));
        }
        self.prologue.push(pieces);
        if let Some(chunk) = &mut self.chunk
            && !self.range.is_empty()
        {
            push_rest(pieces, &mut chunk.header, chunk.header_sent);
            let end = self.range.start.saturating_add(limits.call_bytes);
            let range = self.range.start..chunk.end.min(end);
            let before = pieces.bytes() as u64;
            match &self.origin {
                Origin::Own { transfer, set } => {
                    if let Some(set) = transfer.work.as_ref().and_then(|work| work.sets.get(*set)) {
                        let payload = Payload {
                            region: &set.local_region,
                            set: &set.local,
                            order: set.order,
                            range: range.clone(),
                        };
                        payload.fill(pieces, limits.copy_short);
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
                        return Added::Some;
                    }
                    let payload = Payload {
                        region: &stripe.region,
                        set: &stripe.set,
                        order: stripe.order,
                        range: range.clone(),
                    };
                    payload.fill(pieces, limits.copy_short);
                }
            }
            let whole = pieces.bytes() as u64 - before == range.end - range.start;
            if !whole || range.end < self.range.end {
                return Added::Some;
            }
        }
        self.epilogue.push(pieces);
        Added::Rest
    }

    fn called_off(&self) -> bool {
        match &self.origin {
            Origin::Own { transfer, .. } => transfer.called_off(),
            Origin::Served(stripe) => stripe.refusal().is_some(),
        }
    }

    fn next_chunk(&self, chunk_bytes: u32) -> Chunk {
        let left = self.range.end - self.range.start;
        let len = u32::try_from(left.min(u64::from(chunk_bytes))).unwrap_or(chunk_bytes);
        let mut header = Header::new(Kind::Data, self.key.0, self.key.1);
        header.len = len;
        Chunk {
            header: header.encode(),
            header_sent: 0,
            end: self.range.start + u64::from(len),
            blank: false,
        }
    }

    /// Books sent bytes: announcement, chunk header, payload, closing frame. Returns what belongs
    /// to the next in the queue.
    fn book(&mut self, count: u64) -> u64 {
        let mut count = self.prologue.book(count);
        if let Some(chunk) = &mut self.chunk {
            let taken = count.min((HEADER_BYTES - chunk.header_sent) as u64);
            chunk.header_sent += usize::try_from(taken).unwrap_or(0);
            count -= taken;
            let payload = count.min(chunk.end - self.range.start);
            self.range.start += payload;
            count -= payload;
        }
        if self.range.is_empty() && !self.blank() {
            count = self.epilogue.book(count);
        }
        count
    }

    /// How a READ of the peer ended that did not end with its last byte.
    fn served(&self) -> Code {
        let refusal = match &self.origin {
            Origin::Served(_) if self.blank() => return Code::WindowClosed,
            Origin::Served(stripe) => stripe.refusal(),
            Origin::Own { .. } => None,
        };
        refusal.unwrap_or(Code::Aborted)
    }
}
