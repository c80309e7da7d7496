//! Server-sent events, cut from a byte stream.

/// Longest line that is accepted.
const LINE_BYTES_MAX: usize = 4 << 20;

/// Collects the bytes of a stream and hands out the `data:` lines.
#[derive(Debug, Default)]
pub(super) struct Events {
    buffer: Vec<u8>,
    taken: usize,
}

impl Events {
    /// Adds bytes as they came. False when a line is too long to be one of ours.
    pub(super) fn push(&mut self, bytes: &[u8]) -> bool {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        self.buffer.extend_from_slice(bytes);
        self.buffer.len() <= LINE_BYTES_MAX
    }

    /// The next complete `data:` line, without its name.
    pub(super) fn next(&mut self) -> Option<&[u8]> {
        loop {
            let start = self.taken;
            let length = self.buffer[start..]
                .iter()
                .position(|&byte| byte == b'\n')?;
            self.taken += length + 1;
            if self.buffer[start..].starts_with(b"data:") {
                let data = start + b"data:".len()..start + length;
                return Some(self.buffer[data].trim_ascii());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_any_cut() {
        let stream = b": comment\r\ndata: {\"a\":1}\r\n\r\nevent: x\ndata:two\n\ndata: [DONE]\n\n";
        for size in 1..stream.len() {
            let mut events = Events::default();
            let mut found: Vec<String> = Vec::new();
            for piece in stream.chunks(size) {
                assert!(events.push(piece));
                while let Some(data) = events.next() {
                    found.push(String::from_utf8(data.to_vec()).unwrap());
                }
            }
            assert_eq!(found, ["{\"a\":1}", "two", "[DONE]"], "cut at {size}");
        }
    }

    #[test]
    fn an_endless_line_is_refused() {
        let mut events = Events::default();
        assert!(events.push(&vec![b'x'; LINE_BYTES_MAX]));
        assert!(!events.push(b"x"));
    }
}
