//! Watches the process in which checks run: time limits, crashes, and what people see.

use std::{
    collections::VecDeque,
    fs,
    io::{self, BufRead, BufReader, Write},
    os::unix::process::CommandExt,
    process::{Child, Command, ExitCode, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::json;

use super::{
    GpuArgs,
    check::{self, Check},
    world::{Event, Outcome},
};

/// Bound on starting the process, with the driver.
const START: Duration = Duration::from_secs(60);
/// Lines of the log that are shown with a failure.
const LOG_LINES: usize = 15;
/// After so many failures in a row the rest of a group is left out: it would say the same.
const FAILURES_IN_A_ROW: usize = 3;
/// Time for all checks together, for machines on which most of them hang.
const BUDGET: Duration = Duration::from_secs(300);

/// Lists the checks, or runs them.
pub(super) fn run(args: &GpuArgs) -> anyhow::Result<ExitCode> {
    let mut checks = check::all();
    checks.retain(|check| {
        let contains = |pattern: &String| check.name.contains(pattern.as_str());
        args.only.is_empty() || args.only.iter().any(contains)
    });
    let mut shown = Shown::new(args.json);
    if args.list {
        for check in &checks {
            shown.listed(check)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    anyhow::ensure!(
        !checks.is_empty(),
        "no check has a name with {}; --list shows them",
        args.only.join(" or ")
    );
    shown.note(&format!("{} checks, seed {}", checks.len(), args.seed))?;
    let mut left = checks.as_slice();
    while !left.is_empty() {
        let done = Watched::start(args, left)?.watch(left, &mut shown)?;
        left = &left[done.min(left.len())..];
        if shown.gives_up() {
            let group = group(&shown.last);
            let same = left
                .iter()
                .take_while(|check| self::group(&check.name) == group);
            let count = same.count();
            if count > 0 {
                shown.left_out(&format!("{group}/..."), count, "those before it failed")?;
            }
            shown.in_a_row = 0;
            left = &left[count..];
        }
        if !left.is_empty() && shown.began.elapsed() > BUDGET * args.patience {
            let reason = "all checks together took too long";
            let outcome = Outcome::Failed(format!("{} checks were not run: {reason}", left.len()));
            shown.outcome("gpu", &outcome, shown.began.elapsed(), &[])?;
            break;
        }
        if shown.without_devices {
            let controls = left.iter().take_while(|check| check.control).count();
            left = &left[..controls];
        }
    }
    shown.summary()
}

/// The checks that a check belongs to: up to two parts of its name.
fn group(name: &str) -> &str {
    let mut ends = name.match_indices('/').map(|(at, _)| at);
    let (first, second) = (ends.next(), ends.next());
    second.or(first).map_or(name, |end| &name[..end])
}

/// What people or programs see.
struct Shown {
    json: bool,
    /// The machine was described.
    described: bool,
    /// There is no device: only controls run.
    without_devices: bool,
    passed: usize,
    failed: usize,
    skipped: usize,
    failures: Vec<String>,
    /// The last check, and how many of its group have failed one after the other.
    last: String,
    in_a_row: usize,
    began: Instant,
}

impl Shown {
    fn new(json: bool) -> Self {
        Self {
            json,
            described: false,
            without_devices: false,
            passed: 0,
            failed: 0,
            skipped: 0,
            failures: Vec::new(),
            last: String::new(),
            in_a_row: 0,
            began: Instant::now(),
        }
    }

    fn line(text: &str) -> anyhow::Result<()> {
        let mut out = io::stdout().lock();
        writeln!(out, "{text}")?;
        Ok(out.flush()?)
    }

    fn listed(&self, check: &Check) -> anyhow::Result<()> {
        if self.json {
            let limit = check.limit.as_secs();
            return Self::line(&json!({"check": check.name, "limit_s": limit}).to_string());
        }
        Self::line(&check.name)
    }

    /// Something for people only.
    fn note(&self, text: &str) -> anyhow::Result<()> {
        if self.json {
            return Ok(());
        }
        Self::line(text)
    }

    fn outcome(
        &mut self,
        name: &str,
        outcome: &Outcome,
        took: Duration,
        log: &[String],
    ) -> anyhow::Result<()> {
        let (mark, word, detail) = match outcome {
            Outcome::Passed(detail) => ("PASS", "passed", detail),
            Outcome::Failed(detail) => ("FAIL", "failed", detail),
            Outcome::Skipped(detail) => ("SKIP", "skipped", detail),
        };
        match outcome {
            Outcome::Passed(_) => self.passed += 1,
            Outcome::Failed(_) => {
                self.failed += 1;
                self.failures.push(name.to_owned());
            }
            Outcome::Skipped(_) => self.skipped += 1,
        }
        let failed = matches!(outcome, Outcome::Failed(_));
        let same = group(name) == group(&self.last);
        self.in_a_row = match (failed, same) {
            (true, true) => self.in_a_row + 1,
            (true, false) => 1,
            (false, _) => 0,
        };
        name.clone_into(&mut self.last);
        let seconds = took.as_secs_f64();
        if self.json {
            let mut object = json!({
                "check": name,
                "outcome": word,
                "seconds": (seconds * 1000.0).round() / 1000.0,
                "detail": detail,
            });
            if failed {
                object["log"] = json!(log);
            }
            return Self::line(&object.to_string());
        }
        Self::line(&format!("{mark}  {name:<48} {seconds:>6.2} s  {detail}"))?;
        if failed {
            for line in log {
                Self::line(&format!("      | {line}"))?;
            }
        }
        Ok(())
    }

    /// Whether the rest of the last check's group is not worth its time.
    const fn gives_up(&self) -> bool {
        self.in_a_row >= FAILURES_IN_A_ROW
    }

    /// Checks that are not run.
    fn left_out(&mut self, names: &str, count: usize, reason: &str) -> anyhow::Result<()> {
        self.skipped += count;
        if self.json {
            let object = json!({
                "check": names, "outcome": "skipped", "count": count, "detail": reason
            });
            return Self::line(&object.to_string());
        }
        Self::line(&format!(
            "SKIP  {names:<48}           {count} checks: {reason}"
        ))
    }

    fn summary(&self) -> anyhow::Result<ExitCode> {
        let Self {
            passed,
            failed,
            skipped,
            ..
        } = self;
        if self.json {
            let seconds = self.began.elapsed().as_secs_f64();
            let counts = json!({
                "passed": passed, "failed": failed, "skipped": skipped, "seconds": seconds
            });
            Self::line(&json!({ "summary": counts }).to_string())?;
        } else {
            for name in &self.failures {
                Self::line(&format!("FAILED {name}"))?;
            }
            let seconds = self.began.elapsed().as_secs();
            self.note(&format!("took {seconds} s"))?;
            Self::line(&format!(
                "{passed} passed, {failed} failed, {skipped} skipped"
            ))?;
        }
        Ok(if *failed == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

/// The process of the checks.
struct Watched {
    child: Child,
    events: Receiver<anyhow::Result<Event>>,
    log: Arc<Mutex<VecDeque<String>>>,
    patience: u32,
}

impl Watched {
    fn start(args: &GpuArgs, checks: &[Check]) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("the path of this program is not known")?;
        // A group of its own: whatever it starts ends with it.
        let mut child = Command::new(&program)
            .args(["selftest", "gpu-worker", "--seed", &args.seed.to_string()])
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let names: Vec<_> = checks.iter().map(|check| &check.name).collect();
        let mut input = child.stdin.take().context("the child has no input")?;
        serde_json::to_writer(&mut input, &names)?;
        input.write_all(b"\n")?;
        drop(input);
        let output = child.stdout.take().context("the child has no output")?;
        let errors = child.stderr.take().context("the child has no log")?;
        let (sender, events) = sync_channel(1000);
        thread::Builder::new()
            .name("selftest-events".to_owned())
            .spawn(move || {
                for line in BufReader::new(output).lines() {
                    let event = line
                        .map_err(anyhow::Error::from)
                        .and_then(|line| serde_json::from_str(&line).with_context(|| line));
                    if sender.send(event).is_err() {
                        return;
                    }
                }
            })?;
        let log = Arc::new(Mutex::new(VecDeque::new()));
        let kept = log.clone();
        thread::Builder::new()
            .name("selftest-log".to_owned())
            .spawn(move || {
                for line in BufReader::new(errors).lines() {
                    let Ok(line) = line else { return };
                    let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                    if kept.len() == LOG_LINES {
                        kept.pop_front();
                    }
                    kept.push_back(line);
                }
            })?;
        Ok(Self {
            child,
            events,
            log,
            patience: args.patience,
        })
    }

    /// Shows outcomes until the process ends or has to be ended; tells how many checks are over.
    fn watch(mut self, checks: &[Check], shown: &mut Shown) -> anyhow::Result<usize> {
        let mut done = 0;
        let mut began = Instant::now();
        let mut limit = START * self.patience;
        let mut doing = "start the driver".to_owned();
        loop {
            let left = (began + limit).saturating_duration_since(Instant::now());
            let ended = match self.events.recv_timeout(left) {
                Ok(Ok(Event::Machine { text })) => {
                    if !std::mem::replace(&mut shown.described, true) {
                        shown.note(&text)?;
                    }
                    continue;
                }
                Ok(Ok(Event::Unavailable { reason })) => {
                    if !std::mem::replace(&mut shown.without_devices, true) {
                        shown.outcome("gpu", &Outcome::Skipped(reason), began.elapsed(), &[])?;
                    }
                    if !checks.iter().any(|check| check.control) {
                        return Ok(checks.len());
                    }
                    continue;
                }
                Ok(Ok(Event::Begin { name })) => {
                    self.forget_log();
                    let check = checks.iter().find(|check| check.name == name);
                    limit = check.map_or(START, |check| check.limit) * self.patience;
                    began = Instant::now();
                    "begin".clone_into(&mut doing);
                    continue;
                }
                Ok(Ok(Event::Doing { text })) => {
                    doing = text;
                    continue;
                }
                Ok(Ok(Event::End {
                    name,
                    outcome,
                    fresh,
                })) => {
                    let log = match outcome {
                        Outcome::Failed(_) => self.log(),
                        Outcome::Passed(_) | Outcome::Skipped(_) => Vec::new(),
                    };
                    shown.outcome(&name, &outcome, began.elapsed(), &log)?;
                    done += 1;
                    began = Instant::now();
                    limit = START * self.patience;
                    let next = checks.get(done);
                    let over = |next: &Check| shown.without_devices && !next.control;
                    let late = shown.began.elapsed() > BUDGET * self.patience;
                    if fresh || late || shown.gives_up() || next.is_none_or(over) {
                        return Ok(done);
                    }
                    continue;
                }
                Ok(Err(error)) => format!("it says what is not understood: {error:#}"),
                Err(RecvTimeoutError::Timeout) => {
                    let threads = threads_of(self.child.id());
                    format!("no end within {limit:?} while: {doing}{threads}")
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.child.wait();
                    let status = status.map_or_else(|error| error.to_string(), |s| s.to_string());
                    format!("the process ended ({status}) while: {doing}")
                }
            };
            let name = checks.get(done).map_or("end", |check| &check.name);
            shown.outcome(name, &Outcome::Failed(ended), began.elapsed(), &self.log())?;
            return Ok(done + 1);
        }
    }

    fn forget_log(&self) {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.clear();
    }

    /// What was logged since the check began, once it has had time to arrive.
    fn log(&self) -> Vec<String> {
        thread::park_timeout(Duration::from_millis(50));
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.iter().cloned().collect()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // It and whatever it has started; nothing of it is worth keeping.
        let group = Pid::from_child(&self.child);
        let _ = kill_process_group(group, Signal::KILL);
        let _ = self.child.wait();
    }
}

/// The threads of all processes of a group, and what they are waiting for.
fn threads_of(group: u32) -> String {
    let mut text = String::new();
    let Ok(processes) = fs::read_dir("/proc") else {
        return text;
    };
    for process in processes.flatten() {
        let path = process.path();
        let stat = fs::read_to_string(path.join("stat")).unwrap_or_default();
        // Behind the name, which may contain anything: state, parent, group.
        let fields = stat.rsplit(')').next().unwrap_or_default();
        if fields.split_whitespace().nth(2) != Some(&group.to_string()) {
            continue;
        }
        let tasks = fs::read_dir(path.join("task"));
        for task in tasks.into_iter().flatten().flatten() {
            let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
            let stat = read("stat");
            let state = stat.rsplit(')').next().unwrap_or_default();
            let state = state.split_whitespace().next().unwrap_or("?");
            let name = read("comm");
            let process = process.file_name();
            text.push_str(&format!(
                "\n      process {} thread {} {state} {}",
                process.to_string_lossy(),
                name.trim(),
                read("wchan"),
            ));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_the_first_two_parts() {
        assert_eq!(group("copy/one-process/pinned/plain"), "copy/one-process");
        assert_eq!(group("leaks/one-process"), "leaks");
        assert_eq!(group("idle"), "idle");
    }

    #[test]
    fn three_failures_of_a_group_in_a_row_are_enough() {
        let mut shown = Shown::new(true);
        let mut say = |name: &str, outcome| {
            let took = Duration::ZERO;
            shown.outcome(name, &outcome, took, &[]).unwrap();
            shown.gives_up()
        };
        let failed = || Outcome::Failed("why".to_owned());
        assert!(!say("a/b/1", failed()));
        assert!(!say("a/b/2", failed()));
        assert!(!say("a/b/3", Outcome::Passed(String::new())));
        assert!(!say("a/b/4", failed()));
        assert!(!say("a/c/1", failed()));
        assert!(!say("a/c/2", failed()));
        assert!(say("a/c/3", failed()));
        assert_eq!((shown.passed, shown.failed), (1, 6));
    }
}
