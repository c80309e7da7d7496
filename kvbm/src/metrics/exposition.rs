//! The metrics as text, in Prometheus' text format 0.0.4. That format, not OpenMetrics, since KVBM's
//! counters do not end in `_total`.

use std::fmt::{Display, Write};

use super::HitRates;
use crate::{
    pool::{PoolActivity, PoolStats},
    remote::PeerStats,
    tier::{Dropped, Evicted, Histogram, MoveKind, NotLoaded, TierState, TierStats},
};

/// What G3's store says of its drive, from its first run on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskWear {
    /// Bytes written to the drive.
    pub bytes_written: u64,
    /// Blocks written.
    pub blocks_written: u64,
    /// Bytes of the drive, or of the share of it that is G3.
    pub drive_bytes: u64,
}

/// Metrics of one name.
struct Family<'a>(&'a mut String, &'static str);

/// The text that grows.
struct Text(String);

pub(super) fn write(
    stats: &TierStats,
    wear: Option<DiskWear>,
    peers_stats: Option<&PeerStats>,
    [recorded, record_dropped]: [u64; 2],
    rates: HitRates,
    matched_tokens: u64,
) -> String {
    let mut text = Text(String::with_capacity(16 << 10));
    kvbm(&mut text, stats, rates, matched_tokens);
    moves(&mut text, stats);
    onboards(&mut text, stats);
    tiers(&mut text, stats);
    disk(&mut text, stats, wear);
    if let Some(stats) = peers_stats {
        peers(&mut text, stats);
    }
    text.counter(
        "kvbm_recorded_requests_total",
        "Requests written to the record.",
    )
    .sample("", recorded);
    text.counter(
        "kvbm_record_dropped_requests_total",
        "Requests that were not recorded since the file was slower than they came.",
    )
    .sample("", record_dropped);
    text.0
}

/// What KVBM has, under its names.
fn kvbm(text: &mut Text, stats: &TierStats, rates: HitRates, matched_tokens: u64) {
    let blocks = |kind| stats.of(kind).blocks;
    let to_disk = blocks(MoveKind::HostToDisk);
    // Without a G2 blocks only pass through host memory: KVBM's device to disk.
    let (h2d, d2d) = if stats.host.total == 0 {
        (0, to_disk)
    } else {
        (to_disk, 0)
    };
    for (name, help, value) in [
        (
            "kvbm_offload_blocks_d2h",
            "Blocks copied from device to host.",
            blocks(MoveKind::DeviceToHost),
        ),
        (
            "kvbm_offload_blocks_h2d",
            "Blocks copied from host to disk.",
            h2d,
        ),
        (
            "kvbm_offload_blocks_d2d",
            "Blocks copied from device to disk without a host tier.",
            d2d,
        ),
        (
            "kvbm_offload_blocks_d2o",
            "Blocks written to objects or peers.",
            blocks(MoveKind::HostToRemote),
        ),
        (
            "kvbm_onboard_blocks_h2d",
            "Blocks of requests loaded from host.",
            stats.onboarded.blocks.host,
        ),
        (
            "kvbm_onboard_blocks_d2d",
            "Blocks of requests loaded from disk.",
            stats.onboarded.blocks.disk,
        ),
        (
            "kvbm_onboard_blocks_o2d",
            "Blocks of requests loaded from objects or peers.",
            stats.onboarded.blocks.remote,
        ),
        (
            "kvbm_matched_tokens",
            "Tokens of requests found in the tiers below the device.",
            matched_tokens,
        ),
        (
            "kvbm_object_read_failures",
            "Blocks that could not be read from objects or peers.",
            stats.of(MoveKind::RemoteToHost).failed_blocks,
        ),
        (
            "kvbm_object_write_failures",
            "Blocks that could not be written to objects or peers.",
            stats.of(MoveKind::HostToRemote).failed_blocks,
        ),
        (
            "kvbm_offload_bytes_object",
            "Bytes written to objects or peers.",
            stats.of(MoveKind::HostToRemote).bytes,
        ),
        (
            "kvbm_onboard_bytes_object",
            "Bytes read from objects or peers.",
            stats.of(MoveKind::RemoteToHost).bytes,
        ),
    ] {
        text.counter(name, help).sample("", value);
    }
    for (name, help, value) in [
        (
            "kvbm_device_cache_hit_rate",
            "Share of the blocks of the last requests found on the device.",
            rates.device,
        ),
        (
            "kvbm_host_cache_hit_rate",
            "Share of the blocks of the last requests found in host memory.",
            rates.host,
        ),
        (
            "kvbm_disk_cache_hit_rate",
            "Share of the blocks of the last requests found on disk.",
            rates.disk,
        ),
        (
            "kvbm_object_cache_hit_rate",
            "Share of the blocks of the last requests found in objects or at peers.",
            rates.remote,
        ),
    ] {
        text.gauge(name, help).sample("", value);
    }
}

