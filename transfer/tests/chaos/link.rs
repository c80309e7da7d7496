//! The two sides of a world talk about the test over a pair of pipes, beside the agents.
//!
//! Lines: `?number question`, `!number answer`, and `done`. Whatever else is printed is skipped.

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};

use parking_lot::Mutex;

use crate::WAIT;

/// The other side is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gone;

pub(crate) struct Link {
    output: Mutex<Box<dyn Write + Send>>,
    waiting: Mutex<Waiting>,
    done: Mutex<Receiver<Word>>,
    ended: Mutex<Receiver<()>>,
}

/// Lines without a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    Go,
    Done,
}

#[derive(Default)]
struct Waiting {
    next: u64,
    answers: HashMap<u64, Sender<String>>,
    gone: bool,
}

impl Link {
    /// Starts reading; questions are answered by `serve`, on the reading thread.
    pub(crate) fn start(
        input: impl BufRead + Send + 'static,
        output: impl Write + Send + 'static,
        serve: impl Fn(&str) -> String + Send + 'static,
    ) -> Arc<Self> {
        let (finished, done) = channel();
        let (ends, ended) = channel::<()>();
        let link = Arc::new(Self {
            output: Mutex::new(Box::new(output)),
            waiting: Mutex::default(),
            done: Mutex::new(done),
            ended: Mutex::new(ended),
        });
        let reader = link.clone();
        std::thread::spawn(move || {
            reader.read(input, &serve, &finished);
            let mut waiting = reader.waiting.lock();
            waiting.gone = true;
            waiting.answers.clear();
            drop(waiting);
            drop(ends);
        });
        link
    }

    fn read(&self, input: impl BufRead, serve: &dyn Fn(&str) -> String, finished: &Sender<Word>) {
        for line in input.lines() {
            let Ok(line) = line else { return };
            // The test harness of a child prints "test name ... " before the first line.
            if let Some((_, rest)) = line.split_once('?') {
                let (number, question) = rest.split_once(' ').unwrap();
                let answer = serve(question);
                self.say(&format!("!{number} {answer}"));
            } else if let Some((_, rest)) = line.split_once('!') {
                let (number, answer) = rest.split_once(' ').unwrap();
                let waits = self.waiting.lock().answers.remove(&number.parse().unwrap());
                if let Some(waits) = waits {
                    let _ = waits.send(answer.to_owned());
                }
            } else if line == "done" {
                let _ = finished.send(Word::Done);
            } else if line == "go" {
                let _ = finished.send(Word::Go);
            }
        }
    }

    fn say(&self, line: &str) {
        let mut output = self.output.lock();
        // A dead reader is noticed by the reading thread of this side.
        let _ = writeln!(output, "{line}").and_then(|()| output.flush());
    }

    pub(crate) fn ask(&self, question: &str) -> Result<String, Gone> {
        let (sender, answer) = channel();
        let mut waiting = self.waiting.lock();
        if waiting.gone {
            return Err(Gone);
        }
        waiting.next += 1;
        let number = waiting.next;
        waiting.answers.insert(number, sender);
        drop(waiting);
        self.say(&format!("?{number} {question}"));
        match answer.recv_timeout(WAIT) {
            Ok(answer) => Ok(answer),
            Err(RecvTimeoutError::Disconnected) => Err(Gone),
            Err(RecvTimeoutError::Timeout) => panic!("no answer to {question:?}"),
        }
    }

    /// Tells the other side that this one has come to its end.
    pub(crate) fn say_done(&self) {
        self.say("done");
    }

    /// Waits until the other side has come to its end.
    pub(crate) fn wait_done(&self) -> Result<(), Gone> {
        self.wait_word(Word::Done)
    }

    /// Waits until this side may begin.
    pub(crate) fn wait_go(&self) -> Result<(), Gone> {
        self.wait_word(Word::Go)
    }

    fn wait_word(&self, word: Word) -> Result<(), Gone> {
        match self.done.lock().recv_timeout(WAIT * 4) {
            Ok(heard) if heard == word => Ok(()),
            Ok(other) => panic!("{other:?} instead of {word:?}"),
            Err(RecvTimeoutError::Disconnected) => Err(Gone),
            Err(RecvTimeoutError::Timeout) => panic!("the other side does not say {word:?}"),
        }
    }

    /// Waits for the end of the other side.
    pub(crate) fn wait_gone(&self) {
        // Nothing is ever sent.
        let _ = self.ended.lock().recv();
    }
}
