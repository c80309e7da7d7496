//! Connections to peers and the messages on them: one thread converses, one connects.

use std::{
    collections::HashMap,
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
    thread::{self, Thread},
    time::Duration,
};

use blockplane_transfer::{Metadata, Notification, Peer, Transfer};

use super::{
    Core,
    announce::{Inbox, Outbox},
    borrow::Reply,
    codec::{Hello, Message, Position},
    count, lend,
};
use crate::events::{EventFeed, EventSubscription};

/// First and longest time between two greetings, or two tries to connect.
const RETRY: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(16);
/// Longest time for one try to connect.
const CONNECT_TIME: Duration = Duration::from_secs(1);
/// Longest time for a message.
const MESSAGE_TIME: Duration = Duration::from_secs(2);
/// Messages taken before everything else gets its turn.
const MESSAGES: usize = 64;

/// Messages to send once no lock is held.
pub(super) type Outgoing = Vec<(Peer, Message)>;

/// A peer as this worker knows it.
pub(super) struct Known {
    /// Of its control agent.
    pub(super) metadata: Metadata,
    /// Changes with each loss.
    session: u64,
    /// To its control agent.
    pub(super) link: Option<Peer>,
    /// Who it says that it is, with the metadata of the agent of its G2.
    greeted: Option<Arc<(Hello, Metadata)>>,
    /// To the agent of its G2.
    data: Option<Peer>,
    /// It did not answer a request, and has said nothing since.
    pub(super) silent: bool,
    /// Its blocks are others than those of this worker.
    refused: bool,
    pub(super) inbox: Inbox,
    dial: Retry,
    greet: Retry,
}

/// When something is tried next.
#[derive(Clone, Copy, Debug, Default)]
struct Retry {
    at: Duration,
    pause: Duration,
}

impl Retry {
    /// Whether it is time; then the next time is later.
    fn due(&mut self, now: Duration) -> bool {
        let due = now >= self.at;
        if due {
            self.pause = (self.pause * 2).clamp(RETRY, RETRY_MAX);
            self.at = now + self.pause;
        }
        due
    }
}

impl Known {
    pub(super) fn new(metadata: Metadata, session: u64, names_max: usize) -> Self {
        Self {
            metadata,
            session,
            link: None,
            greeted: None,
            data: None,
            silent: false,
            refused: false,
            inbox: Inbox::new(names_max),
            dial: Retry::default(),
            greet: Retry::default(),
        }
    }

    /// The way to its control agent and to its memory, if blocks can be read from it.
    pub(super) fn usable(&self) -> Option<(&Peer, &Peer, &Hello)> {
        let greeted = self.greeted.as_ref().filter(|_| !self.silent)?;
        Some((self.link.as_ref()?, self.data.as_ref()?, &greeted.0))
    }

    /// Whether a connection is lost. If none is, the loss of either will wake the task.
    fn is_lost(&self, context: &Context<'_>) -> bool {
        let peers = [&self.link, &self.data];
        let mut peers = peers.into_iter().flatten();
        peers.any(|peer| peer.poll_lost(context).is_ready())
    }

    /// What has to be connected: its control agent, then that of its G2.
    fn missing(&self) -> Option<&Metadata> {
        match (&self.link, &self.greeted) {
            (None, _) => Some(&self.metadata),
            (Some(_), Some(greeted)) if self.data.is_none() => Some(&greeted.1),
            (Some(_), _) => None,
        }
    }
}

