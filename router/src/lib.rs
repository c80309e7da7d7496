//! Picks the worker for a request: where its prefix already is, weighed against load.
//!
//! Depend on this crate to route requests or to simulate routing. It does no I/O, reads no clock
//! and draws no random number: `now` and `draw` are arguments, so every decision can be replayed.
//! `now` is a [`std::time::Duration`] since any fixed origin of a monotonic clock.
//!
//! ```text
//! KvEvent ─► KvIndex ──────┐ which rank holds which prefix blocks, per tier
//! routed  ─► Predictions ──┤ what was just sent somewhere counts as present for a while
//! LoadReport, reservations ┴► LoadTable ─► cost per rank ─► choice + reservation ─► Plan
//! ```
//!
//! * [`Router`]: the decode (or aggregated) pool, the prefill pool, admission, and the
//!   disaggregation policy behind one [`Router::plan`] call.
//! * [`Pool`]: the ranks of one role; selection and reservation happen under one short lock.
//! * [`KvIndex`]: prefix index with gap detection and a memory cap.
//! * [`score`]: the cost function; [`DisaggPolicy`]: local or remote prefill.
//!
//! ```
//! use std::time::Duration;
//! use blockplane_protocol::{SaltHash, TokenSequence, WorkerId, WorkerRole};
//! use blockplane_router::{RankInfo, RouteRequest, Router, RouterConfig, RouterMode};
//!
//! let config = RouterConfig { mode: RouterMode::Kv, ..RouterConfig::default() };
//! let router = Router::new(config)?;
//! router.add_worker(WorkerId(1), WorkerRole::Aggregated, RankInfo { dp_size: 1, blocks: 1024 });
//!
//! let prompt = TokenSequence::from_tokens(&[7; 40], 16, SaltHash::default());
//! let request = RouteRequest::from_sequence(&prompt);
//! let routed = router.plan(&request, Duration::ZERO, 0)?;
//! assert_eq!(routed.plan.decode.target.worker, WorkerId(1));
//! routed.reservation.prefill_done(Duration::from_millis(3));
//! drop(routed.reservation); // the request ended
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod admission;
mod config;
mod disagg;
mod error;
pub mod index;
mod load;
mod pool;
mod router;
pub mod score;
mod select;

pub use admission::AdmissionStats;
pub use config::{ConfigError, RouterConfig, RouterMode};
pub use disagg::{DisaggInput, DisaggPolicy, LocalReason, PrefillChoice};
pub use error::RouteError;
pub use index::{Applied, Confidence, IndexStats, KvIndex, Overlap, Overlaps};
pub use load::RankLoad;
pub use pool::{Decision, Pool, PoolStats, PrefillCandidates, RankInfo, RankStatus, RouteRequest};
pub use router::{Plan, PrefillPlan, Reservation, Routed, Router};
pub use select::{Candidate, SkipReason, Skipped};