fn moves(text: &mut Text, stats: &TierStats) {
    let each = || {
        MoveKind::ALL
            .into_iter()
            .map(|kind| (pair(kind), stats.of(kind)))
    };
    let mut counter = |name, help, value: fn(&crate::tier::MoveStats) -> u64| {
        let mut family = text.counter(name, help);
        for (pair, moved) in each() {
            family.sample(pair, value(moved));
        }
    };
    counter(
        "kvbm_transfers_total",
        "Transfers between tiers that ended.",
        |m| m.moves,
    );
    counter(
        "kvbm_transfer_blocks_total",
        "Blocks moved between tiers.",
        |m| m.blocks,
    );
    counter(
        "kvbm_transfer_bytes_total",
        "Bytes moved between tiers.",
        |m| m.bytes,
    );
    counter(
        "kvbm_transfer_failed_blocks_total",
        "Blocks that could not be moved.",
        |m| m.failed_blocks,
    );
    counter(
        "kvbm_transfers_late_total",
        "Transfers that missed their deadline.",
        |m| m.late,
    );
    let mut family = text.gauge("kvbm_transfers_running", "Transfers under way.");
    for (pair, moved) in each() {
        family.sample(pair, moved.running);
    }
    text.gauge(
        "kvbm_transfers_unquiet",
        "Transfers past their deadline whose bytes may still land.",
    )
    .sample("", stats.unquiet_moves);
    let mut family = text.histogram("kvbm_transfer_seconds", "Time of a transfer between tiers.");
    for (pair, moved) in each() {
        family.histogram(pair, &moved.latency);
    }
}

fn onboards(text: &mut Text, stats: &TierStats) {
    let onboarded = &stats.onboarded;
    text.counter(
        "kvbm_onboard_requests_total",
        "Requests that waited for blocks of lower tiers.",
    )
    .sample("", onboarded.requests);
    text.counter(
        "kvbm_onboard_complete_total",
        "Those that got all their blocks.",
    )
    .sample("", onboarded.complete);
    let mut family = text.counter(
        "kvbm_onboard_not_loaded_total",
        "Those that did not and computed the rest, by reason.",
    );
    for (reason, count) in NotLoaded::ALL.iter().zip(onboarded.not_loaded) {
        family.sample(&label("reason", reason.name()), count);
    }
    text.gauge(
        "kvbm_onboards_running",
        "Requests that wait for blocks of lower tiers.",
    )
    .sample("", stats.onboards);
    text.histogram(
        "kvbm_onboard_wait_seconds",
        "Time that requests waited for blocks of lower tiers.",
    )
    .histogram("", &onboarded.waited);
}

