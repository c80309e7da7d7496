//! The other side of the sockets: a PUB and a ROUTER, as far as these tests need them.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::broadcast,
    task::JoinHandle,
};

use super::super::socket::Endpoint;

/// Numbered payloads, as they are kept for replays.
type Kept = Arc<Mutex<VecDeque<(u64, Vec<u8>)>>>;

/// A publisher with its replay endpoint, on free ports of this machine.
pub(super) struct Publisher {
    pub(super) endpoint: Endpoint,
    pub(super) replay: Endpoint,
    live: broadcast::Sender<(u64, Vec<u8>)>,
    kept: Kept,
    tasks: Vec<JoinHandle<()>>,
}

impl Publisher {
    pub(super) async fn start() -> Self {
        let sub = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let router = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (endpoint, replay) = (endpoint(&sub), endpoint(&router));
        let (live, _) = broadcast::channel(1_000);
        let kept = Kept::default();
        let tasks = vec![
            tokio::spawn(publish(sub, live.clone())),
            tokio::spawn(answer(router, Arc::clone(&kept))),
        ];
        Self {
            endpoint,
            replay,
            live,
            kept,
            tasks,
        }
    }

    /// Kept for replays, and sent to those who are connected unless it is `lost`.
    pub(super) fn publish(&self, number: u64, payload: &[u8], lost: bool) {
        let message = (number, payload.to_vec());
        self.kept.lock().unwrap().push_back(message.clone());
        if !lost {
            let _nobody_may_listen = self.live.send(message);
        }
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

pub(super) fn endpoint(listener: &TcpListener) -> Endpoint {
    Endpoint::Tcp {
        host: "127.0.0.1".into(),
        port: listener.local_addr().unwrap().port(),
    }
}

pub(super) fn frame(flags: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = match u8::try_from(body.len()) {
        Ok(len) => vec![flags, len],
        Err(_) => [&[flags | 2][..], &(body.len() as u64).to_be_bytes()].concat(),
    };
    bytes.extend_from_slice(body);
    bytes
}

/// The greeting and READY of a socket of this type, as libzmq writes them.
pub(super) fn greeting(kind: &[u8]) -> Vec<u8> {
    let mut hello = vec![0; 64];
    (hello[0], hello[8], hello[9], hello[10], hello[11]) = (0xFF, 1, 0x7F, 3, 1);
    hello[12..16].copy_from_slice(b"NULL");
    let mut ready = b"\x05READY\x0BSocket-Type".to_vec();
    ready.extend_from_slice(&u32::try_from(kind.len()).unwrap().to_be_bytes());
    ready.extend_from_slice(kind);
    hello.extend(frame(4, &ready));
    hello
}

/// Shakes hands, and returns the first message that the other side sends.
async fn accept(stream: &mut TcpStream, kind: &[u8]) -> std::io::Result<Vec<Vec<u8>>> {
    stream.write_all(&greeting(kind)).await?;
    stream.read_exact(&mut [0; 64]).await?;
    let _ready = read_frame(stream).await?;
    let mut frames = Vec::new();
    loop {
        let (flags, body) = read_frame(stream).await?;
        frames.push(body);
        if flags & 1 == 0 {
            return Ok(frames);
        }
    }
}

/// Short ones only.
async fn read_frame(stream: &mut TcpStream) -> std::io::Result<(u8, Vec<u8>)> {
    let mut head = [0; 2];
    stream.read_exact(&mut head).await?;
    let mut body = vec![0; usize::from(head[1])];
    stream.read_exact(&mut body).await?;
    Ok((head[0], body))
}

async fn publish(listener: TcpListener, live: broadcast::Sender<(u64, Vec<u8>)>) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let mut live = live.subscribe();
        tokio::spawn(async move {
            let subscription = accept(&mut stream, b"PUB").await?;
            assert_eq!(subscription, [b"\x01kv"]);
            stream
                .write_all(&frame(4, b"\x04PING\x00\x64hello"))
                .await?;
            while let Ok((number, payload)) = live.recv().await {
                let mut bytes = frame(1, b"kv");
                bytes.extend(frame(1, &number.to_be_bytes()));
                bytes.extend(frame(0, &payload));
                stream.write_all(&bytes).await?;
            }
            std::io::Result::Ok(())
        });
    }
}

async fn answer(listener: TcpListener, kept: Kept) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let Ok(request) = accept(&mut stream, b"ROUTER").await else {
            continue;
        };
        assert_eq!((request.len(), request[0].len()), (2, 0));
        let from = u64::from_be_bytes(request[1][..].try_into().unwrap());
        let mut messages: Vec<(u64, Vec<u8>)> = kept.lock().unwrap().iter().cloned().collect();
        messages.retain(|(number, _)| *number >= from);
        messages.push((u64::MAX, Vec::new()));
        let mut bytes = Vec::new();
        for (number, payload) in messages {
            let topic: &[u8] = if number == u64::MAX { b"" } else { b"kv" };
            bytes.extend(frame(1, b""));
            bytes.extend(frame(1, topic));
            bytes.extend(frame(1, &number.to_be_bytes()));
            bytes.extend(frame(0, &payload));
        }
        let _it_may_have_left = stream.write_all(&bytes).await;
    }
}
