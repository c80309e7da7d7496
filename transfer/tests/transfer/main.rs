//! Runs the conformance suite over every lane.
//!
//! What runs where: everything here also runs under AddressSanitizer (the crate documentation has
//! the command); the lock-free gate runs under loom (unit tests); layouts, planning and codecs are
//! pure and run under miri.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed unwrap is a failed test, and sizes here are small"
)]

mod process;
mod suite;
mod support;

use blockplane_transfer::Lane;

use support::Setup;

macro_rules! conformance {
    ($($name:ident),* $(,)?) => {
        mod loopback {
            $(#[test] fn $name() { super::suite::$name(&super::Setup::new(super::Lane::Loopback)); })*
        }
        mod shm {
            $(#[test] fn $name() { super::suite::$name(&super::Setup::new(super::Lane::Shm)); })*
        }
        mod tcp {
            $(#[test] fn $name() { super::suite::$name(&super::Setup::new(super::Lane::Tcp)); })*
        }
    };
}

conformance! {
    every_size_arrives_whole,
    layouts_and_layer_ranges_pair_up,
    ordinary_memory_works_on_both_sides,
    descriptor_lists_of_any_shape,
    notifications_follow_their_bytes_in_order,
    transfers_and_notifications_can_be_awaited,
    a_transfer_ends_at_its_deadline,
    cancelled_bytes_never_land_later,
    a_dropped_transfer_is_cancelled_and_keeps_its_memory,
    windows_open_and_close,
    nothing_lands_behind_a_closed_window,
    bad_requests_are_named,
    a_released_region_is_refused,
    losing_the_peer_ends_everything,
    a_new_life_of_a_peer_replaces_the_old_one,
    both_directions_and_the_agent_itself,
    a_prepared_transfer_is_posted_again_and_again,
    thousands_of_posts_from_several_threads,
    full_queues_push_back,
    delays_reorder_transfers_but_not_notifications,
    an_injected_disconnect_is_a_lost_peer,
    statuses_tell_the_truth,
}