fn tiers(text: &mut Text, stats: &TierStats) {
    let mut family = text.gauge("kvbm_queue_blocks", "Blocks that wait in a queue.");
    for (queue, blocks) in [
        ("offload", stats.offload_queue_blocks),
        ("disk_write", stats.disk_queue_blocks),
        ("remote_write", stats.remote_queue_blocks),
        ("read", stats.read_queue_blocks),
    ] {
        family.sample(&label("queue", queue), blocks);
    }
    let mut family = text.counter(
        "kvbm_dropped_blocks_total",
        "Blocks that were to go to a lower tier and did not, by reason.",
    );
    for reason in Dropped::ALL {
        family.sample(&label("reason", reason.name()), stats.dropped(reason));
    }
    let mut family = text.counter(
        "kvbm_evicted_blocks_total",
        "Blocks that left a tier, by reason.",
    );
    for reason in Evicted::ALL {
        family.sample(
            &format!("tier=\"host\",reason=\"{}\"", reason.name()),
            stats.host_evicted(reason),
        );
    }
    for (tier, activity) in [
        ("device", &stats.device_activity),
        ("disk", &stats.disk_activity),
    ] {
        let labels = format!("tier=\"{tier}\",reason=\"{}\"", Evicted::Room.name());
        family.sample(&labels, activity.evictions);
    }
    let pools = [
        ("device", &stats.device),
        ("host", &stats.host),
        ("disk", &stats.disk),
    ];
    let mut family = text.gauge("kvbm_blocks", "Blocks of a tier by what they are used for.");
    for (tier, pool) in pools {
        for (state, blocks) in states(pool) {
            family.sample(&format!("tier=\"{tier}\",state=\"{state}\""), blocks);
        }
    }
    family.sample("tier=\"remote\",state=\"cached\"", stats.remote_blocks);
    let mut family = text.gauge("kvbm_blocks_capacity", "All blocks of a tier.");
    for (tier, pool) in pools {
        family.sample(&label("tier", tier), pool.total);
    }
    logical(text, stats);

    let below = [
        (
            "host",
            &stats.states.host,
            stats.state_changes.host,
            stats.invalid.host,
        ),
        (
            "disk",
            &stats.states.disk,
            stats.state_changes.disk,
            stats.invalid.disk,
        ),
        (
            "remote",
            &stats.states.remote,
            stats.state_changes.remote,
            stats.invalid.remote,
        ),
    ];
    let mut family = text.gauge("kvbm_tier_state", "1 for the state that a tier is in.");
    for (tier, now, _, _) in below {
        for state in ["on", "slow", "shrunk", "read_only", "off"] {
            let is = u8::from(state == state_name(now));
            family.sample(&format!("tier=\"{tier}\",state=\"{state}\""), is);
        }
    }
    let mut family = text.counter(
        "kvbm_tier_state_changes_total",
        "How often a tier changed its state.",
    );
    for (tier, _, changes, _) in below {
        family.sample(&label("tier", tier), changes);
    }
    let mut family = text.counter(
        "kvbm_invalid_blocks_total",
        "Blocks read that were not what was stored: wrong checksum, wrong name, or gone.",
    );
    for (tier, _, _, invalid) in below {
        family.sample(&label("tier", tier), invalid);
    }
}

/// What kvbm-logical has, under its names. It stages a block before it registers it, which is one step
/// here, and keeps duplicates if it is told to, which no pool does here.
fn logical(text: &mut Text, stats: &TierStats) {
    let pools = [
        ("device", &stats.device, &stats.device_activity),
        ("host", &stats.host, &stats.host_activity),
        ("disk", &stats.disk, &stats.disk_activity),
    ];
    let mut counter = |name, help, value: fn(&PoolActivity) -> u64| {
        let mut family = text.counter(name, help);
        for (pool, _, activity) in pools {
            family.sample(&label("pool", pool), value(activity));
        }
    };
    counter(
        "kvbm_allocations_total",
        "Blocks handed out to be filled.",
        |a| a.allocations,
    );
    counter(
        "kvbm_allocations_from_reset_total",
        "Those of them that had no contents.",
        |a| a.allocations_from_reset,
    );
    counter(
        "kvbm_registrations_total",
        "Blocks registered under a name.",
        |a| a.registrations,
    );
    counter(
        "kvbm_registration_dedup_total",
        "Those of them whose name was there already.",
        |a| a.registration_dedup,
    );
    counter(
        "kvbm_match_hashes_requested_total",
        "Names of prefixes that were looked up.",
        |a| a.match_requested,
    );
    counter(
        "kvbm_match_blocks_returned_total",
        "Blocks of such prefixes that were there.",
        |a| a.match_returned,
    );
    counter(
        "kvbm_scan_hashes_requested_total",
        "Names that were looked up one by one.",
        |a| a.scan_requested,
    );
    counter(
        "kvbm_scan_blocks_returned_total",
        "Blocks of such names that were there.",
        |a| a.scan_returned,
    );
    let made_room: u64 = stats.host_evicted.iter().sum();
    let mut family = text.counter(
        "kvbm_evictions_total",
        "Blocks that were overwritten or made room.",
    );
    family.sample("pool=\"device\"", stats.device_activity.evictions);
    family.sample("pool=\"host\"", made_room);
    family.sample("pool=\"disk\"", stats.disk_activity.evictions);
    let mut gauge = |name, help, value: fn(&PoolStats, &PoolActivity) -> usize| {
        let mut family = text.gauge(name, help);
        for (pool, stats, activity) in pools {
            family.sample(&label("pool", pool), value(stats, activity));
        }
    };
    gauge(
        "kvbm_inflight_mutable",
        "Blocks that are being filled.",
        |_, a| a.filling,
    );
    gauge(
        "kvbm_inflight_immutable",
        "Blocks with contents that somebody holds.",
        |s, a| s.active.saturating_sub(a.filling),
    );
    gauge(
        "kvbm_reset_pool_size",
        "Blocks without contents.",
        |s, _| s.free,
    );
    gauge(
        "kvbm_inactive_pool_size",
        "Blocks with contents that nobody holds.",
        |s, _| s.cached,
    );
}

