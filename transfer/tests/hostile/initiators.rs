//! Initiators that lie to an honest target.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use crate::count::peak;
use crate::random::Random;
use crate::victim::{BYTES, HELLO_WITHIN, Victim};
use crate::wire::*;
use crate::{WAIT, alone};

const MIB: usize = 1 << 20;

/// The socket takes no more: the victim has stopped to listen.
fn impatient(socket: &std::net::TcpStream) {
    socket
        .set_write_timeout(Some(Duration::from_millis(300)))
        .unwrap();
}

#[test]
fn reads_with_long_lists_that_nobody_fetches_are_bounded() {
    let _alone = alone();
    let victim = Victim::new();
    let (_control, mut data) = victim.enter();
    impatient(&data);
    // 40 bytes that name two million blocks, with twice the same so that it is no single run.
    let spans = [(0, 1000); 2000];
    let stripe = Stripe {
        ids: Ids::Spans(&spans),
        range: (0, 128_000_000),
        ..victim.stripe(0)
    };
    let read = frame(READ, 1, 0, &stripe.encode());
    let used = peak(|| {
        pour(&mut data, &read, 100);
        victim.serves();
    });
    assert!(used < 200 * MIB, "{} MiB", used / MIB);
}

#[test]
fn questions_whose_answers_nobody_reads_are_bounded() {
    let _alone = alone();
    let victim = Victim::new();
    let lie = Stripe {
        region: 1,
        ..victim.stripe(0)
    };
    let lies = [READ, WRITE].map(|kind| frame(kind, 1, 0, &lie.encode()));
    let on_data = lies.map(|frame| frame.repeat(200));
    let ask = frame(ASK_REGION, victim.regions[0].id().0, 1, b"");
    let note = frame(NOTIFY, 1, 0, &[1; 1000]);
    let on_control = [ask, note].map(|frame| frame.repeat(200));
    let used = peak(|| {
        for frames in &on_data {
            let (_control, mut data) = victim.enter();
            impatient(&data);
            pour(&mut data, frames, 10_000);
        }
        victim.serves();
    });
    assert!(used < 50 * MIB, "{} MiB", used / MIB);
    let used = peak(|| {
        for frames in &on_control {
            let (mut control, _data) = victim.enter();
            impatient(&control);
            pour(&mut control, frames, 3000);
        }
        victim.serves();
    });
    // The control connection may pile up 64 MiB before it is given up.
    assert!(used < 250 * MIB, "{} MiB", used / MIB);
}

#[test]
fn layouts_without_end_cost_no_time() {
    let _alone = alone();
    let victim = Victim::new();
    let (_control, mut data) = victim.enter();
    let ids = vec![0; 1 << 20];
    let endless = Stripe {
        window: Some(victim.window.id().0),
        layers: u32::MAX,
        layer_stride: 0,
        run_bytes: 1,
        range: (0, 1),
        ids: Ids::List(&ids),
        ..victim.stripe(1)
    };
    let nested = Stripe {
        layers: 1,
        inner: &[(u32::MAX, 0), (1 << 10, 0)],
        ..endless.clone()
    };
    let beyond = Stripe {
        inner: &[(u32::MAX, 0); 3],
        ..endless.clone()
    };
    // As many runs as there can be, all of them inside of the window; and more.
    for stripe in [&endless, &nested, &beyond] {
        data.write_all(&frame(READ, 1, 0, &stripe.encode()))
            .unwrap();
        let answer = receive(&mut data).unwrap();
        assert_eq!((answer.kind, answer.id), (READ_DONE, 1));
        assert_ne!(answer.code, 0);
    }
    // The same without a window is only ever looked at in part.
    let open = Stripe {
        region: victim.regions[0].id().0,
        window: None,
        range: (0, 1 << 30),
        ..endless
    };
    data.write_all(&frame(READ, 2, 0, &open.encode())).unwrap();
    let open = Stripe {
        region: open.region,
        window: None,
        range: open.range,
        ..nested
    };
    data.write_all(&frame(READ, 3, 0, &open.encode())).unwrap();
    victim.serves();
    drop(data);
    victim.serves();
}

#[test]
fn those_who_never_say_hello_make_room() {
    let _alone = alone();
    let victim = Victim::new();
    let hello = victim.hello(None);
    let started = Instant::now();
    let mut slow: Vec<_> = (0..300).map(|_| victim.dial()).collect();
    // A byte now and then does not help them.
    let mut at = 0;
    while started.elapsed() < HELLO_WITHIN * 2 && at < hello.len() - 1 {
        for socket in &mut slow {
            let _ = socket.write_all(&hello[at..=at]);
        }
        at += 1;
        std::thread::park_timeout(Duration::from_millis(5));
    }
    victim.serves();
    for mut socket in slow {
        let mut byte = [0];
        assert!(
            !matches!(socket.read(&mut byte), Ok(1)),
            "a connection without a hello is answered"
        );
    }
}

