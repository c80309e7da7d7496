//! A stand-in for S3 on loopback: just enough HTTP for the client, with faults on demand.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use crate::support::WAIT;

/// What the server does instead of answering properly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Answers with this status.
    Status(u16),
    /// Does not answer until the server is dropped.
    Silence,
    /// Promises the whole body and closes in the middle of it.
    HalfBody,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Vec<u8>>,
    uploads: HashMap<String, BTreeMap<u32, Vec<u8>>>,
    /// Faults of the next requests of a method, first to last.
    faults: Vec<(String, Fault)>,
    /// Method and path of all requests.
    log: Vec<String>,
}

struct Shared {
    state: Mutex<State>,
    uploads: AtomicUsize,
    stop: AtomicBool,
    changed: Condvar,
    now: AtomicUsize,
    most: AtomicUsize,
}

/// The server; one thread a connection.
pub(crate) struct Server {
    shared: Arc<Shared>,
    address: SocketAddr,
}

impl Server {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            uploads: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            changed: Condvar::new(),
            now: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
        });
        let accepting = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if accepting.stop.load(Ordering::Acquire) {
                    return;
                }
                let (shared, stream) = (accepting.clone(), stream.unwrap());
                // A connection that breaks is what some tests are about.
                std::thread::spawn(move || shared.serve(stream).ok());
            }
        });
        Self { shared, address }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The next requests of `method` fail like this.
    pub(crate) fn fail(&self, method: &str, fault: Fault, times: usize) {
        let mut state = self.shared.state.lock().unwrap();
        let faults = std::iter::repeat_n((method.to_owned(), fault), times);
        state.faults.extend(faults);
    }

    pub(crate) fn object(&self, path: &str) -> Option<Vec<u8>> {
        let state = self.shared.state.lock().unwrap();
        state.objects.get(path).cloned()
    }

    pub(crate) fn put(&self, path: &str, bytes: Vec<u8>) {
        let mut state = self.shared.state.lock().unwrap();
        state.objects.insert(path.to_owned(), bytes);
    }

    /// Requests so far whose method and path contain `text`.
    pub(crate) fn seen(&self, text: &str) -> usize {
        let state = self.shared.state.lock().unwrap();
        state.log.iter().filter(|line| line.contains(text)).count()
    }

    /// Waits until `count` requests with `text` have come.
    pub(crate) fn wait_for(&self, text: &str, count: usize) {
        let state = self.shared.state.lock().unwrap();
        let (_state, late) = self
            .shared
            .changed
            .wait_timeout_while(state, WAIT, |state| {
                state.log.iter().filter(|line| line.contains(text)).count() < count
            })
            .unwrap();
        assert!(!late.timed_out(), "no request with {text:?}");
    }

    /// Uploads that were neither completed nor called off.
    pub(crate) fn open_uploads(&self) -> usize {
        self.shared.state.lock().unwrap().uploads.len()
    }

    /// Most requests that were under way at one time.
    pub(crate) fn most_at_a_time(&self) -> usize {
        self.shared.most.load(Ordering::Acquire)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.changed.notify_all();
        // Lets the accepting thread see it.
        let _ = TcpStream::connect(self.address);
    }
}

struct Request {
    method: String,
    path: String,
    query: String,
    headers: HashMap<String, String>,
    body: Vec<u8>,
}

struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl Answer {
    fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: body.into(),
        }
    }
}

