//! Stop strings: found across token boundaries, with as little text held back as possible.

/// Most stop strings of one request.
pub(crate) const STOP_STRINGS_MAX: usize = 16;

/// Longest stop string in bytes; bounds the text held back.
pub(crate) const STOP_STRING_BYTES_MAX: usize = 4096;

/// Watches text for stop strings.
///
/// The result does not depend on how the text is cut into pieces: the first stop string to be
/// complete ends the text, and of those complete at the same character the longest.
#[derive(Debug)]
pub(crate) struct StopMatcher {
    stops: Vec<String>,
    /// Text not let out because a stop string may start in it.
    held: String,
}

impl StopMatcher {
    /// Watches for `stops`, none of which is empty.
    pub(crate) fn new(stops: Vec<String>) -> Self {
        debug_assert!(stops.iter().all(|stop| !stop.is_empty()));
        Self {
            stops,
            held: String::new(),
        }
    }

    /// Takes `text` and appends to `out` what is certain to come before any stop string. Returns
    /// whether one is complete; nothing may be fed after that.
    pub(crate) fn feed(&mut self, text: &str, out: &mut String) -> bool {
        if self.stops.is_empty() {
            out.push_str(text);
            return false;
        }
        if text.is_empty() {
            return false;
        }
        self.held.push_str(text);
        let found = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop).map(|at| (at + stop.len(), at)))
            .min();
        if let Some((_, at)) = found {
            out.push_str(&self.held[..at]);
            self.held.clear();
            return true;
        }
        let keep = self.suffix_that_may_stop();
        out.extend(self.held.drain(..self.held.len() - keep));
        false
    }

    /// Lets out what was held back: no further text comes.
    pub(crate) fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }

    /// Bytes of the longest suffix of the held text that a stop string starts with.
    fn suffix_that_may_stop(&self) -> usize {
        let held = self.held.as_bytes();
        self.stops
            .iter()
            .map(|stop| {
                let stop = stop.as_bytes();
                let longest = held.len().min(stop.len() - 1);
                (1..=longest)
                    .rev()
                    .find(|&n| {
                        held.ends_with(&stop[..n]) && self.held.is_char_boundary(held.len() - n)
                    })
                    .unwrap_or(0)
            })
            .max()
            .unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition, character by character.
    fn naive(stops: &[String], text: &str) -> (String, bool) {
        for (start, c) in text.char_indices() {
            let seen = &text[..start + c.len_utf8()];
            let longest = stops
                .iter()
                .filter(|stop| seen.ends_with(stop.as_str()))
                .map(String::len)
                .max();
            if let Some(bytes) = longest {
                return (seen[..seen.len() - bytes].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    fn fed(stops: &[String], pieces: &[String]) -> (String, bool) {
        let mut matcher = StopMatcher::new(stops.to_vec());
        let mut out = String::new();
        for piece in pieces {
            if matcher.feed(piece, &mut out) {
                return (out, true);
            }
        }
        matcher.finish(&mut out);
        (out, false)
    }

    #[test]
    fn a_stop_string_may_span_pieces() {
        let pieces = ["one<".to_owned(), "/s".to_owned(), ">two".to_owned()];
        assert_eq!(fed(&["</s>".to_owned()], &pieces), ("one".to_owned(), true));
    }

    #[test]
    fn only_the_possible_prefix_is_held_back() {
        let mut matcher = StopMatcher::new(vec!["</s>".to_owned()]);
        let mut out = String::new();
        assert!(!matcher.feed("text <", &mut out));
        assert_eq!(out, "text ");
        assert!(!matcher.feed("b>", &mut out));
        assert_eq!(out, "text <b>");
    }

    proptest! {
        #[test]
        fn the_cut_does_not_depend_on_the_pieces(
            stops in prop::collection::vec("[abé€]{1,4}", 0..4),
            pieces in prop::collection::vec("[abcé€]{0,5}", 0..12),
        ) {
            prop_assert_eq!(fed(&stops, &pieces), naive(&stops, &pieces.concat()));
        }
    }
}
