//! `GET /metrics` over HTTP/1.1, on a thread of its own.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use thiserror::Error;

/// Longest head of a request.
const HEAD_MAX: usize = 8 << 10;
/// Time for a request to arrive, and for an answer to be taken.
const REQUEST_TIME: Duration = Duration::from_secs(2);

/// Why metrics cannot be served.
#[derive(Debug, Error)]
pub enum MetricsError {
    /// The address has no meaning on this machine.
    #[error("metrics cannot be served at {host}:{port}: the host has no address")]
    Address {
        /// The host.
        host: String,
        /// The port.
        port: u16,
    },
    /// The port cannot be had.
    #[error(
        "metrics cannot be served at {host}:{port}: {source}; set DYN_KVBM_METRICS_PORT (or \
         DYN_KVBM_METRICS_HOST) to one that is free, or DYN_KVBM_METRICS=false"
    )]
    Bind {
        /// The host.
        host: String,
        /// The port.
        port: u16,
        /// What the system said.
        source: io::Error,
    },
}

/// Serves metrics until it is dropped. One request at a time: a client that stops in the middle of
/// one delays others by 2 s at most.
#[derive(Debug)]
pub struct MetricsServer {
    address: SocketAddr,
    stopped: Arc<AtomicBool>,
}

impl MetricsServer {
    /// Listens at `host` and `port` (0: any that is free) and answers with what `text` returns.
    ///
    /// # Errors
    /// The port cannot be had.
    pub fn start(
        host: &str,
        port: u16,
        text: impl Fn() -> String + Send + 'static,
    ) -> Result<Self, MetricsError> {
        let bind = |source| MetricsError::Bind {
            host: host.to_owned(),
            port,
            source,
        };
        let mut addresses = (host, port).to_socket_addrs().map_err(bind)?;
        let address = addresses.next().ok_or_else(|| MetricsError::Address {
            host: host.to_owned(),
            port,
        })?;
        let listener = TcpListener::bind(address).map_err(bind)?;
        let address = listener.local_addr().map_err(bind)?;
        let stopped = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stopped);
        std::thread::Builder::new()
            .name("kvbm-metrics".to_owned())
            .spawn(move || serve(&listener, &seen, &text))
            .map_err(bind)?;
        Ok(Self { address, stopped })
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Release);
        let mut address = self.address;
        if address.ip().is_unspecified() {
            address.set_ip(match address {
                SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
            });
        }
        // Wakes the thread, which sees that it is to stop. If that fails it ends with the process.
        let _ = TcpStream::connect_timeout(&address, Duration::from_millis(100));
    }
}

fn serve(listener: &TcpListener, stopped: &AtomicBool, text: &dyn Fn() -> String) {
    for connection in listener.incoming() {
        if stopped.load(Ordering::Acquire) {
            return;
        }
        // Whoever goes away in the middle has no use for the answer.
        match connection {
            Ok(mut connection) => {
                if let Err(error) = answer(&mut connection, text) {
                    tracing::debug!(%error, "a request for metrics was not answered");
                }
            }
            Err(error) => tracing::warn!(%error, "a request for metrics was not accepted"),
        }
    }
}

fn answer(connection: &mut TcpStream, text: &dyn Fn() -> String) -> io::Result<()> {
    let until = Instant::now() + REQUEST_TIME;
    connection.set_write_timeout(Some(REQUEST_TIME))?;
    let head = head(connection, until)?;
    let mut words = head.split(' ');
    let (method, target) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    let path = target.split('?').next().unwrap_or(target);
    let (status, body) = match (method, path) {
        ("GET" | "HEAD", "/metrics") => ("200 OK", text()),
        ("GET" | "HEAD", _) => ("404 Not Found", "metrics are at /metrics\n".to_owned()),
        _ => ("405 Method Not Allowed", "accepted: GET\n".to_owned()),
    };
    let answer = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n",
        body.len()
    );
    connection.write_all(answer.as_bytes())?;
    if method != "HEAD" {
        connection.write_all(body.as_bytes())?;
    }
    Ok(())
}

/// The request up to its empty line.
fn head(connection: &mut TcpStream, until: Instant) -> io::Result<String> {
    let mut head = Vec::new();
    let mut piece = [0; 1024];
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() || head.len() > HEAD_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        connection.set_read_timeout(Some(left))?;
        match connection.read(&mut piece)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => head.extend_from_slice(&piece[..count]),
        }
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(address: SocketAddr, request: &str) -> String {
        let mut connection = TcpStream::connect(address).unwrap();
        connection.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn metrics_are_served_and_nothing_else() {
        let server = MetricsServer::start("127.0.0.1", 0, || "kvbm_x 1\n".to_owned()).unwrap();
        let address = server.address();
        let answer = ask(address, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(
            answer.contains("version=0.0.4") && answer.ends_with("\r\n\r\nkvbm_x 1\n"),
            "{answer}"
        );
        assert!(answer.contains("Content-Length: 9\r\n"));
        assert!(ask(address, "HEAD /metrics HTTP/1.1\r\n\r\n").ends_with("\r\n\r\n"));
        assert!(ask(address, "GET / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
        assert!(ask(address, "POST /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405"));
        // A client that says nothing, or too much, takes the server from nobody.
        drop(TcpStream::connect(address).unwrap());
        let mut long = TcpStream::connect(address).unwrap();
        let _ = long.write_all(&[b'x'; 4 * HEAD_MAX]);
        assert!(ask(address, "GET /metrics HTTP/1.1\r\n\r\n").contains("200 OK"));
    }

    #[test]
    fn a_port_that_is_taken_is_an_error_that_says_so() {
        let server = MetricsServer::start("127.0.0.1", 0, String::new).unwrap();
        let port = server.address().port();
        let error = MetricsServer::start("127.0.0.1", port, String::new).unwrap_err();
        let message = error.to_string();
        assert!(message.contains(&format!("127.0.0.1:{port}")), "{message}");
        assert!(message.contains("DYN_KVBM_METRICS_PORT"), "{message}");
    }
}
