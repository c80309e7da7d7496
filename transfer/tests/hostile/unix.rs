//! Liars on the same host: descriptors where none belong, and nonsense in shared memory.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use blockplane_transfer::{Agent, AgentConfig, Lane};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::random::Random;
use crate::wire::*;
use crate::{WAIT, alone};

/// An agent with a socket in a folder of its own.
struct Victim {
    agent: Agent,
    folder: PathBuf,
    socket: PathBuf,
}

impl Victim {
    fn new() -> Self {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = format!("bp-hostile-{}-{number}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        std::fs::create_dir(&folder).unwrap();
        let mut config = AgentConfig::new("victim").with_lanes([Lane::Shm]);
        config.socket_dir = folder.clone();
        config.notifications_max = 16;
        let agent = Agent::new(config).unwrap();
        let socket = std::fs::read_dir(&folder).unwrap().next().unwrap();
        let socket = socket.unwrap().path();
        Self {
            agent,
            folder,
            socket,
        }
    }

    /// A connection that said hello, and the descriptors that came with the answer.
    fn enter(&self, nonce: Option<u64>) -> (UnixStream, Vec<OwnedFd>, u64) {
        let socket = UnixStream::connect(&self.socket).unwrap();
        socket.set_read_timeout(Some(WAIT)).unwrap();
        let hello = Hello {
            nonce,
            to: "victim",
            epoch: self.agent.epoch(),
        };
        send_with(&socket, &hello.encode(), &[]);
        let mut received = Vec::new();
        let mut files = Vec::new();
        // WELCOME; behind it, on a control connection, RING and BELL with a descriptor each.
        let whole = if nonce.is_some() { 48 } else { 48 + 24 + 32 };
        while received.len() < whole {
            let (bytes, more) = receive_with(&socket);
            assert!(!bytes.is_empty(), "the victim closed the connection");
            received.extend(bytes);
            files.extend(more);
        }
        assert_eq!(received[0], WELCOME);
        (socket, files, nonce_of(&received[HEADER_BYTES..]))
    }

    fn serves(&self) {
        let mut config = AgentConfig::new("friend").with_lanes([Lane::Shm]);
        config.socket_dir = self.folder.clone();
        let friend = Agent::new(config).unwrap();
        let peer = friend.connect(&self.agent.metadata(), WAIT).unwrap();
        friend
            .notify(&peer, "hello", WAIT)
            .unwrap()
            .wait(WAIT)
            .unwrap();
        let notes = self.agent.notifications();
        while &*notes.recv_timeout(WAIT).unwrap().from != "friend" {}
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn send_with(socket: &UnixStream, bytes: &[u8], files: &[&OwnedFd]) -> bool {
    let files: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); 256];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
    }
    sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )
    .is_ok()
}

fn receive_with(socket: &UnixStream) -> (Vec<u8>, Vec<OwnedFd>) {
    let mut bytes = [0; 4096];
    let mut space = [MaybeUninit::uninit(); 256];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )
    .unwrap();
    let files = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(files) => Some(files),
            _ => None,
        })
        .flatten()
        .collect();
    (bytes[..got.bytes].to_vec(), files)
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn descriptors_that_nobody_asked_for_are_closed() {
    let _alone = alone();
    let victim = Victim::new();
    let gift: OwnedFd = File::open("/dev/null").unwrap().into();
    let (control, _files, nonce) = victim.enter(None);
    let (data, _none, _) = victim.enter(Some(nonce));
    let before = descriptors();
    for _ in 0..200 {
        let gifts = [&gift; 4];
        assert!(send_with(&control, &frame(PING, 0, 0, b""), &gifts));
        let cancel = frame(READ_CANCEL, 1, 0, b"");
        assert!(send_with(&data, &cancel, &gifts));
    }
    // Answered behind all of them.
    send_with(&control, &frame(ASK_REGION, 1, 3, b""), &[]);
    let mut control = control;
    assert_eq!(receive(&mut control).unwrap().part, 3);
    let after = descriptors();
    assert!(after <= before, "{before} descriptors became {after}");
    victim.serves();
}

#[test]
fn descriptors_before_the_hello_are_closed() {
    let _alone = alone();
    let victim = Victim::new();
    let gift: OwnedFd = File::open("/dev/null").unwrap().into();
    let before = descriptors();
    for _ in 0..50 {
        let socket = UnixStream::connect(&victim.socket).unwrap();
        // Begins like a hello and never ends.
        send_with(&socket, &header(HELLO, 0, 100, 0, 0), &[&gift; 4]);
        send_with(&socket, &[0; 10], &[&gift; 4]);
    }
    victim.serves();
    let started = std::time::Instant::now();
    while descriptors() > before {
        assert!(started.elapsed() < WAIT, "{} descriptors", descriptors());
        std::thread::yield_now();
    }
}

/// The owner of a ring reads what a peer has written there, whatever it is.
#[test]
fn nonsense_in_shared_memory_is_lost_and_nothing_else() {
    const HEAD: u64 = 64;
    const TAIL: u64 = 128;
    const DATA_AT: u64 = 4096;
    let _alone = alone();
    let victim = Victim::new();
    let notes = victim.agent.notifications();
    for seed in 0..300 {
        let mut random = Random::new(seed);
        let (control, files, _) = victim.enter(None);
        let [ring, bell] = &files[..] else {
            panic!("{} descriptors instead of two", files.len());
        };
        let [ring, bell] = [ring, bell].map(|file| File::from(file.try_clone().unwrap()));
        let put = |file: &File, at: u64, value: u64| {
            file.write_all_at(&value.to_le_bytes(), at).unwrap();
        };
        for _ in 0..1 + random.below(4) {
            match random.below(7) {
                // Ahead of everything, backwards, a little ahead of nothing.
                0 => put(&ring, HEAD, random.next()),
                1 => put(&ring, HEAD, random.below(64)),
                // Lengths beyond the record, the ring, everything.
                2 => {
                    put(&ring, DATA_AT, random.next() >> random.below(64));
                    put(&ring, HEAD, random.below(1 << 20));
                }
                3 => put(&ring, TAIL, random.next()),
                // What was read once is not read again.
                4 => put(&ring, random.below(4) * 8, random.next()),
                5 => put(&bell, random.below(2) * 4, random.next()),
                _ => put(&bell, 64 + random.below(16) * 8, random.next()),
            }
        }
        // Every ring says that it has something.
        for word in 0..16 {
            put(&bell, 64 + word * 8, u64::MAX);
        }
        for _ in 0..40 {
            let note = notes.try_recv().unwrap();
            // A record of nothing but zeros is an empty notification.
            assert!(note.is_none_or(|note| &*note.from == "liar"));
        }
        drop(control);
        if seed % 20 == 0 {
            victim.serves();
        }
    }
    victim.serves();
    assert_eq!(victim.agent.stats().peers, 0);
}

/// Memory files of a peer that are not what they should be.
#[test]
fn memory_files_that_are_not_sealed_are_not_mapped() {
    let _alone = alone();
    let victim = Victim::new();
    let (_control, files, _) = victim.enter(None);
    for file in files {
        // What the victim hands out itself cannot be cut off under it.
        let file = File::from(file);
        let bytes = file.metadata().unwrap().len();
        assert!(file.set_len(0).is_err(), "it shrinks");
        assert!(file.set_len(bytes * 2).is_err(), "it grows");
    }
    victim.serves();
}
