//! Runs the conformance suite over every lane.
//!
//! What runs where: everything here also runs under AddressSanitizer, and the lock-free gate under
//! loom (a unit test); the crate documentation has both commands.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed unwrap is a failed test, and sizes here are small"
)]

mod device;
mod faults;
mod meeting;
mod memory;
mod metadata;
mod observe;
mod peers;
mod process;
mod streams;
mod suite;
mod support;
mod tensors;
mod tls;
mod verbs_alone;

use blockplane_transfer::Lane;

use support::Setup;

macro_rules! conformance {
    ($($part:ident: $($name:ident),* ;)*) => {
        mod loopback { $($(
            #[test] fn $name() { crate::$part::$name(&crate::Setup::new(crate::Lane::Loopback)); }
        )*)* }
        mod shm { $($(
            #[test] fn $name() { crate::$part::$name(&crate::Setup::new(crate::Lane::Shm)); }
        )*)* }
        mod tcp { $($(
            #[test] fn $name() { crate::$part::$name(&crate::Setup::new(crate::Lane::Tcp)); }
        )*)* }
        // Two devices of one machine: see tests/rdma.
        mod verbs { $($(
            #[test]
            #[ignore = "needs two RDMA devices: tests/run rdma"]
            fn $name() { crate::$part::$name(&crate::Setup::new(crate::Lane::Verbs)); }
        )*)* }
        mod tcp_with_tls { $($(
            #[test] fn $name() { crate::$part::$name(&crate::Setup::with_tls()); }
        )*)* }
    };
}

conformance! {
    suite:
    every_size_arrives_whole,
    layouts_and_layer_ranges_pair_up,
    ordinary_memory_works_on_both_sides,
    descriptor_lists_of_any_shape,
    sets_of_several_regions_are_one_operation,
    notifications_follow_their_bytes_in_order,
    transfers_and_notifications_can_be_awaited,
    both_directions_and_the_agent_itself,
    a_prepared_transfer_is_posted_again_and_again,
    thousands_of_posts_from_several_threads,
    statuses_tell_the_truth;
    faults:
    a_transfer_ends_at_its_deadline,
    losing_the_peer_ends_everything,
    a_new_life_of_a_peer_replaces_the_old_one,
    full_queues_push_back,
    delays_reorder_transfers_but_not_notifications,
    an_injected_disconnect_is_a_lost_peer,
    cancelled_bytes_never_land_later,
    a_dropped_transfer_is_cancelled_and_keeps_its_memory,
    a_released_region_is_refused,
    windows_open_and_close,
    nothing_lands_behind_a_closed_window,
    bad_requests_are_named;
    observe:
    completions_come_to_an_event_loop,
    every_post_completes_once_also_when_the_peer_goes,
    telemetry_adds_up,
    spans_name_the_request;
    meeting:
    both_connect_at_once,
    a_lost_peer_is_named_before_its_windows,
    the_lost_do_not_count_as_peers,
    a_loss_wakes_who_waits_for_it;
    tensors:
    every_arrangement_becomes_every_other,
    there_and_back_is_what_it_was,
    parts_of_blocks_pair_up,
    ranks_merge_and_split,
    blocks_of_different_length,
    windows_cover_parts_of_blocks,
    tensors_that_do_not_fit_are_named,
    an_agent_rearranges_its_own_memory,
    ordinary_memory_is_rearranged,
    equal_layouts_are_planned_as_blocks,
    a_rearranging_copy_is_called_off;
    peers:
    a_remembered_peer_is_connected_when_it_is_used,
    estimates_come_from_the_connection;
}
