//! A wire between vLLM's publisher and its follower that loses messages.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use anyhow::Result;
use blockplane_engine::vllm::events::Endpoint;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy},
    net::{TcpListener, TcpStream, tcp::OwnedReadHalf, tcp::OwnedWriteHalf},
    sync::Notify,
    task::JoinHandle,
};

/// The wire. It is gone when dropped.
pub(super) struct Proxy {
    pub(super) endpoint: Endpoint,
    state: Arc<State>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct State {
    /// Messages to lose from now on.
    lose: AtomicU32,
    cut: Notify,
}

impl Proxy {
    pub(super) async fn start(publisher: &Endpoint) -> Result<Self> {
        let target = publisher.to_string().replace("tcp://", "");
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let endpoint = format!("tcp://{}", listener.local_addr()?).parse()?;
        let state = Arc::new(State::default());
        let own = Arc::clone(&state);
        let task = tokio::spawn(async move {
            while let Ok((follower, _)) = listener.accept().await {
                let (state, target) = (Arc::clone(&own), target.clone());
                tokio::spawn(async move {
                    tokio::select! {
                        _ = carry(follower, target, &state) => {}
                        () = state.cut.notified() => {}
                    }
                });
            }
        });
        Ok(Self {
            endpoint,
            state,
            task,
        })
    }

    /// The next `messages` are lost.
    pub(super) fn lose(&self, messages: u32) {
        self.state.lose.store(messages, Ordering::SeqCst);
    }

    /// Cuts the connections that there are.
    pub(super) fn cut(&self) {
        self.state.cut.notify_waiters();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
        self.cut();
    }
}

async fn carry(follower: TcpStream, target: String, state: &State) -> std::io::Result<()> {
    let publisher = TcpStream::connect(target).await?;
    let (mut from_follower, to_follower) = follower.into_split();
    let (from_publisher, mut to_publisher) = publisher.into_split();
    tokio::select! {
        result = copy(&mut from_follower, &mut to_publisher) => result.map(|_| ()),
        result = messages(from_publisher, to_follower, state) => result,
    }
}

/// The greeting and the commands pass; messages pass or are lost as a whole.
async fn messages(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    state: &State,
) -> std::io::Result<()> {
    let mut greeting = [0; 64];
    from.read_exact(&mut greeting).await?;
    to.write_all(&greeting).await?;
    let mut message = Vec::new();
    loop {
        let flags = from.read_u8().await?;
        message.push(flags);
        let len = if flags & 2 == 0 {
            let len = from.read_u8().await?;
            message.push(len);
            u64::from(len)
        } else {
            let len = from.read_u64().await?;
            message.extend_from_slice(&len.to_be_bytes());
            len
        };
        (&mut from).take(len).read_to_end(&mut message).await?;
        let (more, command) = (flags & 1 != 0, flags & 4 != 0);
        if more {
            continue;
        }
        let fewer = |left: u32| left.checked_sub(1);
        let lost = !command
            && state
                .lose
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, fewer)
                .is_ok();
        if !lost {
            to.write_all(&message).await?;
        }
        message.clear();
    }
}