impl Shared {
    fn serve(&self, stream: TcpStream) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut writer = stream;
        while let Some(request) = read(&mut reader)? {
            let now = self.now.fetch_add(1, Ordering::AcqRel) + 1;
            self.most.fetch_max(now, Ordering::AcqRel);
            let fault = {
                let mut state = self.state.lock().unwrap();
                let line = format!("{} {}?{}", request.method, request.path, request.query);
                state.log.push(line);
                let next = state
                    .faults
                    .iter()
                    .position(|(method, _)| *method == request.method);
                next.map(|next| state.faults.remove(next).1)
            };
            self.changed.notify_all();
            let answer = match fault {
                Some(Fault::Status(status)) => Answer::new(status, "<Error/>"),
                Some(Fault::Silence) => {
                    let state = self.state.lock().unwrap();
                    let stopped = |_: &mut State| !self.stop.load(Ordering::Acquire);
                    drop(self.changed.wait_timeout_while(state, WAIT, stopped));
                    return Ok(());
                }
                Some(Fault::HalfBody) | None => self.answer(&request),
            };
            let half = fault == Some(Fault::HalfBody);
            self.now.fetch_sub(1, Ordering::AcqRel);
            write(&mut writer, &request, &answer, half)?;
            if half {
                return Ok(());
            }
        }
        Ok(())
    }

    fn answer(&self, request: &Request) -> Answer {
        let mut state = self.state.lock().unwrap();
        let query: HashMap<&str, &str> = request
            .query
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .collect();
        let path = request.path.clone();
        let etag = |bytes: &[u8]| {
            format!(
                "\"{:08x}\"",
                bytes.iter().map(|&b| u64::from(b)).sum::<u64>()
            )
        };
        match (request.method.as_str(), query.get("uploadId")) {
            ("POST", None) => {
                let id = format!("u{}", self.uploads.fetch_add(1, Ordering::AcqRel));
                state.uploads.insert(id.clone(), BTreeMap::new());
                Answer::new(
                    200,
                    format!(
                        "<InitiateMultipartUploadResult><UploadId>{id}</UploadId>\
                         </InitiateMultipartUploadResult>"
                    ),
                )
            }
            ("PUT", Some(&id)) => {
                let number = query["partNumber"].parse().unwrap();
                let mut answer = Answer::new(200, "");
                answer.headers.push(("etag", etag(&request.body)));
                match state.uploads.get_mut(id) {
                    Some(parts) => parts.insert(number, request.body.clone()),
                    None => return Answer::new(404, "<Error/>"),
                };
                answer
            }
            ("POST", Some(&id)) => {
                let Some(parts) = state.uploads.remove(id) else {
                    return Answer::new(404, "<Error/>");
                };
                let whole: Vec<u8> = parts.into_values().flatten().collect();
                let tag = etag(&whole);
                state.objects.insert(path, whole);
                Answer::new(
                    200,
                    format!(
                        "<CompleteMultipartUploadResult><ETag>{tag}</ETag>\
                         </CompleteMultipartUploadResult>"
                    ),
                )
            }
            ("DELETE", Some(&id)) => {
                state.uploads.remove(id);
                Answer::new(204, "")
            }
            ("DELETE", None) => {
                state.objects.remove(&path);
                Answer::new(204, "")
            }
            ("PUT", None) => {
                let only_new = request.headers.contains_key("if-none-match");
                if only_new && state.objects.contains_key(&path) {
                    return Answer::new(412, "<Error/>");
                }
                let mut answer = Answer::new(200, "");
                answer.headers.push(("etag", etag(&request.body)));
                state.objects.insert(path, request.body.clone());
                answer
            }
            ("GET", _) if query.contains_key("list-type") => list(&state.objects, &path, &query),
            ("GET" | "HEAD", _) => {
                let Some(bytes) = state.objects.get(&path) else {
                    return Answer::new(404, "<Error/>");
                };
                let mut answer = Answer::new(200, bytes.clone());
                answer.headers.push(("etag", etag(bytes)));
                let date = "Wed, 21 Oct 2026 07:28:00 GMT".to_owned();
                answer.headers.push(("last-modified", date));
                if let Some(range) = request.headers.get("range") {
                    let (start, end) = range
                        .strip_prefix("bytes=")
                        .and_then(|range| range.split_once('-'))
                        .unwrap();
                    let start: usize = start.parse().unwrap();
                    let end = end
                        .parse::<usize>()
                        .unwrap()
                        .min(bytes.len().wrapping_sub(1));
                    if start >= bytes.len() {
                        return Answer::new(416, "<Error/>");
                    }
                    answer.status = 206;
                    answer.body = bytes[start..=end].to_vec();
                    let total = bytes.len();
                    let content = format!("bytes {start}-{end}/{total}");
                    answer.headers.push(("content-range", content));
                }
                answer
            }
            _ => Answer::new(405, ""),
        }
    }
}

/// Objects that one answer of a listing names.
const PAGE: usize = 4;

/// A page of a listing: keys in order, behind the token.
fn list(objects: &BTreeMap<String, Vec<u8>>, bucket: &str, query: &HashMap<&str, &str>) -> Answer {
    let text = |name| query.get(name).map(|value| value.replace("%2F", "/"));
    let prefix = text("prefix").unwrap_or_default();
    let token = text("continuation-token").unwrap_or_default();
    let keys = objects.iter().filter_map(|(path, bytes)| {
        let key = path.strip_prefix(bucket)?.trim_start_matches('/');
        (key.starts_with(&prefix) && *key > *token).then_some((key, bytes.len()))
    });
    let keys: Vec<_> = keys.collect();
    let mut body = "<ListBucketResult>".to_owned();
    for (key, size) in keys.iter().take(PAGE) {
        body.push_str(&format!(
            "<Contents><Key>{key}</Key><Size>{size}</Size>\
             <LastModified>2026-10-21T07:28:00.000Z</LastModified></Contents>"
        ));
    }
    if keys.len() > PAGE {
        let next = keys[PAGE - 1].0;
        body.push_str(&format!(
            "<NextContinuationToken>{next}</NextContinuationToken>"
        ));
    }
    body.push_str("</ListBucketResult>");
    Answer::new(200, body)
}

fn read(reader: &mut BufReader<TcpStream>) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let method = words.next().unwrap().to_owned();
    let target = words.next().unwrap();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let (path, query) = (path.to_owned(), query.to_owned());
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let bytes = headers
        .get("content-length")
        .map_or(0, |bytes| bytes.parse().unwrap());
    let mut body = vec![0; bytes];
    reader.read_exact(&mut body)?;
    Ok(Some(Request {
        method,
        path,
        query,
        headers,
        body,
    }))
}

fn write(
    writer: &mut TcpStream,
    request: &Request,
    answer: &Answer,
    half: bool,
) -> std::io::Result<()> {
    let mut head = format!(
        "HTTP/1.1 {} X\r\ncontent-length: {}\r\n",
        answer.status,
        answer.body.len()
    );
    for (name, value) in &answer.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    writer.write_all(head.as_bytes())?;
    if request.method != "HEAD" {
        let bytes = answer.body.len();
        writer.write_all(&answer.body[..if half { bytes / 2 } else { bytes }])?;
    }
    writer.flush()
}