fn disk(text: &mut Text, stats: &TierStats, wear: Option<DiskWear>) {
    text.counter(
        "kvbm_disk_written_bytes_total",
        "Bytes written to the disk tier since the start.",
    )
    .sample("", stats.disk_bytes_written);
    text.gauge(
        "kvbm_disk_bad_blocks",
        "Slots of the disk tier taken out of use.",
    )
    .sample("", stats.disk_bad_blocks);
    let Some(wear) = wear else {
        return;
    };
    text.counter(
        "kvbm_disk_lifetime_written_bytes_total",
        "Bytes written to the disk tier since it was made.",
    )
    .sample("", wear.bytes_written);
    text.counter(
        "kvbm_disk_lifetime_written_blocks_total",
        "Blocks written to the disk tier since it was made.",
    )
    .sample("", wear.blocks_written);
    text.gauge(
        "kvbm_disk_drive_bytes",
        "Bytes that one drive write stands for.",
    )
    .sample("", wear.drive_bytes);
}

fn peers(text: &mut Text, stats: &PeerStats) {
    let mut family = text.gauge("kvbm_peers", "Workers that blocks are exchanged with.");
    let waiting = stats.peers.saturating_sub(stats.usable);
    for (state, count) in [("usable", stats.usable), ("connecting", waiting)] {
        family.sample(&label("state", state), count);
    }
    text.gauge(
        "kvbm_peer_known_blocks",
        "Blocks that other workers say they have.",
    )
    .sample("", stats.names);
    let mut family = text.counter(
        "kvbm_peer_read_blocks_total",
        "Blocks asked of other workers, by what became of them.",
    );
    for (outcome, count) in [
        ("read", stats.read),
        ("missing", stats.missing),
        ("invalid", stats.invalid),
        ("failed", stats.failed),
    ] {
        family.sample(&label("outcome", outcome), count);
    }
    text.histogram(
        "kvbm_peer_read_seconds",
        "Time from asking other workers for blocks to having them, for each transfer.",
    )
    .histogram("", &stats.read_times);
    for (name, help, value) in [
        (
            "kvbm_peer_read_bytes_total",
            "Bytes of blocks read from other workers.",
            stats.read_bytes,
        ),
        (
            "kvbm_peer_lent_blocks_total",
            "Blocks lent to other workers.",
            stats.lent,
        ),
        (
            "kvbm_peer_lent_bytes_total",
            "Bytes of blocks lent to other workers.",
            stats.lent_bytes,
        ),
        (
            "kvbm_peer_leases_refused_total",
            "Requests of other workers for blocks that were refused.",
            stats.refused,
        ),
        (
            "kvbm_peer_leases_expired_total",
            "Loans that were not given back in time.",
            stats.expired,
        ),
        (
            "kvbm_peers_refused_total",
            "Workers whose blocks are others than those of this one.",
            stats.refused_peers,
        ),
        (
            "kvbm_peers_lost_total",
            "Connections to other workers that were lost.",
            stats.lost,
        ),
        (
            "kvbm_peer_ignored_messages_total",
            "Messages that were not understood, or of somebody who is no peer.",
            stats.ignored,
        ),
    ] {
        text.counter(name, help).sample("", value);
    }
    let mut family = text.gauge(
        "kvbm_peer_held_blocks",
        "Blocks of host memory that are held for other workers.",
    );
    let in_force = stats.held.saturating_sub(stats.overdue);
    for (state, count) in [("lent", in_force), ("overdue", stats.overdue)] {
        family.sample(&label("state", state), count);
    }
}