/// What the converser keeps of each peer.
struct Told {
    session: u64,
    outbox: Outbox,
    /// Behind which change it reads.
    source: Option<(Option<u64>, EventSubscription)>,
    announce_at: Duration,
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Receives, announces, greets and notices losses until the tier is dropped.
pub(super) fn converse(core: &Core) {
    let notifications = core.control.notifications();
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut told: HashMap<Arc<str>, Told> = HashMap::new();
    loop {
        let mut out = Outgoing::new();
        let mut more = true;
        for _ in 0..MESSAGES {
            match pin!(notifications.recv()).poll(&mut context) {
                Poll::Ready(Ok(message)) => receive(core, &mut told, &message, &mut out),
                Poll::Ready(Err(_)) => return,
                Poll::Pending => {
                    more = false;
                    break;
                }
            }
        }
        let Some(mut next) = look(core, &mut told, &context, &mut out) else {
            return;
        };
        let now = core.now();
        for (name, told) in &mut told {
            let at = announce(core, name, told, now, &mut context, &mut out);
            next = [next, at].into_iter().flatten().min();
        }
        send(core, out);
        match next {
            _ if more => {}
            Some(at) => thread::park_timeout(at.saturating_sub(core.now())),
            None => thread::park(),
        }
    }
}

/// Sends messages. One that does not arrive is repeated by whoever waits for its answer.
pub(super) fn send(core: &Core, out: Outgoing) {
    for (peer, message) in out {
        if let Ok(sent) = core.control.notify(&peer, message.encode(), MESSAGE_TIME) {
            Transfer::detach(sent);
        }
    }
}

/// Handles one message of a peer.
fn receive(
    core: &Core,
    told: &mut HashMap<Arc<str>, Told>,
    received: &Notification,
    out: &mut Outgoing,
) {
    let message = Message::decode(&received.payload);
    let mut state = core.state.lock();
    let known = state.peers.get_mut(&received.from);
    let known = known.filter(|known| known.metadata.epoch() == received.epoch);
    let (Some(message), Some(known)) = (message, known) else {
        count(&core.counters.ignored);
        return;
    };
    if std::mem::take(&mut known.silent) {
        known.greet = Retry::default();
    }
    let hello = match message {
        Message::Hello(hello) => hello,
        _ if known.greeted.is_none() => {
            count(&core.counters.ignored);
            return;
        }
        message => {
            let (name, link) = (Arc::clone(&received.from), known.link.clone());
            let answer = match message {
                Message::Announce(part) => Some(Message::Have(known.inbox.take(&part))),
                Message::Have(position) => told
                    .get_mut(&name)
                    .and_then(|told| told.outbox.have(core.now(), position))
                    .map(Message::Announce),
                Message::Ask { id, time_ms, names } => {
                    let ask = lend::Command::Ask {
                        peer: name,
                        id,
                        time_ms,
                        names,
                    };
                    let busy = core.lender.try_send(ask).is_err();
                    busy.then(|| {
                        count(&core.counters.refused);
                        let reason = "too many requests wait".to_owned();
                        Message::Refused { id, reason }
                    })
                }
                Message::Release { id } => {
                    // When the queue is full the lease ends by its time.
                    let _ = core
                        .lender
                        .try_send(lend::Command::Release { peer: name, id });
                    None
                }
                Message::Lease(lease) => {
                    let id = lease.id;
                    let wanted = core.reply(&name, id, Reply::Lease(lease));
                    (!wanted).then_some(Message::Release { id })
                }
                Message::Refused { id, reason } => {
                    core.reply(&name, id, Reply::Refused(reason));
                    None
                }
                Message::Hello(_) => None,
            };
            out.extend(link.zip(answer));
            return;
        }
    };
    let address = Metadata::from_bytes(&hello.address);
    let own = core.host.transfer_layout();
    let why = if hello.epoch != received.epoch {
        Some("it gives the epoch of another agent".to_owned())
    } else if hello.fingerprint != core.fingerprint {
        let (its, own) = (&hello.fingerprint, &core.fingerprint);
        Some(format!("its blocks are of {its}; accepted: {own}"))
    } else if (hello.layout.layers, hello.layout.run_bytes) != (own.layers, own.run_bytes) {
        Some(format!(
            "its blocks have {} runs of {} bytes; accepted: {} of {}",
            hello.layout.layers, hello.layout.run_bytes, own.layers, own.run_bytes
        ))
    } else {
        address.as_ref().err().map(ToString::to_string)
    };
    if let Some(reason) = why {
        if !std::mem::replace(&mut known.refused, true) {
            count(&core.counters.refused_peers);
            tracing::warn!(peer = %received.from, reason, "no KV blocks are exchanged with this peer");
        }
        known.greeted = None;
        // So that it learns why.
        if let Some(link) = known.link.clone().filter(|_| hello.answer) {
            out.push((link, core.hello(false)));
        }
        return;
    }
    let Ok(address) = address else { return };
    known.refused = false;
    let same = known.greeted.as_ref().is_some_and(|greeted| {
        let (before, _) = &**greeted;
        before.address == hello.address && before.region == hello.region
    });
    match &known.link {
        Some(link) => {
            if hello.answer {
                out.push((link.clone(), core.hello(false)));
            }
            if known.inbox.position() == Position::Unknown {
                out.push((link.clone(), Message::Have(Position::Unknown)));
            }
        }
        // Then it is greeted.
        None => known.dial = Retry::default(),
    }
    if !same {
        known.greeted = Some(Arc::new((hello, address)));
        known.data = None;
        known.dial = Retry::default();
    }
    core.dial.notify_all();
}

/// Notices losses and greets; when to greet again. None when the tier was dropped.
fn look(
    core: &Core,
    told: &mut HashMap<Arc<str>, Told>,
    context: &Context<'_>,
    out: &mut Outgoing,
) -> Option<Option<Duration>> {
    let mut state = core.state.lock();
    if state.stopping {
        return None;
    }
    let now = core.now();
    let mut next = None;
    let mut gone = Vec::new();
    let mut sessions = state.sessions;
    for (name, known) in &mut state.peers {
        if known.is_lost(context) {
            sessions += 1;
            let (metadata, refused) = (known.metadata.clone(), known.refused);
            *known = Known::new(metadata, sessions, core.config.names_max);
            known.refused = refused;
            known.dial.due(now);
            gone.push(Arc::clone(name));
            continue;
        }
        let Some(link) = &known.link else { continue };
        if known.refused || (known.greeted.is_some() && !known.silent) {
            continue;
        }
        if known.greet.due(now) {
            out.push((link.clone(), core.hello(true)));
        }
        next = [next, Some(known.greet.at)].into_iter().flatten().min();
    }
    state.sessions = sessions;
    told.retain(|name, told| {
        let known = state.peers.get(name);
        known.is_some_and(|known| known.session == told.session)
    });
    for (name, known) in &state.peers {
        if known.link.is_some() && known.greeted.is_some() {
            told.entry(Arc::clone(name)).or_insert_with(|| Told {
                session: known.session,
                outbox: Outbox::default(),
                source: None,
                announce_at: now,
            });
        }
    }
    drop(state);
    for name in &gone {
        count(&core.counters.lost);
        tracing::info!(peer = %name, "KV peer lost: its blocks are not found any more");
        core.gone(name);
    }
    if !gone.is_empty() {
        core.dial.notify_all();
    }
    Some(next)
}

/// Tells a peer what is new in G2; when to do so again.
fn announce(
    core: &Core,
    name: &Arc<str>,
    told: &mut Told,
    now: Duration,
    context: &mut Context<'_>,
    out: &mut Outgoing,
) -> Option<Duration> {
    let (feed, link): (EventFeed, Peer) = {
        let state = core.state.lock();
        let feed = state.own.as_ref().map(|(_, feed)| feed.clone())?;
        (feed, state.peers.get(name)?.link.clone()?)
    };
    let mut parts = Vec::from_iter(told.outbox.tick(now));
    if let Some(after) = told.outbox.wants() {
        if now < told.announce_at {
            return Some(told.announce_at);
        }
        if told.source.as_ref().is_none_or(|(seen, _)| *seen != after) {
            told.source = Some((after, feed.subscribe(after)));
        }
        let (seen, source) = told.source.as_mut()?;
        if let Poll::Ready(Some(batch)) = source.poll_next(context) {
            let first = told.outbox.begin(now, batch, core.config.names_max);
            told.announce_at = now + core.config.announce_every;
            if first.is_none() {
                // A snapshot is next.
                told.source = None;
                return Some(told.announce_at);
            }
            *seen = told.outbox.target();
            parts.extend(first);
        }
    }
    out.extend(
        parts
            .into_iter()
            .map(|part| (link.clone(), Message::Announce(part))),
    );
    told.outbox.next_at()
}

/// Connects what is to be connected, until the tier is dropped.
pub(super) fn dial(core: &Core) {
    let mut state = core.state.lock();
    loop {
        if state.stopping {
            return;
        }
        let now = core.now();
        let mut wait = None;
        let mut target = None;
        for (name, known) in &mut state.peers {
            let Some(metadata) = known.missing().cloned() else {
                continue;
            };
            if known.dial.due(now) {
                target = Some((
                    Arc::clone(name),
                    known.session,
                    metadata,
                    known.link.is_none(),
                ));
                break;
            }
            wait = [wait, Some(known.dial.at)].into_iter().flatten().min();
        }
        let Some((name, session, metadata, to_control)) = target else {
            match wait {
                Some(at) => drop(core.dial.wait_for(&mut state, at.saturating_sub(now))),
                None => core.dial.wait(&mut state),
            }
            continue;
        };
        drop(state);
        let (agent, what) = if to_control {
            (&core.control, "control agent")
        } else {
            (&core.agent, "agent of its G2")
        };
        let connected = agent.connect(&metadata, CONNECT_TIME);
        state = core.state.lock();
        let known = state.peers.get_mut(&name);
        let Some(known) = known.filter(|known| known.session == session) else {
            continue;
        };
        match connected {
            Ok(peer) => {
                if to_control {
                    known.link = Some(peer);
                    known.greet = Retry::default();
                } else {
                    known.data = Some(peer);
                }
                known.dial = Retry::default();
            }
            Err(error) => tracing::debug!(peer = %name, %error, what, "not connected"),
        }
        core.wake();
    }
}
