//! What only connections with streams have: credits, and orders of frames that a full socket makes.

use blockplane_transfer::{AgentConfig, Lane, Op, PostOptions};

use crate::support::{Blocks, Setup, WAIT, arena, bytes, fill, oracle, scattered};

fn pair(change: impl Fn(&mut AgentConfig)) -> crate::support::Pair {
    Setup::new(Lane::Tcp).pair_with(|config| {
        config.tcp_streams = 1;
        change(config);
    })
}

#[test]
fn reads_beyond_what_the_peer_holds_open_wait_their_turn() {
    let pair = pair(|config| config.peer_reads_max = 2);
    let (local, remote) = (arena(&pair.a, 64 * 5000), arena(&pair.b, 64 * 5000));
    fill(&local, 1);
    fill(&remote, 2);
    let (mut expected, from) = (bytes(&local), bytes(&remote));
    let posted: Vec<_> = (0..64u32)
        .map(|id| {
            let (to, at) = (
                Blocks::flat(64, 5000, &[63 - id]),
                Blocks::flat(64, 5000, &[id]),
            );
            oracle(&from, &at, &mut expected, &to);
            let prepared = pair.prepare(Op::Read, (&local, &to), (&remote, &at), None);
            prepared.unwrap().post(PostOptions::within(WAIT)).unwrap()
        })
        .collect();
    // One in the middle is called off while it waits, or a little later.
    for (id, transfer) in posted.into_iter().enumerate() {
        if id == 40 {
            let _ = transfer.cancel();
        } else {
            transfer.wait(WAIT).unwrap();
        }
    }
    let all = Blocks::flat(64, 5000, &[63 - 40]);
    let again = pair.prepare(
        Op::Read,
        (&local, &all),
        (&remote, &Blocks::flat(64, 5000, &[40])),
        None,
    );
    let again = again.unwrap().post(PostOptions::within(WAIT)).unwrap();
    again.wait(WAIT).unwrap();
    assert!(bytes(&local) == expected);
    assert!(pair.peer.is_connected());
}

/// A READ that waits for its turn is called off in the moment in which its turn comes: those behind
/// it do not wait for ever.
#[test]
fn a_read_that_is_called_off_leaves_its_turn_to_the_next() {
    let pair = pair(|config| config.peer_reads_max = 1);
    let (local, remote) = (arena(&pair.a, 64 << 10), arena(&pair.b, 64 << 10));
    let prepared: Vec<_> = (0..3)
        .map(|id| {
            let block = Blocks::flat(4, 16 << 10, &[id]);
            let prepared = pair.prepare(Op::Read, (&local, &block), (&remote, &block), None);
            prepared.unwrap()
        })
        .collect();
    for round in 0..500u32 {
        let options = || PostOptions::within(WAIT * 2);
        let posted: Vec<_> = prepared
            .iter()
            .map(|prepared| prepared.post(options()).unwrap())
            .collect();
        let [first, second, third] = <[_; 3]>::try_from(posted).unwrap();
        for _ in 0..round {
            std::hint::spin_loop();
        }
        second.request_cancel();
        first.wait(WAIT).unwrap();
        third.wait(WAIT).unwrap();
        let _ = second.cancel();
    }
}

/// Small kernel buffers: frames are sent and received in pieces of any size, in both directions of
/// one stream at once.
#[test]
fn small_buffers_tear_frames_and_nothing_is_lost() {
    let pair = pair(|config| {
        config.tcp_send_buffer_bytes = Some(4096);
        // Above the size of a segment, or the kernel waits for its timers.
        config.tcp_receive_buffer_bytes = Some(128 << 10);
        config.stream_chunk_bytes = 4096;
    });
    let (local, remote) = (arena(&pair.a, 128 * 4000), arena(&pair.b, 128 * 4000));
    fill(&local, 1);
    fill(&remote, 2);
    let (mut l, mut r) = (bytes(&local), bytes(&remote));
    // Writes from the first half into the first half, reads from the second into the second.
    let half = |from: u32, count, seed| {
        let ids: Vec<u32> = scattered(64, count, seed)
            .iter()
            .map(|id| id + from)
            .collect();
        Blocks::flat(128, 4000, &ids)
    };
    let mut posted = Vec::new();
    for turn in 0..6 {
        // The same blocks each turn: the order in which operations end does not matter.
        let (from, to) = (half(0, 60, 1), half(0, 60, 2));
        let write = pair.prepare(Op::Write, (&local, &from), (&remote, &to), None);
        let options = PostOptions::within(WAIT).notify(format!("{turn}"));
        posted.push(write.unwrap().post(options).unwrap());
        let (into, at) = (half(64, 60, 3), half(64, 60, 4));
        let read = pair.prepare(Op::Read, (&local, &into), (&remote, &at), None);
        posted.push(read.unwrap().post(PostOptions::within(WAIT)).unwrap());
    }
    for transfer in posted {
        transfer.wait(WAIT).unwrap();
    }
    let (l0, r0) = (l.clone(), r.clone());
    oracle(&l0, &half(0, 60, 1), &mut r, &half(0, 60, 2));
    oracle(&r0, &half(64, 60, 4), &mut l, &half(64, 60, 3));
    assert!(bytes(&local) == l && bytes(&remote) == r);
    let received = pair.b.notifications();
    for turn in 0..6 {
        let next = received.recv_timeout(WAIT).unwrap();
        assert_eq!(next.payload, format!("{turn}"));
    }
}