/// The uses of a pool's blocks. Together they are all of it.
fn states(pool: &PoolStats) -> [(&'static str, usize); 5] {
    [
        ("free", pool.free),
        ("cached", pool.cached),
        ("active", pool.active),
        ("quarantined", pool.quarantined),
        ("retired", pool.retired),
    ]
}

const fn state_name(state: &TierState) -> &'static str {
    match state {
        TierState::On => "on",
        TierState::Slow => "slow",
        TierState::Shrunk { .. } => "shrunk",
        TierState::ReadOnly(_) => "read_only",
        TierState::Off(_) => "off",
    }
}

/// Where a move comes from and goes to.
const fn pair(kind: MoveKind) -> &'static str {
    match kind {
        MoveKind::DeviceToHost => "from=\"device\",to=\"host\"",
        MoveKind::HostToDevice => "from=\"host\",to=\"device\"",
        MoveKind::HostToDisk => "from=\"host\",to=\"disk\"",
        MoveKind::DiskToHost => "from=\"disk\",to=\"host\"",
        MoveKind::HostToRemote => "from=\"host\",to=\"remote\"",
        MoveKind::RemoteToHost => "from=\"remote\",to=\"host\"",
    }
}

fn label(name: &str, value: &str) -> String {
    format!("{name}=\"{value}\"")
}

