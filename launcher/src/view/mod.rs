//! What `up` and `launch` show while they run: a live view on a terminal, plain lines elsewhere.

mod figures;

use std::{collections::BTreeMap, time::Duration};

use blockplane_bench::client::Server;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::{sync::mpsc, time::MissedTickBehavior};

use self::figures::{Figures, Snapshot};
use crate::{
    deployment::NodePlan,
    output,
    supervise::{Change, State},
};

/// How often a live view asks the frontend.
const LIVE_INTERVAL: Duration = Duration::from_secs(1);
/// How often figures are printed where there is no terminal, if there was any work.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);
/// Longest wait for the frontend's answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Shows the processes of a node and what they do.
pub(crate) struct View {
    states: BTreeMap<String, State>,
    processes: usize,
    introduced: bool,
    live: Option<Live>,
    server: Option<Server>,
    last: Option<Snapshot>,
}

/// The lines at the bottom of a terminal.
struct Live {
    screen: MultiProgress,
    rows: BTreeMap<String, ProgressBar>,
    figures: [ProgressBar; 2],
}

impl View {
    /// A live view if standard output is a terminal that can show one, unless `plain` lines are
    /// wanted.
    pub(crate) fn open(plan: &NodePlan, plain: bool) -> Self {
        // Hidden where there is no terminal, or one that cannot move its cursor.
        let target = ProgressDrawTarget::stdout_with_hz(10);
        let live = !plain && !target.is_hidden();
        Self {
            states: BTreeMap::new(),
            processes: plan.processes.len(),
            introduced: false,
            live: live.then(|| Live::open(plan, target)),
            server: None,
            last: None,
        }
    }

    /// Follows the processes until nobody is left to change; never ends by itself.
    pub(crate) async fn follow(&mut self, changes: &mut mpsc::Receiver<Change>) {
        let interval = if self.live.is_some() {
            LIVE_INTERVAL
        } else {
            PLAIN_INTERVAL
        };
        let mut ticks = tokio::time::interval(interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                change = changes.recv() => match change {
                    Some(change) => self.take(change),
                    // Every keeper is gone; whoever asked for that goes on by its own signal.
                    None => std::future::pending().await,
                },
                _ = ticks.tick(), if self.server.is_some() => self.look().await,
            }
        }
    }

    /// Takes the change of one process.
    pub(crate) fn take(&mut self, change: Change) {
        let text = describe(&change.state);
        match &self.live {
            Some(live) => live.show(&change, text),
            None if matches!(change.state, State::Loading { .. }) && !self.quarter(&change) => {}
            None => output::line(&format!("  {:<14} {text}", change.name)),
        }
        self.states.insert(change.name, change.state);
        self.introduce();
    }

    /// Removes the live view; lines go where they belong again.
    pub(crate) fn close(&mut self) {
        self.live = None;
        self.server = None;
    }

    /// Whether progress has come to another quarter, so that lines stay few.
    fn quarter(&self, change: &Change) -> bool {
        let quarter = |state: &State| match state {
            State::Loading { done, total } => Some(4 * done / (*total).max(1)),
            _ => None,
        };
        self.states.get(&change.name).and_then(quarter) != quarter(&change.state)
    }

    /// Says how to send a request once all processes are up and a model is served.
    fn introduce(&mut self) {
        let up = |state: &&State| matches!(state, State::Ready { .. } | State::Serving { .. });
        let serving = self.states.values().find_map(|state| match state {
            State::Serving { model, url, .. } => Some((model.clone(), url.clone())),
            _ => None,
        });
        let all_up = self.states.values().filter(up).count() == self.processes;
        let Some((model, url)) = serving.filter(|_| all_up && !self.introduced) else {
            return;
        };
        self.introduced = true;
        self.server = Server::new(&url, ANSWER_TIMEOUT).ok();
        let body = serde_json::json!({
            "model": model,
            "messages": [{"role": "user", "content": "Hello, how are you?"}],
            "max_tokens": 32,
        });
        output::line(&format!("listening on {url}, model {model}; try:"));
        output::line(&format!(
            "curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
        ));
        output::line(&format!(
            "or 'blockplane chat --url {url}' in another terminal, or open {url} in a browser."
        ));
        output::line("Ctrl-C stops everything.");
    }

    /// Asks the frontend and shows what has changed.
    async fn look(&mut self) {
        let Some(server) = &self.server else {
            return;
        };
        // A frontend that does not answer is the supervisor's business.
        let Ok(status) = server.get("/blockplane/status?recent=16").await else {
            return;
        };
        let now = Snapshot::read(&status, tokio::time::Instant::now().into_std());
        let before = self.last.replace(now);
        let (Some(before), Some(now)) = (before, &self.last) else {
            return;
        };
        let figures = Figures::between(&before, now);
        match &self.live {
            Some(live) => {
                for (row, text) in live.figures.iter().zip(figures.lines()) {
                    row.set_message(text);
                }
            }
            None if figures.idle => {}
            None => output::line(&format!("  {}", figures.lines().join(" | "))),
        }
    }
}

impl Live {
    fn open(plan: &NodePlan, target: ProgressDrawTarget) -> Self {
        let screen = MultiProgress::with_draw_target(target);
        let rows = plan.processes.iter().map(|process| {
            let row = screen.add(ProgressBar::new(1));
            row.set_style(style("  {prefix:<14} {wide_msg}"));
            row.set_prefix(process.name.clone());
            (process.name.clone(), row)
        });
        let rows = rows.collect();
        let figures = [(); 2].map(|()| {
            let row = screen.add(ProgressBar::new(1));
            row.set_style(style("  {wide_msg}"));
            row
        });
        output::set_view(Some(screen.clone()));
        Self {
            screen,
            rows,
            figures,
        }
    }

    fn show(&self, change: &Change, text: String) {
        let Some(row) = self.rows.get(&change.name) else {
            return;
        };
        if let State::Loading { done, total } = change.state {
            row.set_style(style(
                "  {prefix:<14} loading     {bar:30} layer {pos} of {len}",
            ));
            row.set_length(total.into());
            row.set_position(done.into());
        } else {
            row.set_style(style("  {prefix:<14} {wide_msg}"));
            row.set_message(text);
        }
        if matches!(change.state, State::Restarting { .. }) {
            // Rows are overwritten; why something died has to stay readable.
            output::line(&format!(
                "  {:<14} {}",
                change.name,
                describe(&change.state)
            ));
        }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        output::set_view(None);
        // A terminal that is gone needs no cleaning.
        let _ = self.screen.clear();
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("a constant template")
}

fn describe(state: &State) -> String {
    match state {
        State::Starting { pid } => format!("starting    pid {pid}"),
        State::Loading { done, total } => format!("loading     layer {done} of {total}"),
        State::Ready { pid, detail } => format!("ready       pid {pid}, {detail}"),
        State::Serving { pid, model, url } => {
            format!("serving     pid {pid}, model {model} at {url}")
        }
        State::Restarting { reason, delay } => {
            format!("restarting  in {:.1} s: {reason}", delay.as_secs_f64())
        }
        State::Stopped => "stopped".to_owned(),
    }
}