/// Honest exchanges, of which pieces are cut out, doubled, spoilt and mixed.
fn corpus(victim: &Victim) -> Vec<(bool, Vec<u8>)> {
    let (open, guarded) = (victim.stripe(0), victim.stripe(1));
    let through = Stripe {
        window: Some(victim.window.id().0),
        ..guarded.clone()
    };
    let spans = Stripe {
        ids: Ids::Spans(&[(0, 4), (8, 4)]),
        range: (0, 512),
        ..open.clone()
    };
    let layered = Stripe {
        layers: 4,
        layer_stride: 16,
        run_bytes: 16,
        ..open.clone()
    };
    let payload = |id, bytes: usize| frame(DATA, id, 0, &vec![9; bytes]);
    let write = |id, stripe: &Stripe<'_>| frame(WRITE, id, 0, &stripe.encode());
    let read = |id, stripe: &Stripe<'_>| frame(READ, id, 0, &stripe.encode());
    let region = victim.regions[0].id().0;
    vec![
        (true, [write(1, &open), payload(1, 64)].concat()),
        (
            true,
            [write(2, &spans), payload(2, 256), payload(2, 256)].concat(),
        ),
        (
            true,
            [
                write(3, &open),
                payload(3, 32),
                frame(WRITE_ABORT, 3, 0, b""),
            ]
            .concat(),
        ),
        (
            true,
            [
                write(4, &layered),
                payload(4, 64),
                frame(NOTIFY, 4, 0, b"note"),
            ]
            .concat(),
        ),
        (true, [write(5, &guarded), payload(5, 64)].concat()),
        (true, [write(6, &through), payload(6, 64)].concat()),
        (
            true,
            [read(7, &through), frame(READ_CANCEL, 7, 0, b"")].concat(),
        ),
        (true, read(8, &spans)),
        (true, read(9, &guarded)),
        (false, frame(ASK_REGION, region, 1, b"")),
        (false, frame(ASK_REGION, victim.regions[2].id().0, 2, b"")),
        (false, frame(ASK_WINDOW, victim.window.id().0, 3, b"")),
        (false, frame(WINDOW_QUIET, victim.window.id().0, 0, b"")),
        (false, frame(NOTIFY, 10, 0, b"a notification")),
        (false, frame(PING, 0, 0, b"")),
        (false, victim.hello(None)),
    ]
}

/// Spoils bytes in one of the ways in which a peer can.
fn spoil(random: &mut Random, corpus: &[(bool, Vec<u8>)], bytes: &mut Vec<u8>) {
    for _ in 0..=random.below(4) {
        let at = random.index(bytes.len().max(1));
        match random.below(8) {
            0 => bytes.truncate(at),
            1 => {
                let other = &corpus[random.index(corpus.len())].1;
                bytes.splice(at..at, other.iter().copied());
            }
            2 => bytes.extend_from_within(..),
            3 if bytes.len() >= 8 => {
                // A length, an id, a count: the fields are of these sizes.
                let width = [1, 2, 4, 8][random.index(4)];
                let at = random.index(bytes.len() - width + 1);
                let value = [
                    0,
                    1,
                    0x7f,
                    0xff,
                    u64::from(u32::MAX),
                    1 << 24,
                    u64::MAX,
                    1 << 63,
                ][random.index(8)];
                bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
            }
            4 => bytes.rotate_left(at),
            5 => bytes
                .drain(at..(at + random.index(32)).min(bytes.len()))
                .for_each(drop),
            _ => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << random.below(8);
                }
            }
        }
    }
}

#[test]
fn thousands_of_spoilt_exchanges_hurt_nobody() {
    const CASES: u64 = 3000;
    let _alone = alone();
    let victim = Victim::new();
    let corpus = corpus(&victim);
    let used = peak(|| {
        for case in 0..CASES {
            let mut random = Random::new(case);
            let (on_data, mut bytes) = corpus[random.index(corpus.len())].clone();
            spoil(&mut random, &corpus, &mut bytes);
            if random.chance(10) {
                // Before the hello.
                let _ = victim.dial().write_all(&bytes);
                continue;
            }
            let (mut control, mut data) = victim.enter();
            let socket = if on_data { &mut data } else { &mut control };
            for piece in bytes.chunks(1 + random.index(bytes.len().max(1))) {
                let _ = socket.write_all(piece);
            }
            // The end of one is the end of both, with whatever is half received.
            if random.chance(50) {
                drop(data);
            }
            assert!(victim.is_untouched(), "case {case}");
        }
    });
    assert!(used < 100 * MIB, "{} MiB", used / MIB);
    victim.serves();
    let started = Instant::now();
    while victim.agent.stats().peers > 0 {
        assert!(started.elapsed() < WAIT);
    }
    // Everything honest still is.
    let (mut control, mut data) = victim.enter();
    data.write_all(&frame(WRITE, 1, 0, &victim.stripe(0).encode()))
        .unwrap();
    data.write_all(&frame(DATA, 1, 0, &[5; 64])).unwrap();
    let done = receive(&mut data).unwrap();
    assert_eq!((done.kind, done.code), (STRIPE_DONE, 0));
    control
        .write_all(&frame(ASK_REGION, victim.regions[0].id().0, 7, b""))
        .unwrap();
    let region = receive(&mut control).unwrap();
    assert_eq!((region.kind, region.part), (REGION, 7));
    assert_eq!(region.body[..8], (BYTES as u64).to_le_bytes());
}