impl Text {
    fn counter(&mut self, name: &'static str, help: &str) -> Family<'_> {
        self.family(name, help, "counter")
    }

    fn gauge(&mut self, name: &'static str, help: &str) -> Family<'_> {
        self.family(name, help, "gauge")
    }

    fn histogram(&mut self, name: &'static str, help: &str) -> Family<'_> {
        self.family(name, help, "histogram")
    }

    fn family(&mut self, name: &'static str, help: &str, kind: &str) -> Family<'_> {
        self.0 += &format!("# HELP {name} {help}\n# TYPE {name} {kind}\n");
        Family(&mut self.0, name)
    }
}

impl Family<'_> {
    /// One value. `labels` as between the braces.
    fn sample(&mut self, labels: &str, value: impl Display) {
        self.line("", labels, value);
    }

    fn histogram(&mut self, labels: &str, times: &Histogram) {
        let comma = if labels.is_empty() { "" } else { "," };
        let mut below = 0;
        for (bound, count) in times.buckets() {
            below += count;
            let bound = bound.map_or_else(
                || "+Inf".to_owned(),
                |bound| bound.as_secs_f64().to_string(),
            );
            self.line("_bucket", &format!("{labels}{comma}le=\"{bound}\""), below);
        }
        self.line("_sum", labels, times.sum().as_secs_f64());
        self.line("_count", labels, below);
    }

    fn line(&mut self, suffix: &str, labels: &str, value: impl Display) {
        let name = self.1;
        // Writing to a string does not fail.
        let _ = if labels.is_empty() {
            writeln!(self.0, "{name}{suffix} {value}")
        } else {
            writeln!(self.0, "{name}{suffix}{{{labels}}} {value}")
        };
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, BTreeSet},
        time::Duration,
    };

    use super::*;

    fn stats() -> TierStats {
        let mut stats = TierStats::default();
        let host = &mut stats.host;
        (host.total, host.free, host.cached, host.active) = (10, 1, 7, 2);
        for (index, moved) in stats.moves.iter_mut().enumerate() {
            moved.moves = 2;
            moved.blocks = 10 + index as u64;
            moved.bytes = 1000;
            moved.latency.record(Duration::from_micros(100));
            moved.latency.record(Duration::from_secs(3600));
        }
        stats.device.active = 5;
        stats.device_activity.filling = 2;
        stats.host_activity.match_requested = 17;
        stats.disk_activity.evictions = 6;
        stats.onboarded.blocks.disk = 5;
        stats.invalid.disk = 3;
        stats.states.disk = TierState::Off("gone".to_owned());
        stats
    }

    fn text(stats: &TierStats) -> String {
        let wear = DiskWear {
            bytes_written: 1 << 40,
            blocks_written: 1 << 20,
            drive_bytes: 1 << 39,
        };
        let mut peers = PeerStats::default();
        (peers.peers, peers.usable, peers.names) = (3, 2, 70);
        (peers.read, peers.read_bytes, peers.failed) = (20, 2000, 6);
        (peers.held, peers.overdue) = (9, 4);
        peers.read_times.record(Duration::from_micros(100));
        let rates = HitRates::default();
        write(stats, Some(wear), Some(&peers), [4, 1], rates, 9)
    }

    /// Names with the labels of their samples.
    fn families(text: &str) -> BTreeMap<String, BTreeMap<String, BTreeSet<String>>> {
        let mut families: BTreeMap<String, BTreeMap<String, BTreeSet<String>>> = BTreeMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (series, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
            let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
            let known = families.entry(name.to_owned()).or_default();
            for label in labels
                .trim_end_matches('}')
                .split(',')
                .filter(|label| !label.is_empty())
            {
                let (label, value) = label.split_once('=').unwrap();
                let value = value.trim_matches('"').to_owned();
                known.entry(label.to_owned()).or_default().insert(value);
            }
        }
        families
    }

    #[test]
    fn every_family_is_described_once_and_every_series_is_there_once() {
        let text = text(&stats());
        let mut described = BTreeSet::new();
        for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
            assert!(
                described.insert(line.split(' ').next().unwrap()),
                "{line} twice"
            );
        }
        let mut series = BTreeSet::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let name = line.rsplit_once(' ').unwrap().0;
            assert!(series.insert(name), "{name} twice");
            let family = name.split('{').next().unwrap();
            let stem = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|end| family.strip_suffix(end));
            assert!(
                described.contains(family) || stem.is_some_and(|stem| described.contains(stem)),
                "{name}"
            );
        }
    }

    #[test]
    fn values_are_those_of_the_statistics() {
        let text = text(&stats());
        for line in [
            "kvbm_offload_blocks_d2h 10",
            "kvbm_offload_blocks_h2d 12",
            "kvbm_offload_blocks_d2d 0",
            "kvbm_onboard_blocks_d2d 5",
            "kvbm_matched_tokens 9",
            "kvbm_transfer_blocks_total{from=\"disk\",to=\"host\"} 13",
            "kvbm_transfer_seconds_bucket{from=\"device\",to=\"host\",le=\"0.000064\"} 0",
            "kvbm_transfer_seconds_bucket{from=\"device\",to=\"host\",le=\"0.000128\"} 1",
            "kvbm_transfer_seconds_bucket{from=\"device\",to=\"host\",le=\"+Inf\"} 2",
            "kvbm_transfer_seconds_count{from=\"device\",to=\"host\"} 2",
            "kvbm_transfer_seconds_sum{from=\"device\",to=\"host\"} 3600.0001",
            "kvbm_blocks{tier=\"host\",state=\"cached\"} 7",
            "kvbm_inflight_mutable{pool=\"device\"} 2",
            "kvbm_inflight_immutable{pool=\"device\"} 3",
            "kvbm_match_hashes_requested_total{pool=\"host\"} 17",
            "kvbm_evictions_total{pool=\"disk\"} 6",
            "kvbm_evicted_blocks_total{tier=\"disk\",reason=\"room\"} 6",
            "kvbm_tier_state{tier=\"disk\",state=\"off\"} 1",
            "kvbm_tier_state{tier=\"disk\",state=\"on\"} 0",
            "kvbm_invalid_blocks_total{tier=\"disk\"} 3",
            "kvbm_disk_lifetime_written_blocks_total 1048576",
            "kvbm_record_dropped_requests_total 1",
            "kvbm_peers{state=\"usable\"} 2",
            "kvbm_peers{state=\"connecting\"} 1",
            "kvbm_peer_known_blocks 70",
            "kvbm_peer_read_blocks_total{outcome=\"read\"} 20",
            "kvbm_peer_read_blocks_total{outcome=\"failed\"} 6",
            "kvbm_peer_read_bytes_total 2000",
            "kvbm_peer_read_seconds_bucket{le=\"0.000128\"} 1",
            "kvbm_peer_read_seconds_count 1",
            "kvbm_peer_held_blocks{state=\"lent\"} 5",
            "kvbm_peer_held_blocks{state=\"overdue\"} 4",
        ] {
            assert!(text.lines().any(|have| have == line), "{line} in {text}");
        }
        let mut without_host = stats();
        without_host.host = PoolStats::default();
        let text = write(&without_host, None, None, [0; 2], HitRates::default(), 0);
        assert!(
            text.contains("kvbm_offload_blocks_d2d 12\n")
                && text.contains("kvbm_offload_blocks_h2d 0\n")
        );
        assert!(!text.contains("kvbm_peer"), "nobody is asked: {text}");
    }

    /// The dashboard and the alerts that are shipped ask for what is served, and for nothing else.
    #[test]
    fn every_query_of_the_dashboard_is_answered() {
        let families = families(&text(&stats()));
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/");
        let dashboard = std::fs::read_to_string(format!("{folder}grafana/kvbm.json")).unwrap();
        let dashboard: serde_json::Value = serde_json::from_str(&dashboard).unwrap();
        let mut queries = Vec::new();
        collect(&dashboard, &mut queries);
        assert!(queries.len() >= 20, "{} queries", queries.len());
        let rules = std::fs::read_to_string(format!("{folder}prometheus/kvbm-rules.yml")).unwrap();
        let before = queries.len();
        let exprs = rules
            .lines()
            .filter_map(|line| line.trim().strip_prefix("expr: "));
        queries.extend(exprs.map(str::to_owned));
        assert!(queries.len() >= before + 4);
        let mut used = BTreeSet::new();
        for query in &queries {
            let asked = selectors(query);
            assert!(!asked.is_empty(), "{query} asks for no metric");
            for (name, labels) in asked {
                let Some(have) = families.get(&name) else {
                    panic!("{query}: {name} is not served");
                };
                for (label, value) in labels {
                    // Put there by Prometheus when it scrapes.
                    if ["job", "instance"].contains(&label.as_str()) {
                        continue;
                    }
                    let values = have
                        .get(&label)
                        .unwrap_or_else(|| panic!("{query}: {name} has no {label}"));
                    if let Some(value) = value {
                        assert!(
                            values.contains(&value),
                            "{query}: {label} of {name} is one of {values:?}"
                        );
                    }
                }
                used.insert(name);
            }
        }
        for row in [
            "cache_hit_rate",
            "offload_blocks",
            "onboard_blocks",
            "kvbm_blocks",
            "disk_lifetime",
            "seconds_bucket",
            "kvbm_peer_",
        ] {
            assert!(
                used.iter().any(|name| name.contains(row)),
                "no panel shows {row}"
            );
        }
    }

    /// Every `expr` in the document.
    fn collect(value: &serde_json::Value, queries: &mut Vec<String>) {
        match value {
            serde_json::Value::Object(fields) => {
                for (key, value) in fields {
                    match value {
                        serde_json::Value::String(query) if key == "expr" => {
                            queries.push(query.clone())
                        }
                        value => collect(value, queries),
                    }
                }
            }
            serde_json::Value::Array(items) => items.iter().for_each(|item| collect(item, queries)),
            _ => {}
        }
    }

    /// A label, and its value where the match is for equality.
    type Matcher = (String, Option<String>);

    /// The metrics that a query names with the labels that it matches or groups by. The value is
    /// known where the match is for equality.
    fn selectors(query: &str) -> Vec<(String, Vec<Matcher>)> {
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let mut found: Vec<(String, Vec<Matcher>)> = Vec::new();
        let mut grouped = Vec::new();
        let mut rest = query;
        while let Some(start) = rest.find(|c: char| c.is_ascii_alphabetic() || c == '_') {
            let tail = &rest[start..];
            let end = tail.find(|c| !word(c)).unwrap_or(tail.len());
            let (name, after) = tail.split_at(end);
            rest = after;
            if name == "by" {
                let (list, after) = after
                    .trim_start()
                    .trim_start_matches('(')
                    .split_once(')')
                    .unwrap();
                grouped.extend(list.split(',').map(|label| label.trim().to_owned()));
                rest = after;
            } else if name.starts_with("kvbm_") {
                let mut labels = Vec::new();
                if let Some(inner) = after.strip_prefix('{') {
                    let (inner, after) = inner.split_once('}').unwrap();
                    for matcher in inner.split(',') {
                        let at = matcher.find(['=', '!']).unwrap();
                        let equal =
                            !matcher[at..].starts_with("=~") && matcher[at..].starts_with('=');
                        let value = matcher[at + 1..].trim_matches('"').to_owned();
                        labels.push((matcher[..at].trim().to_owned(), equal.then_some(value)));
                    }
                    rest = after;
                }
                found.push((name.to_owned(), labels));
            }
        }
        for (_, labels) in &mut found {
            labels.extend(grouped.iter().map(|label| (label.clone(), None)));
        }
        found
    }
}
